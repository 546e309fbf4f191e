"""Rank information, as the launcher passes it in environment variables.

It is read without starting anything, so that configuration errors can be reported before a process group exists.
"""

from __future__ import annotations

import os
from dataclasses import dataclass


@dataclass(frozen=True)
class World:
    """The rank of this process and the number of processes."""

    rank: int
    local_rank: int
    """Rank among the processes of this machine; the index of its accelerator."""
    size: int
    local_size: int
    """Number of processes on this machine."""

    @property
    def is_main(self) -> bool:
        return self.rank == 0


def world() -> World:
    """Reads RANK, LOCAL_RANK, WORLD_SIZE and LOCAL_WORLD_SIZE; without a launcher, a world of one process."""
    size = int(os.environ.get("WORLD_SIZE", "1"))
    # torchrun sets LOCAL_WORLD_SIZE, deepspeed sets LOCAL_SIZE.
    local_size = os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE") or str(size)
    return World(
        rank=int(os.environ.get("RANK", "0")),
        local_rank=int(os.environ.get("LOCAL_RANK", "0")),
        size=size,
        local_size=int(local_size),
    )
