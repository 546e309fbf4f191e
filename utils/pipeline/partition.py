"""Divides the layers of a network into pipeline stages. Pure.

The time of a step is set by the slowest stage, so `balanced_bounds` minimises its cost. `block_bounds` divides by numbers of
blocks: the layers before the first block belong to the first stage, those after the last block to the last stage.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from utils.pipeline.cost import PassCost

ROUNDING = 1e-9
"""Relative difference below which two costs are equal: sums of the same numbers in another order differ by less."""


@dataclass(frozen=True)
class StageCost:
    """The cost of any stage: its layers' passes, and once more the forward pass of those that are recomputed."""

    layers: Sequence[PassCost]
    is_block: Sequence[bool]
    """Whether each layer is one of the repeated blocks."""
    recomputed_blocks: int
    """The first so many blocks of each stage keep no activations, so that their backward pass begins with a forward pass."""

    def __call__(self, start: int, stop: int) -> float:
        """The cost of a stage with the layers start to stop - 1."""
        blocks = [index for index in range(start, stop) if self.is_block[index]][: self.recomputed_blocks]
        passes = sum(layer.forward + layer.backward for layer in self.layers[start:stop])
        return passes + sum(self.layers[index].forward for index in blocks if self.layers[index].backward)


@dataclass(frozen=True)
class Partition:
    """The layers of each stage, and how they were chosen."""

    bounds: Sequence[int]
    """Stage i has the layers bounds[i] to bounds[i + 1] - 1."""
    costs: Sequence[float]
    """The cost of each stage, in any unit."""
    description: str
    """For the start banner, such as "by cost at 1,024 image tokens"."""

    @property
    def shares(self) -> list[float]:
        """The cost of each stage as a fraction of the whole; equal if no cost is known."""
        total = sum(self.costs)
        return [cost / total if total else 1 / len(self.costs) for cost in self.costs]


def stage_costs(bounds: Sequence[int], stage_cost: Callable[[int, int], float]) -> list[float]:
    """The cost of each stage."""
    return [stage_cost(start, stop) for start, stop in itertools.pairwise(bounds)]


def balanced_bounds(num_layers: int, num_stages: int, stage_cost: Callable[[int, int], float]) -> list[int]:
    """Divides consecutive layers into stages so that the cost of the most expensive stage is minimal.

    `stage_cost`: (start, stop) -> cost of a stage with the layers start to stop - 1. Returns num_stages + 1 positions: stage
    i has the layers bounds[i] to bounds[i + 1] - 1, at least one. Of several optimal divisions it returns the one with the
    fewest layers in the first stage, of these the one with the fewest in the second, and so on: a stage keeps the
    activations of more micro-batches than the stages after it. Raises ValueError when there are more stages than layers.
    """
    if not 1 <= num_stages <= num_layers:
        raise ValueError(f"{num_layers} layers cannot be divided into {num_stages} stages")
    infinity = float("inf")
    costs = [
        [stage_cost(start, stop) if start < stop else infinity for stop in range(num_layers + 1)]
        for start in range(num_layers)
    ]
    # best[k][i]: the cost of the most expensive stage when the layers from i on make k stages.
    best = [[infinity] * (num_layers + 1) for _ in range(num_stages + 1)]
    best[0][num_layers] = 0.0
    for k, start in itertools.product(range(1, num_stages + 1), range(num_layers)):
        stops = range(start + 1, num_layers + 1)
        best[k][start] = min((max(costs[start][stop], best[k - 1][stop]) for stop in stops), default=infinity)
    allowed = best[num_stages][0] * (1 + ROUNDING)
    bounds = [0]
    for k in range(num_stages - 1, -1, -1):
        start = bounds[-1]
        stops = range(start + 1, num_layers + 1)
        bounds.append(next(stop for stop in stops if max(costs[start][stop], best[k][stop]) <= allowed))
    return bounds


# --- numbers of blocks ---------------------------------------------------------------------------------------------------


def uniform_counts(num_blocks: int, num_stages: int) -> list[int]:
    """The blocks of each stage; they differ by at most one, and the first stages have the fewer."""
    fewer, rest = divmod(num_blocks, num_stages)
    return [fewer + (1 if stage >= num_stages - rest else 0) for stage in range(num_stages)]


def block_bounds(is_block: Sequence[bool], counts: Sequence[int]) -> list[int]:
    """The bounds of stages with these numbers of blocks, at least one each and all together."""
    blocks = [index for index, one in enumerate(is_block) if one]
    assert min(counts) >= 1 and sum(counts) == len(blocks), f"{counts} do not divide {len(blocks)} blocks"
    inner = [blocks[before] for before in itertools.accumulate(counts[:-1])]
    return [0, *inner, len(is_block)]


def counts_error(counts: Sequence[int], num_blocks: int, num_stages: int) -> str | None:
    """Why these numbers of blocks cannot be the stages', with the nearest list that can; None if they can."""
    if num_stages > num_blocks:
        return f"{num_stages} stages cannot have a block each: the network has {num_blocks} blocks"
    if len(counts) != num_stages:
        return (
            f"has {len(counts)} entries for {num_stages} stages; "
            f"use one number of blocks for each stage, such as {uniform_counts(num_blocks, num_stages)}"
        )
    nearest = nearest_counts(counts, num_blocks)
    if min(counts) < 1:
        stage = 1 + next(index for index, count in enumerate(counts) if count < 1)
        return f"stage {stage} must have at least one block; use {nearest}"
    if sum(counts) != num_blocks:
        return f"adds up to {sum(counts)} blocks, but the network has {num_blocks}; use {nearest}"
    return None


def nearest_counts(counts: Sequence[int], num_blocks: int) -> list[int]:
    """The given numbers of blocks, changed as little as possible so that each is at least one and their sum is right.

    Blocks that are too many are taken from the largest stages, missing ones are added to the smallest, from the last on.
    """
    nearest = [min(max(1, count), num_blocks) for count in counts]
    stages = range(len(nearest))
    while sum(nearest) > num_blocks:
        nearest[max(stages, key=lambda stage: nearest[stage])] -= 1
    while sum(nearest) < num_blocks:
        nearest[min(reversed(stages), key=lambda stage: nearest[stage])] += 1
    return nearest
