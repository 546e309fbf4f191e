"""The processes of a run: who am I, what do the others know, who takes the next piece of work.

Launchers (deepspeed, torchrun, none) tell each process its place in the environment; `world()` reads it without starting
anything, so that bad input can be refused before a process group exists. `start()` then joins the group through DeepSpeed.
One of the two files that import it.
"""

from __future__ import annotations

import contextlib
import gc
import logging
import os
import sys
import threading
import time
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, NoReturn, TypeVar

import torch
import torch.distributed as dist

T = TypeVar("T")

# Read by libraries when they are imported, so set here, before any of them: DeepSpeed need not probe for accelerators that
# are not there, and only warnings and worse are shown.
if not torch.accelerator.is_available():
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
warnings.filterwarnings("ignore", category=FutureWarning, module=r"(torch|deepspeed|transformers|diffusers|peft)\.")

_SINGLE_PROCESS = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
"""What a launcher would have set for a program that runs alone; port 0 takes any free one."""

GROUP_TIMEOUT = timedelta(minutes=30)
WAIT_SECONDS = 24 * 3600.0
"""How long ranks wait for each other around work of unknown length, such as the caching pass."""
PULSE_SECONDS, DEAD_AFTER_SECONDS = 2.0, 120.0
LOOK_SECONDS = 0.02


@dataclass(frozen=True)
class World:
    """This process's place among all."""

    rank: int
    local_rank: int
    size: int
    local_size: int

    @property
    def is_main(self) -> bool:
        return self.rank == 0


def world() -> World:
    """The launcher's word in RANK, LOCAL_RANK, WORLD_SIZE and LOCAL_WORLD_SIZE; one process when there is none."""
    size = int(os.environ.get("WORLD_SIZE", "1"))
    local_size = os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE") or str(size)
    return World(
        rank=int(os.environ.get("RANK", "0")),
        local_rank=int(os.environ.get("LOCAL_RANK", "0")),
        size=size,
        local_size=int(local_size),
    )


def start() -> torch.device:
    """Join the process group and return this rank's device. Every rank must call it, once."""
    here = world()
    for name, value in _SINGLE_PROCESS.items():
        os.environ.setdefault(name, value)
    import deepspeed
    import deepspeed.ops
    from deepspeed.accelerator import get_accelerator
    from deepspeed.utils import logger

    logger.setLevel(logging.WARNING)
    # DeepSpeed 0.19 compiles a CPU-only operator when the group starts: half a minute, a compiler, and a lock file that
    # hangs every later start when the build is killed. Nothing here uses it.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    accelerator = get_accelerator()
    on_cpu = accelerator.device_name() == "cpu"
    if on_cpu:
        _share_cores(here)
    accelerator.set_device(here.local_rank)
    backend = "gloo" if on_cpu else accelerator.communication_backend_name()
    deepspeed.init_distributed(dist_backend=backend, timeout=GROUP_TIMEOUT, verbose=False)
    _hearts.append(_Heart(here.rank))
    _hearts[-1].start()
    return torch.device("cpu" if on_cpu else accelerator.device_name(here.local_rank))


def _share_cores(here: World) -> None:
    """On a CPU, processes that each use every core slow each other down twofold."""
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // here.local_size))


def broadcast(value: T, source: int = 0) -> T:
    """The source rank's value, on every rank. The others' argument is ignored."""
    box = [value]
    dist.broadcast_object_list(box, src=source)
    return box[0]


def gather(value: T) -> list[T]:
    """Every rank's value, in rank order, on every rank."""
    box: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(box, value)
    return box


def _store() -> dist.Store:
    return dist.distributed_c10d._get_default_store()


def wait_for_all(name: str, seconds: float = WAIT_SECONDS) -> None:
    """Return when every rank has come here; `name` must be new each time.

    Raises TimeoutError naming the ranks that did not come, and RankDied naming one that has died meanwhile: launchers end
    the others then, but not all do.
    """
    here, store = world(), _store()
    deadline = time.monotonic() + seconds
    pulses = _Pulses()
    missing = [rank for rank in range(here.size) if rank != here.rank]
    try:
        store.set(f"wait/{name}/{here.rank}", "here")
        while missing := [rank for rank in missing if not store.check([f"wait/{name}/{rank}"])]:
            if time.monotonic() > deadline:
                raise TimeoutError(f"rank {missing} did not reach '{name}' within {seconds:.0f} s")
            pulses.check(missing)
            time.sleep(LOOK_SECONDS)  # the store's own waiting writes a warning each time it is in vain
    except dist.DistNetworkError:  # the store is in rank 0's process
        raise RankDied("rank 0 has ended") from None


class RankDied(RuntimeError):
    """Another process of the run is there no more."""


class _Pulses:
    """Whether other ranks are alive: each counts up a number in the store; one that stands still is a dead rank's."""

    def __init__(self) -> None:
        self._seen: dict[int, tuple[int, float]] = {}

    def check(self, ranks: Iterable[int]) -> None:
        """Raises RankDied."""
        for rank in ranks:
            count, now = _store().add(f"pulse/{rank}", 0), time.monotonic()
            before, since = self._seen.get(rank, (-1, now))
            if count != before:
                self._seen[rank] = count, now
            elif now - since > DEAD_AFTER_SECONDS:
                raise RankDied(f"rank {rank} has died: nothing has been heard of it for {DEAD_AFTER_SECONDS:.0f} s")


class _Heart(threading.Thread):
    """Says that this process is alive, on a connection of its own, until it is stopped."""

    def __init__(self, rank: int) -> None:
        super().__init__(name="heart", daemon=True)
        store: Any = _store()
        self._rank, self._store = rank, store.clone()
        self._stopped = threading.Event()

    def run(self) -> None:
        with contextlib.suppress(RuntimeError, dist.DistError):  # the run is over
            while not self._stopped.wait(PULSE_SECONDS):
                self._store.add(f"pulse/{self._rank}", 1)

    def stop(self) -> None:
        self._stopped.set()
        self.join()


_hearts: list[_Heart] = []
"""Of this process: one, from `start` to `finish`."""


class WorkQueue:
    """Hands out the numbers 0 to num_items - 1 once each, to whichever rank asks next; `name` must be new each time."""

    def __init__(self, name: str, num_items: int) -> None:
        self._key = f"queue/{name}"
        self._num_items = num_items

    def __iter__(self) -> Iterator[int]:
        store = _store()
        while (item := store.add(self._key, 1) - 1) < self._num_items:
            yield item

    def num_taken(self) -> int:
        """How many items have been handed out so far, over all ranks."""
        return min(self._num_items, _store().add(self._key, 0))


def free_memory() -> None:
    """Give back what dropped tensors held, so that the next user of the accelerator finds it."""
    gc.collect()
    if torch.accelerator.is_available():
        torch.accelerator.empty_cache()


def finish(exit_code: int = 0) -> NoReturn:
    """End this process for good. On success, all ranks together.

    os._exit, because gloo's last broadcast may outlive the interpreter and abort a run that has succeeded (one in six,
    measured with torch 2.13).
    """
    sys.stdout.flush()
    sys.stderr.flush()
    logging.shutdown()
    if dist.is_initialized() and exit_code == 0:
        for heart in _hearts:
            heart.stop()
        dist.barrier()
        dist.destroy_process_group()
    os._exit(exit_code)
