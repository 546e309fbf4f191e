"""How the global batch of a run is divided: the number of replicas, and the size of the groups of one bucket."""

from __future__ import annotations

import itertools

from utils.checkpoint.manifest import BUCKET_GROUP, SavedState
from utils.config.schema.pipeline import PipelineConfig
from utils.data.batches import group_sizes
from utils.distributed.world import World


def _sizes(config: PipelineConfig, num_replicas: int) -> list[int]:
    return group_sizes(config.micro_batch_size_per_gpu, config.gradient_accumulation_steps, num_replicas)


def count_replicas(config: PipelineConfig, world: World, num_stages: int, *, check_only: bool) -> int:
    """The number of replicas of the run.

    `check_only`: one process that checks a run of any number of processes assumes the fewest replicas that
    `bucket_group` is right for.
    """
    group, each = config.bucket_group, config.micro_batch_size_per_gpu
    if check_only and world.size == 1 and group is not None and group % each == 0:
        return next(count for count in itertools.count(1) if group in _sizes(config, count))
    return max(1, world.size // num_stages)


def bucket_group_error(config: PipelineConfig, num_replicas: int) -> str | None:
    """Why `bucket_group` is wrong, with the nearest right values; None if it is right or not set."""
    group, sizes = config.bucket_group, _sizes(config, num_replicas)
    if group is None or group in sizes:
        return None
    nearest = [size for size in sizes if size < group][-1:] + [size for size in sizes if size > group][:1]
    return (
        f"= {group}: must be a multiple of {sizes[0]} (micro_batch_size_per_gpu {config.micro_batch_size_per_gpu} x "
        f"{num_replicas} replicas) that divides the global batch, {sizes[-1]}; use {' or '.join(map(str, nearest))}"
    )


def bucket_group_of(config: PipelineConfig, num_replicas: int, saved: SavedState | None) -> int:
    """The configured size of the groups, or else that of the checkpoint if this layout can have it, or else the smallest."""
    if config.bucket_group is not None:
        return config.bucket_group
    sizes = _sizes(config, num_replicas)
    before = saved.identity[BUCKET_GROUP] if saved is not None else sizes[0]
    return int(before) if before in sizes else sizes[0]
