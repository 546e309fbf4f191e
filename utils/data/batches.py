"""The order of training examples: a pure function of (seed, step), so resuming requires only the step.

An epoch contains every example. Each bucket is shuffled and padded with repeats of its own examples to whole global batches,
so no example is dropped. The global batches of all buckets are then shuffled. All examples of a global batch belong to one
bucket.

The *slots* of a bucket are its examples, each repeated as its directory's `num_repeats` specifies. With 2.5 repeats, half of
the examples have a third slot; these examples change from epoch to epoch, so that in two epochs each has five slots. The
order of an epoch is a permutation of slots, computed at its first step; each step then looks up the slots of its batch.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from utils import randomness
from utils.data.buckets import Bucket
from utils.data.examples import Example, ExampleTable


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


class BatchOrder:
    """An unlimited sequence of global batches. Raises ValueError for a table without examples."""

    def __init__(self, examples: ExampleTable, global_batch: int, seed: int) -> None:
        if not len(examples):
            raise ValueError("no examples")
        self._examples, self._global_batch, self._seed = examples, global_batch, seed
        self._epoch = -1
        self._slots: list[np.ndarray] = []
        """For each bucket, its slots in the order of this epoch, including repeats that fill the last batch."""
        self._batches = np.zeros((0, 2), np.int32)
        """(bucket, number of its batch) for each step of the epoch."""

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

    def _num_batches(self, slots: _BucketSlots) -> int:
        return math.ceil(slots.num_slots / self._global_batch)

    @cached_property
    def steps_per_epoch(self) -> int:
        return sum(self._num_batches(slots) for slots in self._buckets)

    @property
    def num_fillers(self) -> int:
        """Number of draws per epoch that only fill the last batch of a bucket."""
        return self.steps_per_epoch * self._global_batch - sum(slots.num_slots for slots in self._buckets)

    def bucket_draws(self) -> dict[Bucket, tuple[int, int]]:
        """Returns bucket -> (draws per epoch, number of them that only fill the last batch)."""
        draws = {slots.bucket: self._num_batches(slots) * self._global_batch for slots in self._buckets}
        return {slots.bucket: (draws[slots.bucket], draws[slots.bucket] - slots.num_slots) for slots in self._buckets}

    def global_batch(self, step: int) -> list[SampleDraw]:
        """Returns the draws of one optimizer step, counted from 0."""
        epoch, index = divmod(step, self.steps_per_epoch)
        if epoch != self._epoch:
            self._epoch, self._slots, self._batches = epoch, *self._arrange(epoch)
        number, batch = self._batches[index].tolist()
        slots, start = self._buckets[number], batch * self._global_batch
        draws = []
        for position, slot in enumerate(self._slots[number][start : start + self._global_batch].tolist(), start=start):
            row, occurrence = slots.look_up(slot, position // slots.num_slots, epoch)
            draws.append(SampleDraw(self._examples[row], epoch, occurrence))
        return draws

    def _arrange(self, epoch: int) -> tuple[list[np.ndarray], np.ndarray]:
        """Returns (for each bucket its slots in order, (bucket, batch) for each step)."""
        orders = [np.concatenate(list(self._rounds(epoch, slots))) for slots in self._buckets]
        counts = [self._num_batches(slots) for slots in self._buckets]
        batches = np.concatenate(
            [np.stack([np.full(count, number), np.arange(count)], axis=1) for number, count in enumerate(counts)]
        )
        return orders, batches.astype(np.int32)[self._permutation("batch order", epoch, length=len(batches))]

    def _rounds(self, epoch: int, slots: _BucketSlots) -> Iterator[np.ndarray]:
        """Yields permutations of the bucket's slots, the last one truncated, that fill whole global batches."""
        wanted = self._num_batches(slots) * self._global_batch
        round_number = 0
        while wanted > 0:
            key = ("example order", epoch, str(slots.bucket), round_number)
            order = self._permutation(*key, length=slots.num_slots)[:wanted]
            yield order
            wanted -= len(order)
            round_number += 1
