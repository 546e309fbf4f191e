"""The order of examples contains every example and depends on seed and step only."""

from __future__ import annotations

import hashlib
import random
from collections import Counter
from dataclasses import replace
from itertools import pairwise

import pytest

from tests.utils.data.tables import DIRECTORY, images_of, table_of
from utils.data import batches as batches_module
from utils.data.batches import BatchOrder, SampleDraw, group_sizes
from utils.data.buckets import Bucket
from utils.data.examples import Example, ExampleTable, empty_table

SQUARE, WIDE, TALL = Bucket(32, 32), Bucket(48, 16), Bucket(16, 48)


def make_examples(counts: dict[Bucket, int], repeats: float = 1) -> ExampleTable:
    return table_of(images_of(counts, replace(DIRECTORY, repeats=repeats)))


COUNTS = {SQUARE: 13, WIDE: 5, TALL: 1}
EXAMPLES = make_examples(COUNTS)


def epoch_of(order: BatchOrder, epoch: int) -> list[list[SampleDraw]]:
    start = epoch * order.steps_per_epoch
    return [order.global_batch(step) for step in range(start, start + order.steps_per_epoch)]


def keys(batches: list[list[SampleDraw]]) -> list[str]:
    return [draw.example.key for batch in batches for draw in batch]


def counts_of(order: BatchOrder, num_epochs: int) -> Counter[str]:
    """Returns how often each example occurs in the first epochs."""
    return Counter(key for epoch in range(num_epochs) for key in keys(epoch_of(order, epoch)))


@pytest.mark.parametrize("global_batch", [1, 2, 4, 7, 32])
@pytest.mark.parametrize("epoch", [0, 1, 5])
def test_every_example_occurs_in_every_epoch(global_batch: int, epoch: int) -> None:
    order = BatchOrder(EXAMPLES, global_batch, seed=3)
    assert set(keys(epoch_of(order, epoch))) == {example.key for example in EXAMPLES}


