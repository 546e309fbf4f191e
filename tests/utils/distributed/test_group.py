"""Barriers with timeouts and the work queue, in one process whose other ranks are threads or absent."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch.distributed as dist

from utils.distributed import group, heartbeat
from utils.distributed.heartbeat import RankDied


@pytest.fixture
def store(monkeypatch: pytest.MonkeyPatch) -> Iterator[dist.Store]:
    """The store of a group of one rank that takes itself for rank 0 of 3."""
    store = dist.HashStore()
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "3")
    yield group._store()
    dist.destroy_process_group()


def arrive(store: dist.Store, name: str, *ranks: int) -> None:
    for rank in ranks:
        store.set(f"wait/{name}/{rank}", "here")


def test_wait_for_all_returns_when_all_ranks_have_arrived(store: dist.Store) -> None:
    arrive(store, "export", 1)
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(group.wait_for_all, "export", 10.0)
        time.sleep(0.1)
        assert not waiting.done()
        arrive(store, "export", 2)
        assert waiting.result(10.0) is None


def test_wait_for_all_names_the_missing_ranks_after_its_timeout(store: dist.Store) -> None:
    arrive(store, "export", 1)
    with pytest.raises(TimeoutError, match=r"rank \[2\] did not reach 'export' within 0 s"):
        group.wait_for_all("export", 0.05)


def test_wait_for_all_detects_a_dead_rank_before_its_timeout(store: dist.Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(heartbeat, "DEAD_AFTER_SECONDS", 0.05)
    arrive(store, "export", 1)
    with pytest.raises(RankDied, match="rank 2 has died"):
        group.wait_for_all("export", 10.0)


def test_the_work_queue_hands_out_each_number_once(store: dist.Store) -> None:
    def work(_: int) -> list[int]:
        return list(group.WorkQueue("encode", 50))

    with ThreadPoolExecutor(4) as pool:
        taken = [number for numbers in pool.map(work, range(4)) for number in numbers]
    assert sorted(taken) == list(range(50))
    assert group.WorkQueue("encode", 50).num_taken() == 50


def test_the_work_queue_counts_what_was_taken(store: dist.Store) -> None:
    queue = group.WorkQueue("encode", 3)
    items = iter(queue)
    assert (queue.num_taken(), next(items), queue.num_taken()) == (0, 0, 1)
    assert (list(items), queue.num_taken()) == ([1, 2], 3)


def test_library_settings_are_set_before_libraries_read_them() -> None:
    """A value that the user has set is kept."""
    code = (
        "import os, utils.distributed.group; print(os.environ['TRANSFORMERS_VERBOSITY'], os.environ['DIFFUSERS_VERBOSITY'])"
    )
    environment = {**os.environ, "DIFFUSERS_VERBOSITY": "info"}
    environment.pop("TRANSFORMERS_VERBOSITY", None)
    run = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert run.stdout.split() == ["error", "info"]
