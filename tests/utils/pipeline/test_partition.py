"""How the layers are divided into stages."""

from __future__ import annotations

import itertools
import random

import pytest

from utils.pipeline.partition import balanced_bounds


def highest_cost(costs: list[float], bounds: list[int]) -> float:
    return max(sum(costs[start:stop]) for start, stop in itertools.pairwise(bounds))


def brute_force(costs: list[float], num_stages: int) -> float:
    inner = itertools.combinations(range(1, len(costs)), num_stages - 1)
    return min(highest_cost(costs, [0, *cuts, len(costs)]) for cuts in inner)


@pytest.mark.parametrize("seed", range(30))
def test_no_division_has_a_cheaper_most_expensive_stage(seed: int) -> None:
    generator = random.Random(seed)
    costs = [generator.choice([0.5, 1.0, 1.5, 4.0, generator.random()]) for _ in range(generator.randint(1, 10))]
    for num_stages in range(1, len(costs) + 1):
        bounds = balanced_bounds(costs, num_stages)
        assert highest_cost(costs, bounds) == pytest.approx(brute_force(costs, num_stages))


@pytest.mark.parametrize("num_stages", [1, 2, 3, 5, 8])
def test_stages_are_consecutive_cover_everything_and_none_is_empty(num_stages: int) -> None:
    bounds = balanced_bounds([3.0, 1.0, 1.0, 9.0, 1.0, 1.0, 1.0, 2.0], num_stages)
    assert bounds[0] == 0
    assert bounds[-1] == 8
    assert len(bounds) == num_stages + 1
    assert all(start < stop for start, stop in itertools.pairwise(bounds))


def test_as_many_stages_as_layers_is_one_layer_each() -> None:
    assert balanced_bounds([5.0, 1.0, 0.0], 3) == [0, 1, 2, 3]


def test_layers_of_zero_cost_are_divided_into_nonempty_stages() -> None:
    bounds = balanced_bounds([0.0, 0.0, 0.0, 0.0], 3)
    assert all(start < stop for start, stop in itertools.pairwise(bounds))


def test_sd35_medium_is_cut_before_its_middle_because_its_first_blocks_cost_more() -> None:
    costs = [1.0] + [20.0] * 13 + [16.0] * 10 + [13.0, 0.1]
    bounds = balanced_bounds(costs, 2)
    assert bounds[1] < len(costs) / 2


@pytest.mark.parametrize("num_stages", [0, -1, 4])
def test_more_stages_than_layers_are_refused(num_stages: int) -> None:
    with pytest.raises(ValueError, match=f"3 layers cannot be divided into {num_stages} stages"):
        balanced_bounds([1.0, 1.0, 1.0], num_stages)
