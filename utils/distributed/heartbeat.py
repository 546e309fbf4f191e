"""Heartbeats: every rank increments a counter in the group's store, and a counter that stops marks a dead rank.

Launchers end the other processes when one dies, but not every launcher does, and a rank on another machine may be
unreachable. Heartbeats let a waiting rank tell a slow rank from a dead one.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Iterable

import torch.distributed as dist

HEARTBEAT_SECONDS = 2.0
"""Interval between two increments."""
DEAD_AFTER_SECONDS = 120.0
"""A rank without a heartbeat for this long counts as dead."""


class RankDied(RuntimeError):
    """Another process of the group has ended or is unreachable."""


class Heartbeat(threading.Thread):
    """Increments the counter of this rank until it is stopped. `store` must be a connection of its own."""

    def __init__(self, rank: int, store: dist.Store) -> None:
        super().__init__(name="heartbeat", daemon=True)
        self._rank, self._store = rank, store
        self._stopped = threading.Event()

    def run(self) -> None:
        with contextlib.suppress(RuntimeError, dist.DistError):  # rank 0, which holds the store, has ended
            while not self._stopped.wait(HEARTBEAT_SECONDS):
                self._store.add(_key(self._rank), 1)

    def stop(self) -> None:
        self._stopped.set()
        self.join()


class HeartbeatMonitor:
    """Detects dead ranks by counters that have stopped."""

    def __init__(self, store: dist.Store) -> None:
        self._store = store
        self._last: dict[int, tuple[int, float]] = {}
        """Rank -> (count, when the count was first read)."""

    def check(self, ranks: Iterable[int]) -> None:
        """Raises RankDied for a rank whose counter has not changed for DEAD_AFTER_SECONDS. To be called repeatedly."""
        for rank in ranks:
            count, now = self._store.add(_key(rank), 0), time.monotonic()
            last_count, since = self._last.get(rank, (-1, now))
            if count != last_count:
                self._last[rank] = count, now
            elif now - since > DEAD_AFTER_SECONDS:
                raise RankDied(f"rank {rank} has died: no heartbeat for {DEAD_AFTER_SECONDS:.0f} s")


def _key(rank: int) -> str:
    return f"heartbeat/{rank}"
