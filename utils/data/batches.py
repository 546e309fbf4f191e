"""The order in which examples are trained on: a pure function of (seed, step), so a position is one integer.

An epoch goes through every example. Each bucket is shuffled and filled up, with examples of its own, to whole global
batches: nothing is ever dropped. Then the global batches of all buckets are shuffled. One global batch is of one bucket.

A bucket's *slots* are its examples, each as often as its directory says. Of 2.5 repeats, half of the examples have a third
slot; which, moves on from epoch to epoch, so that after two epochs each has had one. An epoch's order is a permutation of
slots, made when its first step is asked for; a step then looks up its own few.
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
    """One showing of an example; the key of everything drawn for it."""

    example: Example
    epoch: int
    occurrence: int
    """Which of the example's showings in this epoch it is: each has another number, above 0 for repeats and fillers."""


@dataclass(frozen=True)
class _Share:
    """Examples of one bucket with equal repeats."""

    members: np.ndarray
    """Their places in the table."""
    repeats: float
    order: np.ndarray
    """Of the members; those that are shown once more come one after the other in it."""

    @property
    def num_extra(self) -> int:
        """Members that have one slot more than the others: as many in each epoch, and one at least if others have none."""
        part = self.repeats - math.floor(self.repeats)
        return max(round(part * len(self.members)), 1 if self.repeats < 1 else 0)

    @property
    def num_slots(self) -> int:
        return math.floor(self.repeats) * len(self.members) + self.num_extra

    def look_up(self, slot: int, epoch: int) -> tuple[int, int]:
        """(Place in the table, which of its slots in this epoch it is)."""
        count = len(self.members)
        copy, member = divmod(slot, count)
        if copy == math.floor(self.repeats):  # one of the extra ones
            member = int(self.order[(epoch * self.num_extra + member) % count])
        return int(self.members[member]), copy


class _BucketSlots:
    """The slots of one bucket."""

    def __init__(self, bucket: Bucket, shares: list[_Share]) -> None:
        self.bucket, self.shares = bucket, shares
        self.num_slots = sum(share.num_slots for share in shares)
        self._copies = 1 + math.floor(max(share.repeats for share in shares))

    def look_up(self, slot: int, round_number: int, epoch: int) -> tuple[int, int]:
        """(Place in the table, occurrence) of a slot that is shown for the time `round_number`, counted from 0."""
        for share in self.shares:
            if slot < share.num_slots:
                place, copy = share.look_up(slot, epoch)
                return place, copy + round_number * self._copies
            slot -= share.num_slots
        raise IndexError(slot)


class BatchOrder:
    """Global batch after global batch, for ever."""

    def __init__(self, examples: ExampleTable, global_batch: int, seed: int) -> None:
        if not len(examples):
            raise ValueError("no examples")
        self._examples, self._global_batch, self._seed = examples, global_batch, seed
        self._epoch = -1
        self._slots: list[np.ndarray] = []
        """Of each bucket, its slots in this epoch's order, fillers included."""
        self._batches = np.zeros((0, 2), np.int32)
        """(bucket, number of its batch) of each step of the epoch."""

    @cached_property
    def _buckets(self) -> list[_BucketSlots]:
        table, repeats = self._examples, self._examples.repeats
        buckets = []
        for bucket, number in sorted((bucket, number) for number, bucket in enumerate(table.buckets)):
            members = np.flatnonzero(table.rows[:, 2] == number).astype(np.int32)
            shares = [
                _Share(chosen, float(value), self._order_of_extra(bucket, float(value), len(chosen)))
                for value in np.unique(repeats[members])
                for chosen in [members[repeats[members] == value]]
            ]
            if shares:
                buckets.append(_BucketSlots(bucket, shares))
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
        """Showings in each epoch that are there only to fill the last batch of a bucket."""
        return self.steps_per_epoch * self._global_batch - sum(slots.num_slots for slots in self._buckets)

    def bucket_showings(self) -> dict[Bucket, tuple[int, int]]:
        """Bucket -> (showings in an epoch, those among them that are fillers)."""
        shown = {slots.bucket: self._num_batches(slots) * self._global_batch for slots in self._buckets}
        return {slots.bucket: (shown[slots.bucket], shown[slots.bucket] - slots.num_slots) for slots in self._buckets}

    def global_batch(self, step: int) -> list[SampleDraw]:
        """The draws of one optimizer step (counted from 0), in their order."""
        epoch, index = divmod(step, self.steps_per_epoch)
        if epoch != self._epoch:
            self._epoch, self._slots, self._batches = epoch, *self._arrange(epoch)
        number, batch = self._batches[index].tolist()
        slots, start = self._buckets[number], batch * self._global_batch
        draws = []
        for position, slot in enumerate(self._slots[number][start : start + self._global_batch].tolist(), start=start):
            place, occurrence = slots.look_up(slot, position // slots.num_slots, epoch)
            draws.append(SampleDraw(self._examples[place], epoch, occurrence))
        return draws

    def _arrange(self, epoch: int) -> tuple[list[np.ndarray], np.ndarray]:
        """(Slots of each bucket in their order, (bucket, batch) of each step)."""
        orders = [np.concatenate(list(self._rounds(epoch, slots))) for slots in self._buckets]
        counts = [self._num_batches(slots) for slots in self._buckets]
        batches = np.concatenate(
            [np.stack([np.full(count, number), np.arange(count)], axis=1) for number, count in enumerate(counts)]
        )
        return orders, batches.astype(np.int32)[self._permutation("batch order", epoch, length=len(batches))]

    def _rounds(self, epoch: int, slots: _BucketSlots) -> Iterator[np.ndarray]:
        """The bucket shuffled, then shuffled again as often as it takes to fill whole global batches."""
        wanted = self._num_batches(slots) * self._global_batch
        round_number = 0
        while wanted > 0:
            key = ("example order", epoch, str(slots.bucket), round_number)
            order = self._permutation(*key, length=slots.num_slots)[:wanted]
            yield order
            wanted -= len(order)
            round_number += 1
