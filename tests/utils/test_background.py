"""Work beside the main thread: in order, not too far ahead or behind, and no error is lost."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import closing

import pytest

from utils.background import Behind, ahead

WAIT_SECONDS = 10.0


class Oops(Exception):
    """What goes wrong."""


def wait_until(is_so: Callable[[], bool]) -> None:
    """Wait for the other thread."""
    paused = threading.Event()
    for _ in range(int(WAIT_SECONDS / 0.002)):
        if is_so():
            return
        paused.wait(0.002)
    raise AssertionError("waited in vain")


def threads(name: str) -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name.startswith(name)]


# --- ahead -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("depth", [1, 3, 50])
def test_all_items_come_in_their_order(depth: int) -> None:
    assert list(ahead(range(20), depth)) == list(range(20))
    assert list(ahead([], depth)) == []


def test_items_may_be_nothing_or_errors_themselves() -> None:
    """They are handed over in something of their own."""
    error = Oops()
    assert list(ahead([None, error, None], 1)) == [None, error, None]


def test_items_are_made_in_another_thread_while_the_first_is_used() -> None:
    makers: list[threading.Thread] = []

    def make() -> Iterator[int]:
        for number in range(5):
            makers.append(threading.current_thread())
            yield number

    with closing(ahead(make(), 2)) as items:
        assert next(items) == 0
        wait_until(lambda: len(makers) == 4)
    assert threading.current_thread() not in makers
    assert len(set(makers)) == 1


@pytest.mark.parametrize("depth", [1, 3])
def test_no_more_items_wait_than_are_allowed(depth: int) -> None:
    made: list[int] = []

    def make() -> Iterator[int]:
        for number in range(20):
            made.append(number)
            yield number

    with closing(ahead(make(), depth)) as items:
        for num_used in range(1, 5):
            next(items)
            wait_until(lambda: len(made) > num_used + depth)  # noqa: B023  one more is made and waits for its place
            threading.Event().wait(0.02)
            assert len(made) == num_used + depth + 1


def test_nothing_is_made_before_the_first_is_asked_for() -> None:
    made: list[int] = []

    def make() -> Iterator[int]:
        made.append(0)
        yield 0

    items = ahead(make(), 2)
    threading.Event().wait(0.02)
    assert made == []
    items.close()
    assert made == []


def test_an_error_comes_after_the_items_before_it() -> None:
    def make() -> Iterator[int]:
        yield from range(3)
        raise Oops("the fourth")

    items = ahead(make(), 10)
    assert [next(items) for _ in range(3)] == [0, 1, 2]
    with pytest.raises(Oops, match="the fourth"):
        next(items)
    with pytest.raises(StopIteration):
        next(items)


def test_even_an_interrupt_in_the_other_thread_is_raised() -> None:
    def make() -> Iterator[int]:
        yield 0
        raise KeyboardInterrupt

    items = ahead(make(), 1)
    next(items)
    with pytest.raises(KeyboardInterrupt):
        next(items)


def test_closing_ends_the_thread_although_items_are_left() -> None:
    before = len(threads("ahead"))
    items = ahead(iter(int, 1), 2)  # zeros for ever
    assert [next(items) for _ in range(3)] == [0, 0, 0]
    assert len(threads("ahead")) == before + 1
    items.close()
    wait_until(lambda: len(threads("ahead")) == before)


# --- behind ------------------------------------------------------------------------------------------------------------


def test_everything_is_finished_in_order_when_the_block_ends() -> None:
    finished: list[int] = []
    with Behind(finished.append, 2) as behind:
        for number in range(20):
            behind.put(number)
    assert finished == list(range(20))


def test_things_are_finished_in_one_other_thread() -> None:
    finishers: list[threading.Thread] = []

    def finish(_: int) -> None:
        finishers.append(threading.current_thread())

    with Behind(finish, 2) as behind:
        for number in range(5):
            behind.put(number)
    assert len(finishers) == 5
    assert len(set(finishers)) == 1
    assert threading.current_thread() not in finishers
    assert threads("behind") == []


def test_handing_over_waits_while_too_much_is_waiting() -> None:
    gate = threading.Event()
    handed_over: list[int] = []

    def finish(_: int) -> None:
        gate.wait(WAIT_SECONDS)

    def hand_over(behind: Behind[int]) -> None:
        for number in range(5):
            behind.put(number)
            handed_over.append(number)

    with Behind(finish, 2) as behind:
        helper = threading.Thread(target=hand_over, args=(behind,))
        helper.start()
        wait_until(lambda: handed_over == [0, 1])
        threading.Event().wait(0.02)
        assert handed_over == [0, 1]
        gate.set()
        helper.join()
    assert handed_over == [0, 1, 2, 3, 4]


def wait_for(number: int, finished: list[int]) -> None:
    wait_until(lambda: number == 2 or number in finished)


def fail_at_two(finished: list[int]) -> Callable[[int], None]:
    def finish(number: int) -> None:
        if number == 2:
            raise Oops("the third")
        finished.append(number)

    return finish


def test_what_fails_is_raised_at_the_next_turn_however_much_may_wait() -> None:
    finished: list[int] = []
    with pytest.raises(Oops, match="the third"), Behind(fail_at_two(finished), 1000) as behind:
        for number in range(1000):
            behind.put(number)
            wait_for(number, finished)
    assert finished[:2] == [0, 1]
    assert len(finished) < 10, "nothing more was handed over"


def test_what_fails_last_is_raised_at_the_end() -> None:
    finished: list[int] = []
    with pytest.raises(Oops, match="the third"), Behind(fail_at_two(finished), 10) as behind:
        for number in range(3):
            behind.put(number)
    assert finished == [0, 1]


def test_after_an_error_in_this_thread_only_what_has_begun_is_finished() -> None:
    gate, begun = threading.Event(), threading.Event()
    finished: list[int] = []

    def finish(number: int) -> None:
        begun.set()
        gate.wait(WAIT_SECONDS)
        finished.append(number)

    with pytest.raises(Oops, match="here"), Behind(finish, 10) as behind:
        for number in range(5):
            behind.put(number)
        begun.wait(WAIT_SECONDS)
        threading.Timer(0.05, gate.set).start()
        raise Oops("here")
    assert finished == [0]


def test_an_error_in_this_thread_is_not_hidden_by_one_in_the_other() -> None:
    with pytest.raises(Oops, match="here"), Behind(fail_at_two([]), 10) as behind:
        for number in range(3):
            behind.put(number)
        wait_until(lambda: behind._waiting[-1].done())
        raise Oops("here")
