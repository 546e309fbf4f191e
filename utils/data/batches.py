"""The order of training examples: a pure function of (seed, step), so resuming requires only the step.

A global batch consists of groups; all examples of a group belong to one bucket. An epoch contains every example: each bucket
is shuffled and padded with repeats of its own examples to whole groups, so no example is dropped. The groups of all buckets
are then shuffled and divided among the steps. Inside a step the groups with larger images come first, so that its memory
peaks early. Layouts with groups of equal size have the same steps.

Extra groups complete the last step of an epoch. They belong to the buckets whose examples are repeated least, in turn, so
that over many epochs all examples of these buckets are drawn equally often. If a group is a whole global batch, there are no
extra groups.

The *slots* of a bucket are its examples, each repeated as its directory's `num_repeats` specifies. With 2.5 repeats, half of
the examples have a third slot; these examples change from epoch to epoch, so that in two epochs each has five slots. The
order of an epoch is a permutation of slots, computed at its first step; each step then looks up the slots of its batch.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np

from utils import randomness
from utils.data.buckets import Bucket
from utils.data.examples import Example, ExampleTable

_GOLDEN_RATIO = (math.sqrt(5) - 1) / 2
"""The fractional parts of its multiples cover [0, 1) evenly."""
_DECIMALS = 6
"""Means over epochs are rounded, so that sums that are whole numbers are exactly whole."""


def group_sizes(micro_batch_size: int, num_micro_batches: int, num_replicas: int) -> list[int]:
    """The possible group sizes of a layout, ascending: whole micro-batches of all replicas that divide the global batch."""
    each = micro_batch_size * num_replicas
    return [each * count for count in range(1, num_micro_batches + 1) if num_micro_batches % count == 0]


@dataclass(frozen=True, slots=True)
class SampleDraw:
    """One use of an example in training; its fields are the key of all random numbers drawn for it."""

    example: Example
    epoch: int
    occurrence: int
    """Distinguishes the draws of the example within an epoch; above 0 for repeats."""


@dataclass(frozen=True)
class _RepeatGroup:
    """The examples of one bucket that have the same number of repeats."""

    members: np.ndarray
    """Their rows in the table."""
    repeats: float
    order: np.ndarray
    """A permutation of the members. The members with an extra slot are consecutive in it."""

    @property
    def num_extra(self) -> int:
        """Number of members with an extra slot, equal in all epochs; at least 1 if the other members have none."""
        fraction = self.repeats - math.floor(self.repeats)
        return max(round(fraction * len(self.members)), 1 if self.repeats < 1 else 0)

    @property
    def num_slots(self) -> int:
        return math.floor(self.repeats) * len(self.members) + self.num_extra

    def look_up(self, slot: int, epoch: int) -> tuple[int, int]:
        """Returns (row in the table, number of the slot among the slots of the row)."""
        count = len(self.members)
        copy, member = divmod(slot, count)
        if copy == math.floor(self.repeats):  # an extra slot
            member = int(self.order[(epoch * self.num_extra + member) % count])
        return int(self.members[member]), copy


class _BucketSlots:
    """The slots of one bucket, group after group."""

    def __init__(self, bucket: Bucket, groups: list[_RepeatGroup]) -> None:
        self.bucket, self.groups = bucket, groups
        self.num_slots = sum(group.num_slots for group in groups)
        self._copies = 1 + math.floor(max(group.repeats for group in groups))

    def look_up(self, slot: int, round_number: int, epoch: int) -> tuple[int, int]:
        """Returns (row in the table, occurrence) of a slot in its use number `round_number` of the epoch, counted from 0."""
        for group in self.groups:
            if slot < group.num_slots:
                row, copy = group.look_up(slot, epoch)
                return row, copy + round_number * self._copies
            slot -= group.num_slots
        raise IndexError(slot)


class EpochDraws(NamedTuple):
    """How often the examples of one bucket, or of all, are drawn in an epoch, as a mean over epochs."""

    draws: float
    fillers: float
    """Draws that only fill groups, beyond those that `num_repeats` specifies."""

    @property
    def factor(self) -> float:
        """Draws relative to those that `num_repeats` specifies."""
        return self.draws / (self.draws - self.fillers)

    def __str__(self) -> str:
        digits = 0 if self.fillers == round(self.fillers) else 1
        repeated = f" ({self.fillers:,.{digits}f} repeated, {self.factor:.2f}x)" if self.fillers else ""
        return f"{self.draws:,.{digits}f}{repeated}"


class BatchOrder:
    """An unlimited sequence of global batches. Raises ValueError for a table without examples."""

    def __init__(self, examples: ExampleTable, global_batch: int, seed: int, bucket_group: int | None = None) -> None:
        """`bucket_group`: the size of a group, which divides the global batch; None: the whole global batch."""
        if not len(examples):
            raise ValueError("no examples")
        self._examples, self._global_batch, self._seed = examples, global_batch, seed
        self._group = bucket_group or global_batch
        self._groups_per_step, rest = divmod(global_batch, self._group)
        assert not rest, f"groups of {self._group} in a global batch of {global_batch}"
        self._epoch = -1
        self._slots: list[np.ndarray] = []
        """For each bucket, its slots in the order of this epoch, including repeats that fill groups."""
        self._groups = np.zeros((0, 2), np.int32)
        """(bucket, number of its group) for each group of the epoch, step after step."""

    @cached_property
    def _buckets(self) -> list[_BucketSlots]:
        table, repeats = self._examples, self._examples.repeats
        buckets = []
        for bucket, number in sorted((bucket, number) for number, bucket in enumerate(table.buckets)):
            members = np.flatnonzero(table.rows[:, 2] == number).astype(np.int32)
            groups = [
                _RepeatGroup(chosen, float(value), self._order_of_extra(bucket, float(value), len(chosen)))
                for value in np.unique(repeats[members])
                for chosen in [members[repeats[members] == value]]
            ]
            if groups:
                buckets.append(_BucketSlots(bucket, groups))
        return buckets

    def _order_of_extra(self, bucket: Bucket, repeats: float, count: int) -> np.ndarray:
        if repeats == math.floor(repeats):
            return np.zeros(0, np.int32)
        return self._permutation("extra showings", str(bucket), str(repeats), length=count)

    def _permutation(self, purpose: str, *key: str | int, length: int) -> np.ndarray:
        return randomness.permutation(self._seed, purpose, *key, length=length).astype(np.int32)

    @cached_property
    def _num_slots(self) -> np.ndarray:
        return np.array([slots.num_slots for slots in self._buckets], np.int64)

    @cached_property
    def _num_groups(self) -> np.ndarray:
        """For each bucket, the fewest groups that hold all of its slots."""
        return -(-self._num_slots // self._group)

    @cached_property
    def steps_per_epoch(self) -> int:
        return math.ceil(int(self._num_groups.sum()) / self._groups_per_step)

    @property
    def num_fillers(self) -> int:
        """Number of draws per epoch that only fill groups."""
        return self.steps_per_epoch * self._global_batch - int(self._num_slots.sum())

    def epoch_draws(self) -> EpochDraws:
        """Returns the draws per epoch of all examples."""
        return EpochDraws(self.steps_per_epoch * self._global_batch, self.num_fillers)

    def bucket_draws(self) -> dict[Bucket, EpochDraws]:
        """Returns the draws per epoch of each bucket."""
        draws = ((self._num_groups + self._mean_extra_groups) * self._group).round(_DECIMALS).tolist()
        return {
            slots.bucket: EpochDraws(count, count - slots.num_slots)
            for slots, count in zip(self._buckets, draws, strict=True)
        }

    # --- extra groups --------------------------------------------------------------------------------------------------

    @cached_property
    def _mean_extra_groups(self) -> np.ndarray:
        """For each bucket, the groups per epoch that only fill the last step, as a mean over epochs.

        They raise the number of groups per slot of the buckets where it is lowest, to one common level.
        """
        num_extra = self.steps_per_epoch * self._groups_per_step - int(self._num_groups.sum())
        ratios = self._num_groups / self._num_slots
        order = np.argsort(ratios, kind="stable")
        levels = (np.cumsum(self._num_groups[order]) + num_extra) / np.cumsum(self._num_slots[order])
        # The lowest buckets, as many as are below the level that they reach together.
        level = levels[np.flatnonzero(ratios[order] <= levels)[-1]]
        return np.maximum(level * self._num_slots - self._num_groups, 0.0)

    def _extra_groups(self, epoch: int) -> np.ndarray:
        """For each bucket, its extra groups in this epoch: the mean rounded up or down, so that the sum is the same."""
        ends = np.cumsum(self._mean_extra_groups).round(_DECIMALS)
        offset = (randomness.fraction(self._seed, "extra groups") + epoch * _GOLDEN_RATIO) % 1.0
        return np.diff(np.floor(np.append(0.0, ends) + offset)).astype(np.int64)

    # --- steps ---------------------------------------------------------------------------------------------------------

    def global_batch(self, step: int) -> list[SampleDraw]:
        """Returns the draws of one optimizer step, counted from 0."""
        epoch, index = divmod(step, self.steps_per_epoch)
        if epoch != self._epoch:
            self._epoch, self._slots, self._groups = epoch, *self._arrange(epoch)
        groups = self._groups[index * self._groups_per_step :][: self._groups_per_step]
        return [draw for number, place in groups.tolist() for draw in self._draws(number, place * self._group)]

    def _draws(self, number: int, start: int) -> Iterator[SampleDraw]:
        """Yields the draws of a group: those of a bucket from a position on."""
        slots = self._buckets[number]
        for position, slot in enumerate(self._slots[number][start : start + self._group].tolist(), start=start):
            row, occurrence = slots.look_up(slot, position // slots.num_slots, self._epoch)
            yield SampleDraw(self._examples[row], self._epoch, occurrence)

    def _arrange(self, epoch: int) -> tuple[list[np.ndarray], np.ndarray]:
        """Returns (for each bucket its slots in order, (bucket, number of its group) for each group)."""
        counts = (self._num_groups + self._extra_groups(epoch)).tolist()
        orders = [
            np.concatenate(list(self._rounds(epoch, slots, count * self._group)))
            for slots, count in zip(self._buckets, counts, strict=True)
        ]
        groups = np.concatenate(
            [np.stack([np.full(count, number), np.arange(count)], axis=1) for number, count in enumerate(counts)]
        ).astype(np.int32)
        groups = groups[self._permutation("batch order", epoch, length=len(groups))]
        steps = np.arange(len(groups)) // self._groups_per_step
        return orders, groups[np.lexsort((self._size_order[groups[:, 0]], steps))]

    @cached_property
    def _size_order(self) -> np.ndarray:
        """For each bucket, its place in the order from the largest images to the smallest."""
        sizes = [(-slots.bucket.width * slots.bucket.height, slots.bucket) for slots in self._buckets]
        return np.argsort(sorted(range(len(sizes)), key=lambda number: sizes[number]))

    def _rounds(self, epoch: int, slots: _BucketSlots, wanted: int) -> Iterator[np.ndarray]:
        """Yields permutations of the bucket's slots, the last one truncated, with `wanted` slots in all."""
        round_number = 0
        while wanted > 0:
            key = ("example order", epoch, str(slots.bucket), round_number)
            order = self._permutation(*key, length=slots.num_slots)[:wanted]
            yield order
            wanted -= len(order)
            round_number += 1
