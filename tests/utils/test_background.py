"""Background threads keep the order of items and the limits on waiting items, and lose no exception."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import closing

import pytest

from utils.background import BackgroundWorker, prefetch

WAIT_SECONDS = 10.0


class Oops(Exception):
    """The exception of a test."""


def wait_until(condition: Callable[[], bool]) -> None:
    """Waits until another thread has made the condition true."""
    paused = threading.Event()
    for _ in range(int(WAIT_SECONDS / 0.002)):
        if condition():
            return
        paused.wait(0.002)
    raise AssertionError(f"not true within {WAIT_SECONDS:.0f} s")


def threads(name: str) -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name.startswith(name)]


# --- prefetch ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("depth", [1, 3, 50])
def test_prefetch_keeps_the_order_of_items(depth: int) -> None:
    assert list(prefetch(range(20), depth)) == list(range(20))
    assert list(prefetch([], depth)) == []


def test_items_may_be_none_or_exceptions() -> None:
    """Items are wrapped in the queue, so they cannot be mistaken for its end or for a failure."""
    error = Oops()
    assert list(prefetch([None, error, None], 1)) == [None, error, None]


def test_items_are_computed_in_one_other_thread_while_earlier_ones_are_used() -> None:
    makers: list[threading.Thread] = []

    def make() -> Iterator[int]:
        for number in range(5):
            makers.append(threading.current_thread())
            yield number

    with closing(prefetch(make(), 2)) as items:
        assert next(items) == 0
        wait_until(lambda: len(makers) == 4)
    assert threading.current_thread() not in makers
    assert len(set(makers)) == 1


@pytest.mark.parametrize("depth", [1, 3])
def test_at_most_depth_items_wait(depth: int) -> None:
    made: list[int] = []

    def make() -> Iterator[int]:
        for number in range(20):
            made.append(number)
            yield number

    with closing(prefetch(make(), depth)) as items:
        for num_used in range(1, 5):
            next(items)
            wait_until(lambda: len(made) > num_used + depth)  # noqa: B023  one more waits for a free place
            threading.Event().wait(0.02)
            assert len(made) == num_used + depth + 1


def test_nothing_is_computed_before_the_first_item_is_requested() -> None:
    made: list[int] = []

    def make() -> Iterator[int]:
        made.append(0)
        yield 0

    items = prefetch(make(), 2)
    threading.Event().wait(0.02)
    assert made == []
    items.close()
    assert made == []


def test_an_exception_is_raised_after_the_items_before_it() -> None:
    def make() -> Iterator[int]:
        yield from range(3)
        raise Oops("the fourth")

    items = prefetch(make(), 10)
    assert [next(items) for _ in range(3)] == [0, 1, 2]
    with pytest.raises(Oops, match="the fourth"):
        next(items)
    with pytest.raises(StopIteration):
        next(items)


def test_a_keyboard_interrupt_in_the_thread_is_raised() -> None:
    def make() -> Iterator[int]:
        yield 0
        raise KeyboardInterrupt

    items = prefetch(make(), 1)
    next(items)
    with pytest.raises(KeyboardInterrupt):
        next(items)


def test_closing_the_generator_ends_the_thread() -> None:
    before = len(threads("prefetch"))
    items = prefetch(iter(int, 1), 2)  # an infinite iterator of zeros
    assert [next(items) for _ in range(3)] == [0, 0, 0]
    assert len(threads("prefetch")) == before + 1
    items.close()
    wait_until(lambda: len(threads("prefetch")) == before)


# --- BackgroundWorker --------------------------------------------------------------------------------------------------


def test_all_items_are_finished_in_order_when_the_block_ends() -> None:
    finished: list[int] = []
    with BackgroundWorker(finished.append, 2) as worker:
        for number in range(20):
            worker.put(number)
    assert finished == list(range(20))


def test_items_are_finished_in_one_other_thread() -> None:
    finishers: list[threading.Thread] = []

    def finish(_: int) -> None:
        finishers.append(threading.current_thread())

    with BackgroundWorker(finish, 2) as worker:
        for number in range(5):
            worker.put(number)
    assert len(finishers) == 5
    assert len(set(finishers)) == 1
    assert threading.current_thread() not in finishers
    assert threads("background worker") == []


def test_put_blocks_while_more_than_depth_items_wait() -> None:
    gate = threading.Event()
    handed_over: list[int] = []

    def finish(_: int) -> None:
        gate.wait(WAIT_SECONDS)

    def hand_over(worker: BackgroundWorker[int]) -> None:
        for number in range(5):
            worker.put(number)
            handed_over.append(number)

    with BackgroundWorker(finish, 2) as worker:
        helper = threading.Thread(target=hand_over, args=(worker,))
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


def test_an_exception_is_raised_at_the_next_put() -> None:
    finished: list[int] = []
    with pytest.raises(Oops, match="the third"), BackgroundWorker(fail_at_two(finished), 1000) as worker:
        for number in range(1000):
            worker.put(number)
            wait_for(number, finished)
    assert finished[:2] == [0, 1]
    assert len(finished) < 10, "put raised at the next call"


def test_an_exception_in_the_last_item_is_raised_at_the_end_of_the_block() -> None:
    finished: list[int] = []
    with pytest.raises(Oops, match="the third"), BackgroundWorker(fail_at_two(finished), 10) as worker:
        for number in range(3):
            worker.put(number)
    assert finished == [0, 1]


def test_after_an_exception_in_the_block_only_the_current_item_is_finished() -> None:
    gate, started = threading.Event(), threading.Event()
    finished: list[int] = []

    def finish(number: int) -> None:
        started.set()
        gate.wait(WAIT_SECONDS)
        finished.append(number)

    with pytest.raises(Oops, match="here"), BackgroundWorker(finish, 10) as worker:
        for number in range(5):
            worker.put(number)
        started.wait(WAIT_SECONDS)
        threading.Timer(0.05, gate.set).start()
        raise Oops("here")
    assert finished == [0]


def test_an_exception_in_the_block_is_not_replaced_by_one_in_the_thread() -> None:
    with pytest.raises(Oops, match="here"), BackgroundWorker(fail_at_two([]), 10) as worker:
        for number in range(3):
            worker.put(number)
        wait_until(lambda: worker._waiting[-1].done())
        raise Oops("here")
