"""The order in which examples are trained on: a pure function of (seed, step), so a position is one integer.

An epoch goes through every example. Each bucket is shuffled and filled up, with examples of its own, to whole global
batches: nothing is ever dropped. Then the global batches of all buckets are shuffled. One global batch is of one bucket.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from utils import randomness
from utils.data.buckets import Bucket
from utils.data.dataset import Example


@dataclass(frozen=True, slots=True)
class Visit:
    """One showing of an example; the key of everything drawn for it."""

    example: Example
    epoch: int
    occurrence: int
    """How often the example had been shown before in this epoch: above 0 for repeats and fillers."""


class BatchOrder:
    """Global batch after global batch, for ever."""

    def __init__(self, examples: Sequence[Example], global_batch: int, seed: int) -> None:
        if not examples:
            raise ValueError("no examples")
        self._examples = list(examples)
        self._global_batch = global_batch
        self._seed = seed
        self._epoch = -1
        self._batches: list[list[Visit]] = []

    @cached_property
    def _buckets(self) -> dict[Bucket, list[Example]]:
        """Bucket -> its examples, each as often as its directory says."""
        buckets: dict[Bucket, list[Example]] = {}
        for example in self._examples:
            buckets.setdefault(example.bucket, []).extend([example] * example.repeats)
        return dict(sorted(buckets.items()))

    @cached_property
    def steps_per_epoch(self) -> int:
        return sum(math.ceil(len(members) / self._global_batch) for members in self._buckets.values())

    @property
    def num_fillers(self) -> int:
        """Examples shown once more in each epoch, to fill the last batch of a bucket."""
        shown = sum(len(members) for members in self._buckets.values())
        return self.steps_per_epoch * self._global_batch - shown

    def global_batch(self, step: int) -> list[Visit]:
        """The visits of one optimizer step (counted from 0), in their order."""
        epoch, index = divmod(step, self.steps_per_epoch)
        if epoch != self._epoch:
            self._epoch, self._batches = epoch, self._arrange(epoch)
        return self._batches[index]

    def _arrange(self, epoch: int) -> list[list[Visit]]:
        batches = []
        for bucket, members in self._buckets.items():
            visits = self._fill(epoch, bucket, members)
            size = self._global_batch
            batches += [visits[start : start + size] for start in range(0, len(visits), size)]
        order = randomness.permutation(self._seed, "batch order", epoch, length=len(batches))
        return [batches[index] for index in order]

    def _fill(self, epoch: int, bucket: Bucket, members: Sequence[Example]) -> list[Visit]:
        """The bucket shuffled, then shuffled again as often as it takes to fill whole global batches."""
        wanted = math.ceil(len(members) / self._global_batch) * self._global_batch
        visits: list[Visit] = []
        occurrences: dict[str, int] = {}
        round_number = 0
        while len(visits) < wanted:
            order = randomness.permutation(
                self._seed, "example order", epoch, str(bucket), round_number, length=len(members)
            )
            for index in order[: wanted - len(visits)]:
                example = members[index]
                occurrence = occurrences.get(example.key, 0)
                occurrences[example.key] = occurrence + 1
                visits.append(Visit(example, epoch, occurrence))
            round_number += 1
        return visits
