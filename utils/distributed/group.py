"""The process group: start and end, broadcasts, barriers with timeouts, and a shared work queue.

`start` joins the group through DeepSpeed. Everything else may be called only after it.
"""

from __future__ import annotations

import gc
import logging
import os
import sys
import time
from collections.abc import Iterator
from datetime import timedelta
from typing import Any, NoReturn, TypeVar

import torch
import torch.distributed as dist

import utils.distributed.library_settings  # noqa: F401  before DeepSpeed, which reads the environment when it is imported
from utils.distributed.heartbeat import Heartbeat, HeartbeatMonitor, RankDied
from utils.distributed.world import World, world

T = TypeVar("T")

_SINGLE_PROCESS = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
"""What a launcher would set for a single process; port 0 takes any free port."""

GROUP_TIMEOUT = timedelta(minutes=30)
"""Timeout of collective operations."""
WAIT_SECONDS = 24 * 3600.0
"""Timeout of `wait_for_all`, which surrounds work of unknown length such as encoding a dataset."""
POLL_SECONDS = 0.02

_heartbeats: list[Heartbeat] = []
"""The heartbeat of this process, from `start` to `finish`."""


def start() -> torch.device:
    """Joins the process group and returns this rank's device. Called once, by every rank."""
    here = world()
    for name, value in _SINGLE_PROCESS.items():
        os.environ.setdefault(name, value)
    import deepspeed
    import deepspeed.ops
    from deepspeed.accelerator import get_accelerator
    from deepspeed.utils import logger

    logger.setLevel(logging.WARNING)
    # DeepSpeed 0.19 compiles an operator for CPU-only groups at the start: half a minute, a compiler, and a lock file that
    # blocks every later start if the build is killed. The trainer does not use the operator.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    accelerator = get_accelerator()
    on_cpu = accelerator.device_name() == "cpu"
    if on_cpu:
        _limit_threads(here)
    accelerator.set_device(here.local_rank)
    backend = "gloo" if on_cpu else accelerator.communication_backend_name()
    deepspeed.init_distributed(dist_backend=backend, timeout=GROUP_TIMEOUT, verbose=False)
    _heartbeats.append(Heartbeat(here.rank, _cloned_store()))
    _heartbeats[-1].start()
    return torch.device("cpu" if on_cpu else accelerator.device_name(here.local_rank))


def _limit_threads(here: World) -> None:
    """Divides the CPU cores among this machine's processes: processes that each use all cores take twice as long."""
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // here.local_size))


def broadcast(value: T, source: int = 0) -> T:
    """Returns the source rank's value on every rank. The argument of the other ranks is ignored."""
    buffer = [value]
    dist.broadcast_object_list(buffer, src=source)
    return buffer[0]


def gather(value: T) -> list[T]:
    """Returns every rank's value, in rank order, on every rank."""
    buffer: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(buffer, value)
    return buffer


def _store() -> dist.Store:
    return dist.distributed_c10d._get_default_store()


def _cloned_store() -> dist.Store:
    """A new connection to the store, for use by another thread."""
    store: Any = _store()
    clone: dist.Store = store.clone()
    return clone


def wait_for_all(name: str, seconds: float = WAIT_SECONDS) -> None:
    """Returns when every rank has called it with this name; each name may be used once.

    Raises TimeoutError, naming the missing ranks, after `seconds`, and RankDied when a missing rank has died.
    """
    here, store = world(), _store()
    deadline = time.monotonic() + seconds
    heartbeats = HeartbeatMonitor(store)
    missing = [rank for rank in range(here.size) if rank != here.rank]
    try:
        store.set(f"wait/{name}/{here.rank}", "here")
        while missing := [rank for rank in missing if not store.check([f"wait/{name}/{rank}"])]:
            if time.monotonic() > deadline:
                raise TimeoutError(f"rank {missing} did not reach '{name}' within {seconds:.0f} s")
            heartbeats.check(missing)
            time.sleep(POLL_SECONDS)  # store.wait would log a warning at each timeout
    except dist.DistNetworkError:  # the store is in the process of rank 0
        raise RankDied("rank 0 has ended") from None


class WorkQueue:
    """Distributes the numbers 0 to num_items - 1 over the ranks, each number once. Each name may be used once."""

    def __init__(self, name: str, num_items: int) -> None:
        self._key = f"queue/{name}"
        self._num_items = num_items

    def __iter__(self) -> Iterator[int]:
        store = _store()
        while (item := store.add(self._key, 1) - 1) < self._num_items:
            yield item

    def num_taken(self) -> int:
        """Returns how many items all ranks together have taken so far."""
        return min(self._num_items, _store().add(self._key, 0))


def free_memory() -> None:
    """Returns the memory of released tensors from PyTorch's allocator to the accelerator."""
    gc.collect()
    if torch.accelerator.is_available():
        torch.accelerator.empty_cache()


def free_bytes() -> int:
    """Returns the free memory of this rank's accelerator; without one, its part of the machine's free memory."""
    from deepspeed.accelerator import get_accelerator

    free_memory()
    accelerator = get_accelerator()
    free = int(accelerator.available_memory())
    return free // world().local_size if accelerator.device_name() == "cpu" else free


def finish(exit_code: int = 0) -> NoReturn:
    """Ends this process. With exit code 0, it waits for all ranks and must be called by all of them.

    It uses os._exit because gloo's last broadcast may outlive the interpreter and abort a run that has succeeded: one run in
    six, measured with torch 2.13.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    logging.shutdown()
    if dist.is_initialized() and exit_code == 0:
        for heartbeat in _heartbeats:
            heartbeat.stop()
        dist.barrier()
        dist.destroy_process_group()
    os._exit(exit_code)
