"""How the layers are divided into stages."""

from __future__ import annotations

import itertools
import random

import pytest

from utils.pipeline.cost import PassCost
from utils.pipeline.partition import (
    Partition,
    StageCost,
    balanced_bounds,
    block_bounds,
    counts_error,
    nearest_counts,
    stage_costs,
    uniform_counts,
)


def sums_of(costs: list[float]) -> StageCost:
    """Nothing is recomputed."""
    return StageCost([PassCost(cost, 0.0) for cost in costs], [True] * len(costs), 0)


def bounds_of(costs: list[float], num_stages: int) -> list[int]:
    return balanced_bounds(len(costs), num_stages, sums_of(costs))


def divisions(num_layers: int, num_stages: int) -> list[list[int]]:
    """All bounds, those with the earliest cuts first."""
    return [[0, *cuts, num_layers] for cuts in itertools.combinations(range(1, num_layers), num_stages - 1)]


@pytest.mark.parametrize("seed", range(30))
def test_the_slowest_stage_is_as_fast_as_possible_and_earlier_stages_are_the_smaller(seed: int) -> None:
    """Against all divisions, with recomputed blocks and frozen layers, many of equal cost."""
    generator = random.Random(seed)
    num_layers = generator.randint(1, 9)
    layers = [PassCost(generator.choice([0.5, 1.0, 1.5, 4.0]), generator.choice([0.0, 2.0, 3.0])) for _ in range(num_layers)]
    is_block = [generator.random() < 0.8 for _ in range(num_layers)]
    stage_cost = StageCost(layers, is_block, generator.randint(0, 3))
    for num_stages in range(1, num_layers + 1):
        slowest = {tuple(bounds): max(stage_costs(bounds, stage_cost)) for bounds in divisions(num_layers, num_stages)}
        best = min(slowest.values())
        expected = min(bounds for bounds, cost in slowest.items() if cost <= best * (1 + 1e-9))
        assert balanced_bounds(num_layers, num_stages, stage_cost) == list(expected)


def test_costs_that_differ_only_by_rounding_are_equal() -> None:
    costs = [0.1, 0.2, 0.3, 0.3, 0.2, 0.1]  # 0.1 + 0.2 + 0.3 is 0.6000000000000001
    assert bounds_of(costs, 2) == [0, 3, 6]
    assert bounds_of([0.1] * 7, 2) == [0, 3, 7]
    assert bounds_of([0.1] * 8, 3) == [0, 2, 5, 8]


def test_recomputed_blocks_cost_one_more_forward_pass_if_they_have_a_backward_pass() -> None:
    layers = [PassCost(1.0, 0.0), PassCost(1.0, 0.0), PassCost(1.0, 2.0), PassCost(1.0, 2.0), PassCost(9.0, 9.0)]
    is_block = [False, True, True, True, False]
    assert [StageCost(layers, is_block, count)(0, 5) for count in (0, 1, 2, 3)] == [26.0, 26.0, 27.0, 28.0]
    assert StageCost(layers, is_block, 1)(2, 4) == 7.0


@pytest.mark.parametrize("num_stages", [1, 2, 3, 5, 8])
def test_stages_are_consecutive_cover_everything_and_none_is_empty(num_stages: int) -> None:
    bounds = bounds_of([3.0, 1.0, 1.0, 9.0, 1.0, 1.0, 1.0, 2.0], num_stages)
    assert bounds[0] == 0
    assert bounds[-1] == 8
    assert len(bounds) == num_stages + 1
    assert all(start < stop for start, stop in itertools.pairwise(bounds))


def test_as_many_stages_as_layers_is_one_layer_each() -> None:
    assert bounds_of([5.0, 1.0, 0.0], 3) == [0, 1, 2, 3]


def test_layers_of_zero_cost_are_divided_into_nonempty_stages() -> None:
    bounds = bounds_of([0.0, 0.0, 0.0, 0.0], 3)
    assert all(start < stop for start, stop in itertools.pairwise(bounds))
    assert Partition(bounds, [0.0] * 3, "").shares == [1 / 3] * 3


@pytest.mark.parametrize("num_stages", [0, -1, 4])
def test_more_stages_than_layers_are_refused(num_stages: int) -> None:
    with pytest.raises(ValueError, match=f"3 layers cannot be divided into {num_stages} stages"):
        bounds_of([1.0, 1.0, 1.0], num_stages)


# --- numbers of blocks ---------------------------------------------------------------------------------------------------


def test_uniform_stages_differ_by_one_block_and_the_first_have_the_fewer() -> None:
    assert uniform_counts(24, 2) == [12, 12]
    assert uniform_counts(22, 5) == [4, 4, 4, 5, 5]
    assert uniform_counts(3, 3) == [1, 1, 1]


def test_layers_around_the_blocks_belong_to_the_first_and_the_last_stage() -> None:
    is_block = [False, True, True, False, True, False]
    assert block_bounds(is_block, [3]) == [0, 6]
    assert block_bounds(is_block, [1, 2]) == [0, 2, 6]
    assert block_bounds(is_block, [2, 1]) == [0, 4, 6]
    assert block_bounds(is_block, [1, 1, 1]) == [0, 2, 4, 6]


@pytest.mark.parametrize(
    ("counts", "num_stages", "error"),
    [
        ([11, 13], 2, None),
        ([24], 1, None),
        ([24], 2, "has 1 entries for 2 stages; use one number of blocks for each stage, such as [12, 12]"),
        ([8, 8, 8], 2, "has 3 entries for 2 stages; use one number of blocks for each stage, such as [12, 12]"),
        ([10, 13], 2, "adds up to 23 blocks, but the network has 24; use [11, 13]"),
        ([12, 14], 2, "adds up to 26 blocks, but the network has 24; use [12, 12]"),
        ([0, 24], 2, "stage 1 must have at least one block; use [1, 23]"),
        ([25, -1], 2, "stage 2 must have at least one block; use [23, 1]"),
        ([1] * 25, 25, "25 stages cannot have a block each: the network has 24 blocks"),
    ],
)
def test_wrong_numbers_of_blocks_are_reported_with_the_nearest_right_ones(
    counts: list[int], num_stages: int, error: str | None
) -> None:
    assert counts_error(counts, 24, num_stages) == error


@pytest.mark.parametrize("counts", [[0, 0, 0], [10**12, 1, 5], [-(10**12), 7, 7], [3, 3, 3]])
def test_the_nearest_numbers_of_blocks_are_valid(counts: list[int]) -> None:
    nearest = nearest_counts(counts, 24)
    assert sum(nearest) == 24
    assert min(nearest) >= 1
    assert counts_error(nearest, 24, 3) is None
