"""The order of examples: nobody is left out, and it depends on nothing but seed and step."""

from __future__ import annotations

from collections import Counter
from itertools import pairwise
from pathlib import Path

import pytest

from utils.data.batches import BatchOrder, Visit
from utils.data.buckets import Bucket, crop_box
from utils.data.dataset import Example

SQUARE, WIDE, TALL = Bucket(32, 32), Bucket(48, 16), Bucket(16, 48)


def make_examples(counts: dict[Bucket, int], repeats: int = 1) -> list[Example]:
    return [
        Example(f"0/{bucket}-{index}.png@32", Path(f"{bucket}-{index}.png"), "a fox", crop_box(40, 40, bucket), repeats)
        for bucket, count in counts.items()
        for index in range(count)
    ]


EXAMPLES = make_examples({SQUARE: 13, WIDE: 5, TALL: 1})


def epoch_of(order: BatchOrder, epoch: int) -> list[list[Visit]]:
    start = epoch * order.steps_per_epoch
    return [order.global_batch(step) for step in range(start, start + order.steps_per_epoch)]


def keys(batches: list[list[Visit]]) -> list[str]:
    return [visit.example.key for batch in batches for visit in batch]


@pytest.mark.parametrize("global_batch", [1, 2, 4, 7, 32])
@pytest.mark.parametrize("epoch", [0, 1, 5])
def test_every_image_appears_in_every_epoch(global_batch: int, epoch: int) -> None:
    order = BatchOrder(EXAMPLES, global_batch, seed=3)
    assert set(keys(epoch_of(order, epoch))) == {example.key for example in EXAMPLES}


@pytest.mark.parametrize("global_batch", [1, 2, 4, 7, 32])
def test_an_epoch_holds_whole_batches_and_as_many_fillers_as_announced(global_batch: int) -> None:
    order = BatchOrder(EXAMPLES, global_batch, seed=3)
    batches = epoch_of(order, 0)
    assert {len(batch) for batch in batches} == {global_batch}
    assert len(keys(batches)) - len(EXAMPLES) == order.num_fillers
    assert order.steps_per_epoch == sum(-(-count // global_batch) for count in (13, 5, 1))


@pytest.mark.parametrize("global_batch", [2, 4, 7, 32])
def test_a_batch_is_of_one_bucket(global_batch: int) -> None:
    for batch in epoch_of(BatchOrder(EXAMPLES, global_batch, seed=3), 0):
        assert len({visit.example.bucket for visit in batch}) == 1


def test_fillers_are_shared_out_before_any_comes_twice() -> None:
    examples = make_examples({SQUARE: 5})
    counts = Counter(keys(epoch_of(BatchOrder(examples, 8, seed=0), 0)))
    assert sorted(counts.values()) == [1, 1, 2, 2, 2]
    counts = Counter(keys(epoch_of(BatchOrder(examples, 64, seed=0), 0)))
    assert set(counts.values()) == {12, 13}


def test_fillers_are_other_examples_in_other_epochs() -> None:
    order = BatchOrder(make_examples({SQUARE: 13}), 8, seed=0)
    repeated = []
    for epoch in range(4):
        counts = Counter(keys(epoch_of(order, epoch)))
        repeated.append({key for key, count in counts.items() if count > 1})
    assert len({frozenset(names) for names in repeated}) > 1


def test_order_changes_with_every_epoch() -> None:
    order = BatchOrder(EXAMPLES, 4, seed=3)
    epochs = [epoch_of(order, epoch) for epoch in range(4)]
    assert len({tuple(keys(batches)) for batches in epochs}) == 4
    company = [{frozenset(keys([batch])) for batch in batches} for batches in epochs]
    assert all(before != after for before, after in pairwise(company))


def test_buckets_come_in_another_order_in_every_epoch() -> None:
    order = BatchOrder(EXAMPLES, 2, seed=3)
    shapes = [tuple(batch[0].example.bucket for batch in epoch_of(order, epoch)) for epoch in range(4)]
    assert len(set(shapes)) == 4


def test_order_is_a_function_of_seed_and_step() -> None:
    straight = BatchOrder(EXAMPLES, 4, seed=3)
    wanted = [straight.global_batch(step) for step in range(20)]
    jumping = BatchOrder(EXAMPLES, 4, seed=3)
    for step in (17, 2, 9, 0, 19, 5):
        assert jumping.global_batch(step) == wanted[step]
    assert [BatchOrder(EXAMPLES, 4, seed=4).global_batch(step) for step in range(20)] != wanted


def test_order_does_not_depend_on_the_order_of_buckets() -> None:
    """Examples of one bucket keep their order; a new folder of another shape does not reshuffle it."""
    again = sorted(EXAMPLES, key=lambda example: example.bucket != TALL)
    first, second = BatchOrder(EXAMPLES, 4, seed=3), BatchOrder(again, 4, seed=3)
    assert [first.global_batch(step) for step in range(8)] == [second.global_batch(step) for step in range(8)]


@pytest.mark.parametrize("global_batch", [1, 4, 7])
def test_repeats_are_shown_as_often_as_asked_for(global_batch: int) -> None:
    examples = make_examples({SQUARE: 6}, repeats=3)
    order = BatchOrder(examples, global_batch, seed=1)
    counts = Counter(keys(epoch_of(order, 0)))
    assert min(counts.values()) >= 3
    assert sum(counts.values()) == 18 + order.num_fillers


@pytest.mark.parametrize("repeats", [1, 3])
def test_no_two_visits_of_an_epoch_are_the_same(repeats: int) -> None:
    """Else a repeat would be shown with the noise and time it had before."""
    batches = epoch_of(BatchOrder(make_examples({SQUARE: 5, TALL: 1}, repeats), 8, seed=0), 2)
    visits = [(visit.example.key, visit.epoch, visit.occurrence) for batch in batches for visit in batch]
    assert len(set(visits)) == len(visits)
    assert {epoch for _, epoch, _ in visits} == {2}
    for key, count in Counter(key for key, _, _ in visits).items():
        assert sorted(occurrence for name, _, occurrence in visits if name == key) == list(range(count))


def test_an_example_of_many_repeats_keeps_its_share() -> None:
    examples = make_examples({SQUARE: 4}) + [
        Example("1/often.png@32", Path("often.png"), "often", crop_box(40, 40, SQUARE), 8),
    ]
    counts = Counter(keys(epoch_of(BatchOrder(examples, 4, seed=0), 0)))
    assert counts["1/often.png@32"] == 8


def test_first_step_of_an_epoch_follows_the_last_of_the_one_before() -> None:
    order = BatchOrder(EXAMPLES, 4, seed=3)
    last = order.steps_per_epoch
    assert {visit.epoch for visit in order.global_batch(last - 1)} == {0}
    assert {visit.epoch for visit in order.global_batch(last)} == {1}


def test_no_examples_are_refused() -> None:
    with pytest.raises(ValueError, match="no examples"):
        BatchOrder([], 4, seed=0)