@pytest.mark.parametrize("global_batch", [1, 2, 4, 7, 32])
def test_an_epoch_has_whole_batches_and_num_fillers_extra_draws(global_batch: int) -> None:
    order = BatchOrder(EXAMPLES, global_batch, seed=3)
    batches = epoch_of(order, 0)
    assert {len(batch) for batch in batches} == {global_batch}
    assert len(keys(batches)) - len(EXAMPLES) == order.num_fillers
    assert order.steps_per_epoch == sum(-(-count // global_batch) for count in (13, 5, 1))


@pytest.mark.parametrize("repeats", [1, 2.5])
def test_bucket_draws_counts_the_draws_and_fillers_of_each_bucket(repeats: float) -> None:
    order = BatchOrder(make_examples(COUNTS, repeats), 4, seed=3)
    shown = Counter(draw.example.bucket for batch in epoch_of(order, 1) for draw in batch)
    assert {bucket: count for bucket, (count, _) in order.bucket_draws().items()} == shown
    fillers = {bucket: count for bucket, (_, count) in order.bucket_draws().items()}
    assert sum(fillers.values()) == order.num_fillers
    slots = {1: {SQUARE: 13, WIDE: 5, TALL: 1}, 2.5: {SQUARE: 32, WIDE: 12, TALL: 2}}[repeats]
    assert fillers == {bucket: shown[bucket] - slots[bucket] for bucket in COUNTS}


@pytest.mark.parametrize("global_batch", [2, 4, 7, 32])
def test_all_examples_of_a_batch_belong_to_one_bucket(global_batch: int) -> None:
    for batch in epoch_of(BatchOrder(EXAMPLES, global_batch, seed=3), 0):
        assert len({draw.example.bucket for draw in batch}) == 1


def test_fillers_are_distributed_evenly_over_examples() -> None:
    examples = make_examples({SQUARE: 5})
    counts = Counter(keys(epoch_of(BatchOrder(examples, 8, seed=0), 0)))
    assert sorted(counts.values()) == [1, 1, 2, 2, 2]
    counts = Counter(keys(epoch_of(BatchOrder(examples, 64, seed=0), 0)))
    assert set(counts.values()) == {12, 13}


def test_fillers_differ_between_epochs() -> None:
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
    batch_sets = [{frozenset(keys([batch])) for batch in batches} for batches in epochs]
    assert all(before != after for before, after in pairwise(batch_sets))


def test_the_order_of_buckets_changes_with_every_epoch() -> None:
    order = BatchOrder(EXAMPLES, 2, seed=3)
    shapes = [tuple(batch[0].example.bucket for batch in epoch_of(order, epoch)) for epoch in range(4)]
    assert len(set(shapes)) == 4


@pytest.mark.parametrize("repeats", [1, 2.5])
@pytest.mark.parametrize("group", [1, 2, 4])
def test_order_is_a_function_of_seed_and_step(repeats: float, group: int) -> None:
    examples = make_examples(COUNTS, repeats)
    straight = BatchOrder(examples, 4, 3, group)
    expected = [straight.global_batch(step) for step in range(30)]
    random_access = BatchOrder(examples, 4, 3, group)
    for step in (17, 2, 29, 9, 0, 19, 5):
        assert random_access.global_batch(step) == expected[step]
    assert [BatchOrder(examples, 4, 4, group).global_batch(step) for step in range(30)] != expected


@pytest.mark.parametrize("repeats", [1, 2.5])
@pytest.mark.parametrize("group", [1, 2, 4])
def test_order_does_not_depend_on_the_order_of_buckets(repeats: float, group: int) -> None:
    """A new folder of images for another bucket does not change the order within a bucket."""
    images = images_of(COUNTS, replace(DIRECTORY, repeats=repeats))
    again = sorted(images, key=lambda image: image.bucket != TALL)
    assert again != images
    first, second = BatchOrder(table_of(images), 4, 3, group), BatchOrder(table_of(again), 4, 3, group)
    assert [first.global_batch(step) for step in range(30)] == [second.global_batch(step) for step in range(30)]


def test_an_empty_bucket_does_not_change_the_order() -> None:
    """A table lists all buckets of every resolution, including empty ones."""
    table = table_of(images_of({SQUARE: 3}))
    wider = ExampleTable(
        table.directories, [], [WIDE, *table.buckets], table.images, table.masks, table.controls, table.rows + [0, 0, 1]
    )
    first, second = BatchOrder(table, 2, seed=3), BatchOrder(wider, 2, seed=3)
    assert [first.global_batch(step) for step in range(6)] == [second.global_batch(step) for step in range(6)]


@pytest.mark.parametrize("num_images", [40, 4000])
def test_a_step_constructs_only_the_examples_of_its_batch(monkeypatch: pytest.MonkeyPatch, num_images: int) -> None:
    table = make_examples({SQUARE: num_images, WIDE: 5}, repeats=2.5)
    made: list[int | slice] = []
    real_getitem = ExampleTable.__getitem__

    def count(self: ExampleTable, index: int) -> Example:
        made.append(index)
        return real_getitem(self, index)

    monkeypatch.setattr(ExampleTable, "__getitem__", count)
    monkeypatch.setattr(ExampleTable, "__iter__", None)
    order = BatchOrder(table, 8, seed=0)
    for num_steps, step in enumerate((0, 1, order.steps_per_epoch - 1, order.steps_per_epoch, 0), start=1):
        order.global_batch(step)
        assert len(made) == 8 * num_steps


def test_the_order_of_an_epoch_is_computed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[int] = []
    real_permutation = batches_module.randomness.permutation

    def count(seed: int, purpose: str, *key: str | int, length: int) -> object:
        drawn.append(length)
        return real_permutation(seed, purpose, *key, length=length)

    monkeypatch.setattr(batches_module.randomness, "permutation", count)
    order = BatchOrder(make_examples({SQUARE: 13}), 4, seed=3)
    epoch_of(order, 0)
    assert drawn == [13, 13, 4], "slots of the bucket, fillers, batches"


# --- groups ------------------------------------------------------------------------------------------------------------

CASES = range(20)


def random_table(case: int) -> tuple[ExampleTable, int, int]:
    """(Examples of one to seven buckets, size of a group, global batch)."""
    generator = random.Random(case)
    buckets = generator.sample([Bucket(16 * x, 16 * y) for x in range(1, 5) for y in range(1, 5)], generator.randint(1, 7))
    repeats = generator.choice([1, 1, 0.3, 1.5, 3])
    images = images_of({bucket: generator.randint(1, 30) for bucket in buckets}, replace(DIRECTORY, repeats=repeats))
    images += images_of({buckets[0]: generator.randint(1, 5)}, replace(DIRECTORY, key_prefix="1", repeats=1))
    group = generator.choice([1, 2, 3, 8])
    return table_of(images), group, group * generator.choice([1, 2, 3, 4, 8])


def groups_of(order: BatchOrder, epoch: int, group: int) -> list[list[list[SampleDraw]]]:
    """The groups of each step of an epoch."""
    return [[batch[start : start + group] for start in range(0, len(batch), group)] for batch in epoch_of(order, epoch)]


@pytest.mark.parametrize(("repeats", "digest"), [(1, "0445150d0688a171"), (2.5, "f75a70e328ceed7a")])
@pytest.mark.parametrize("group", [4, None])
def test_groups_of_whole_global_batches_give_the_order_of_earlier_versions(
    repeats: float, digest: str, group: int | None
) -> None:
    """The digests are of commit 4df732d, which had no groups; old runs resume in this order."""
    order = BatchOrder(make_examples(COUNTS, repeats), 4, 3, group)
    draws = [(draw.example.key, draw.epoch, draw.occurrence) for step in range(40) for draw in order.global_batch(step)]
    assert hashlib.sha256(repr(draws).encode()).hexdigest()[:16] == digest


@pytest.mark.parametrize("case", CASES)
def test_an_epoch_of_groups_has_every_example_and_the_fewest_steps(case: int) -> None:
    examples, group, global_batch = random_table(case)
    order = BatchOrder(examples, global_batch, case, group)
    slots = {bucket: round(draws.draws - draws.fillers) for bucket, draws in order.bucket_draws().items()}
    num_groups = sum(-(-count // group) for count in slots.values())
    assert order.steps_per_epoch == -(-num_groups * group // global_batch)
    for epoch in (0, 3):
        batches = epoch_of(order, epoch)
        assert {len(batch) for batch in batches} == {global_batch}
        counts = Counter(draw.example.bucket for batch in batches for draw in batch)
        assert all(counts[bucket] >= slots[bucket] for bucket in slots)
        used = set(keys(batches))
        assert all(example.key in used for example in examples if example.repeats >= 1)
        draws = [(draw.example.key, draw.epoch, draw.occurrence) for batch in batches for draw in batch]
        assert len(set(draws)) == len(draws), "no two draws have the same noise and time"


@pytest.mark.parametrize("case", CASES)
def test_each_group_has_one_bucket_and_larger_images_come_first(case: int) -> None:
    examples, group, global_batch = random_table(case)
    for step in groups_of(BatchOrder(examples, global_batch, case, group), 1, group):
        buckets = [{draw.example.bucket for draw in draws} for draws in step]
        assert all(len(names) == 1 for names in buckets)
        areas = [bucket.width * bucket.height for names in buckets for bucket in names]
        assert areas == sorted(areas, reverse=True)


@pytest.mark.parametrize("case", CASES)
def test_fillers_are_bounded(case: int) -> None:
    """Each bucket fills less than a group and the last step less than a global batch; counts in a bucket differ by 1."""
    examples, group, global_batch = random_table(case)
    order = BatchOrder(examples, global_batch, case, group)
    fillers = order.bucket_draws()
    assert sum(draws.fillers for draws in fillers.values()) == pytest.approx(order.num_fillers)
    assert 0 <= order.num_fillers <= len(fillers) * (group - 1) + global_batch - group
    if set(examples.repeats.tolist()) == {1}:
        shown, counts = counts_of(order, 1), dict[Bucket, list[int]]()
        for example in examples:
            counts.setdefault(example.bucket, []).append(shown[example.key])
        assert all(max(times) - min(times) <= 1 for times in counts.values())


@pytest.mark.parametrize("case", CASES)
def test_extra_groups_are_shared_fairly_over_epochs(case: int) -> None:
    """Only buckets with the lowest factor have any, and each has its mean in every number of epochs, up to two groups."""
    examples, group, global_batch = random_table(case)
    order = BatchOrder(examples, global_batch, case, group)
    means = order.bucket_draws()
    needed = {bucket: -(-round(one.draws - one.fillers) // group) * group for bucket, one in means.items()}
    extended = [bucket for bucket, one in means.items() if one.draws > needed[bucket] + 1e-6]
    lowest = min(one.factor for one in means.values())
    assert all(means[bucket].factor == pytest.approx(lowest) for bucket in extended)
    total: Counter[Bucket] = Counter()
    for epoch in range(12):
        total.update(draw.example.bucket for batch in epoch_of(order, epoch) for draw in batch)
        assert all(abs(total[bucket] - one.draws * (epoch + 1)) <= 2 * group for bucket, one in means.items())


def test_small_groups_repeat_rare_images_less() -> None:
    examples = make_examples({SQUARE: 1479, WIDE: 6})
    factors = {group: BatchOrder(examples, 32, 1, group).bucket_draws()[WIDE].factor for group in (32, 8, 2)}
    assert factors[32] == pytest.approx(32 / 6)
    assert factors[8] == pytest.approx(8 / 6), "the fewest, since every example is in every epoch"
    assert max(BatchOrder(examples, 32, 1, group).epoch_draws().factor for group in (2, 8)) < 1.02
    assert factors[2] < 1.02


def test_draws_are_printed_with_fillers_and_factor() -> None:
    order = BatchOrder(make_examples({SQUARE: 1500, WIDE: 6}), 8, 0, 4)
    assert str(order.epoch_draws()) == "1,512 (6 repeated, 1.00x)"
    assert [str(draws) for draws in order.bucket_draws().values()] == ["1,504 (4 repeated, 1.00x)", "8 (2 repeated, 1.33x)"]
    assert str(BatchOrder(make_examples({SQUARE: 8}), 8, 0, 4).epoch_draws()) == "8"
    shared = BatchOrder(make_examples({SQUARE: 8, WIDE: 8, TALL: 8}), 32, 0, 8).bucket_draws()
    assert {str(draws) for draws in shared.values()} == {"10.7 (2.7 repeated, 1.33x)"}


def test_group_sizes_are_whole_micro_batches_of_all_replicas() -> None:
    assert group_sizes(8, 4, 1) == [8, 16, 32]
    assert group_sizes(1, 6, 2) == [2, 4, 6, 12]
    assert group_sizes(3, 1, 1) == [3]


# --- repeats -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("global_batch", [1, 4, 7])
def test_examples_occur_at_least_num_repeats_times(global_batch: int) -> None:
    examples = make_examples({SQUARE: 6}, repeats=3)
    order = BatchOrder(examples, global_batch, seed=1)
    counts = Counter(keys(epoch_of(order, 0)))
    assert min(counts.values()) >= 3
    assert sum(counts.values()) == 18 + order.num_fillers


def test_with_2_5_repeats_each_example_occurs_5_times_in_2_epochs() -> None:
    order = BatchOrder(make_examples({SQUARE: 6}, repeats=2.5), 1, seed=1)
    assert order.num_fillers == 0
    for epoch in range(4):
        counts = Counter(keys(epoch_of(order, epoch)))
        assert sorted(counts.values()) == [2, 2, 2, 3, 3, 3], "half of the examples occur a third time in each epoch"
    assert set(counts_of(order, 2).values()) == {5}
    assert set(counts_of(order, 4).values()) == {10}


def test_with_0_25_repeats_each_example_occurs_once_in_4_epochs() -> None:
    order = BatchOrder(make_examples({SQUARE: 8}, repeats=0.25), 1, seed=1)
    assert order.steps_per_epoch == 2
    epochs = [set(keys(epoch_of(order, epoch))) for epoch in range(8)]
    assert all(len(names) == 2 for names in epochs)
    assert len(set.union(*epochs[:4])) == len(set.union(*epochs[4:])) == 8
    assert epochs[:4] == epochs[4:]


@pytest.mark.parametrize("repeats", [0.1, 0.25, 0.5, 1, 1.3, 2.5, 2.9])
@pytest.mark.parametrize("count", [1, 2, 3, 7, 16])
def test_epochs_have_equal_length_and_extra_draws_are_distributed_evenly(repeats: float, count: int) -> None:
    order = BatchOrder(make_examples({SQUARE: count}, repeats), 1, seed=5)
    length = order.steps_per_epoch
    extra = length - int(repeats) * count
    assert abs(length - repeats * count) <= 0.5 or extra == 1, "rounded, but at least one"
    for num_epochs in (1, 2, 7, 20):
        counts = counts_of(order, num_epochs)
        assert sum(counts.values()) == num_epochs * length
        shown = [counts[example.key] for example in order._examples]
        assert max(shown) - min(shown) <= 1, "counts of two examples differ by at most one"


def test_the_examples_with_an_extra_draw_depend_on_the_seed() -> None:
    orders = [BatchOrder(make_examples({SQUARE: 16}, repeats=1.5), 1, seed) for seed in range(2)]
    often = [{key for key, count in counts_of(order, 1).items() if count == 2} for order in orders]
    assert often[0] != often[1]
    assert len(often[0]) == len(often[1]) == 8


@pytest.mark.parametrize("repeats", [0.25, 1, 2.5, 3])
@pytest.mark.parametrize("epoch", [0, 1, 2])
def test_no_two_draws_of_an_epoch_are_the_same(repeats: float, epoch: int) -> None:
    """Otherwise a repeat would have the noise and timestep of an earlier draw."""
    images = images_of({SQUARE: 5, TALL: 1}, replace(DIRECTORY, repeats=repeats))
    images += images_of({SQUARE: 3}, replace(DIRECTORY, key_prefix="1", repeats=1.5))
    batches = epoch_of(BatchOrder(table_of(images), 16, seed=0), epoch)
    draws = [(draw.example.key, draw.epoch, draw.occurrence) for batch in batches for draw in batch]
    assert len(set(draws)) == len(draws)
    assert {number for _, number, _ in draws} == {epoch}
    assert max(Counter(key for key, _, _ in draws).values()) > 2, "the epoch has fillers"
    for name in {key for key, _, _ in draws}:
        assert any(occurrence == 0 for key, _, occurrence in draws if key == name) or repeats < 1


def test_an_example_with_many_repeats_has_exactly_that_many_draws() -> None:
    images = images_of({SQUARE: 4}) + images_of({SQUARE: 1}, replace(DIRECTORY, key_prefix="1", repeats=8))
    counts = Counter(keys(epoch_of(BatchOrder(table_of(images), 4, seed=0), 0)))
    assert counts["1/32x32-0.png@32"] == 8
    assert set(counts.values()) == {1, 8}


def test_directories_with_different_repeats_share_a_bucket() -> None:
    images = [
        image
        for number, repeats in enumerate((0.5, 1, 2.5))
        for image in images_of({SQUARE: 4}, replace(DIRECTORY, key_prefix=str(number), repeats=repeats))
    ]
    order = BatchOrder(table_of(images), 2, seed=0)
    assert order.num_fillers == 0
    counts = counts_of(order, 2)
    assert {(key[0], count) for key, count in counts.items()} == {("0", 1), ("1", 2), ("2", 5)}
    assert any(len({key[0] for key in keys([batch])}) > 1 for batch in epoch_of(order, 0)), "and a batch"


# --- boundaries --------------------------------------------------------------------------------------------------------


def test_an_epoch_starts_after_the_last_step_of_the_previous_one() -> None:
    order = BatchOrder(EXAMPLES, 4, seed=3)
    last = order.steps_per_epoch
    assert {draw.epoch for draw in order.global_batch(last - 1)} == {0}
    assert {draw.epoch for draw in order.global_batch(last)} == {1}


def test_a_table_without_examples_is_rejected() -> None:
    with pytest.raises(ValueError, match="no examples"):
        BatchOrder(empty_table(), 4, seed=0)
