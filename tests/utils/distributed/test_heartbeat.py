"""Heartbeats: a rank whose counter stops is detected, a slow rank is not."""

from __future__ import annotations

import time

import pytest
import torch.distributed as dist

from utils.distributed import heartbeat
from utils.distributed.heartbeat import DEAD_AFTER_SECONDS, Heartbeat, HeartbeatMonitor, RankDied

WAIT_SECONDS = 10.0


class Clock:
    """Replaces time.monotonic."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.seconds = 1000.0
        monkeypatch.setattr(heartbeat.time, "monotonic", lambda: self.seconds)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    return Clock(monkeypatch)


def beat(store: dist.Store, rank: int) -> None:
    store.add(f"heartbeat/{rank}", 1)


def test_a_rank_whose_counter_stops_is_dead(clock: Clock) -> None:
    store = dist.HashStore()
    monitor = HeartbeatMonitor(store)
    beat(store, 1)
    beat(store, 2)
    monitor.check([1, 2])
    clock.seconds += DEAD_AFTER_SECONDS
    beat(store, 1)
    monitor.check([1, 2])
    clock.seconds += 1
    monitor.check([1])
    with pytest.raises(RankDied, match="rank 2 has died: no heartbeat for 120 s"):
        monitor.check([1, 2])


def test_a_rank_without_any_heartbeat_is_dead_after_the_same_time(clock: Clock) -> None:
    monitor = HeartbeatMonitor(dist.HashStore())
    monitor.check([1])
    clock.seconds += DEAD_AFTER_SECONDS
    monitor.check([1])
    clock.seconds += 1
    with pytest.raises(RankDied, match="rank 1"):
        monitor.check([1])


def test_a_slow_rank_with_heartbeats_is_never_dead(clock: Clock) -> None:
    store = dist.HashStore()
    monitor = HeartbeatMonitor(store)
    for _ in range(100):
        beat(store, 1)
        monitor.check([1])
        clock.seconds += DEAD_AFTER_SECONDS / 2


def test_the_heartbeat_thread_increments_until_it_is_stopped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(heartbeat, "HEARTBEAT_SECONDS", 0.001)
    store = dist.HashStore()
    thread = Heartbeat(3, store)
    thread.start()
    deadline = time.monotonic() + WAIT_SECONDS
    while store.add("heartbeat/3", 0) < 3:
        assert time.monotonic() < deadline
        time.sleep(0.001)
    thread.stop()
    assert not thread.is_alive()
    count = store.add("heartbeat/3", 0)
    time.sleep(0.02)
    assert store.add("heartbeat/3", 0) == count
