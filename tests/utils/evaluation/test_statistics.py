"""utils/evaluation/statistics.py: means of groups, and the coverage of confidence intervals."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from utils import randomness
from utils.evaluation.statistics import MIN_SAMPLES, Interval, group_means, mean_intervals

NUM_DRAWS = 4000


def doubles(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def normal(shape: tuple[int, int]) -> Tensor:
    return randomness.normal(3, "samples", *shape, shape=shape).double()


def exponential(shape: tuple[int, int]) -> Tensor:
    """Samples with mean 0 and a long right tail."""
    drawn = randomness.integers(3, "samples", *shape, high=2**52, shape=shape)
    return -((drawn.double() + 1) / 2**52).log() - 1


def student(shape: tuple[int, int]) -> Tensor:
    """Samples of Student's distribution with 3 degrees of freedom, which has outliers."""
    drawn = randomness.normal(3, "samples", *shape, shape=(4, *shape)).double()
    return drawn[0] / drawn[1:].square().mean(0).sqrt()


# --- means -------------------------------------------------------------------------------------------------------------


def test_group_means_are_the_means_of_each_group() -> None:
    means = group_means(doubles(1, 2, 4, 8, 16), [7, 0, 7, 0, 3])
    assert means.tolist() == [5.0, 16.0, 2.5]
    assert means.dtype == torch.float64


def test_the_mean_of_many_equal_numbers_is_that_number() -> None:
    assert group_means(torch.full((3000,), 0.1), [0] * 3000).item() == pytest.approx(float(torch.tensor(0.1)), rel=1e-14)


# --- intervals ---------------------------------------------------------------------------------------------------------

COVERAGE: dict[tuple[Callable[[tuple[int, int]], Tensor], int], float] = {
    (normal, 5): 95.5,
    (normal, 10): 94.6,
    (normal, 30): 95.0,
    (exponential, 5): 93.0,
    (exponential, 10): 93.5,
    (exponential, 30): 94.6,
    (student, 5): 94.5,
    (student, 10): 92.9,
    (student, 30): 92.9,
}
"""Percent, as in the docstring of the module."""


@pytest.mark.parametrize(("draw", "number"), COVERAGE, ids=lambda value: getattr(value, "__name__", value))
def test_intervals_have_the_documented_coverage(draw: Callable[[tuple[int, int]], Tensor], number: int) -> None:
    intervals = mean_intervals(draw((number, NUM_DRAWS)), seed=number)
    held = sum(interval is not None and interval.low <= 0 <= interval.high for interval in intervals)
    # Three standard errors of a proportion of 4000 trials: one percent.
    assert 100 * held / NUM_DRAWS == pytest.approx(COVERAGE[draw, number], abs=1.2)


def test_interval_of_many_normal_samples_agrees_with_the_normal_interval() -> None:
    samples = normal((400, 1))
    (interval,) = mean_intervals(samples, seed=0)
    assert interval is not None
    mean, error = float(samples.mean()), float(samples.std()) / math.sqrt(400)
    assert interval.low == pytest.approx(mean - 1.96 * error, abs=0.15 * error)
    assert interval.high == pytest.approx(mean + 1.96 * error, abs=0.15 * error)


def test_interval_of_skewed_samples_is_longer_on_the_side_of_the_tail() -> None:
    (interval,) = mean_intervals(doubles(0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 3.0)[:, None], seed=0)
    assert interval is not None
    mean = 5.1 / 8
    assert interval.high - mean > 2 * (mean - interval.low)


def test_interval_is_equivariant_under_shift_and_scale() -> None:
    samples = normal((12, 1))
    (one,), (other,) = mean_intervals(samples, seed=0), mean_intervals(5 + 2 * samples, seed=0)
    assert one is not None and other is not None
    assert (other.low, other.high) == pytest.approx((5 + 2 * one.low, 5 + 2 * one.high), rel=1e-12)


def test_intervals_depend_only_on_samples_and_seed() -> None:
    samples = normal((9, 3))
    state = torch.get_rng_state()
    first = mean_intervals(samples, seed=1)
    assert first == mean_intervals(samples, seed=1)
    assert first != mean_intervals(samples, seed=2)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("number", range(MIN_SAMPLES))
def test_too_few_samples_have_no_interval(number: int) -> None:
    assert mean_intervals(torch.zeros(number, 2), seed=0) == [None, None]


def test_no_columns_have_no_intervals() -> None:
    assert mean_intervals(torch.zeros(20, 0), seed=0) == []


def test_equal_samples_have_an_interval_of_width_zero() -> None:
    assert mean_intervals(torch.zeros(6, 1), seed=0) == [Interval(0.0, 0.0)]
    (interval,) = mean_intervals(torch.full((6, 1), 0.5), seed=0)
    assert interval == Interval(0.5, 0.5)


def test_one_sample_that_differs_from_equal_ones_gives_no_interval() -> None:
    """A third of the resamples do not contain it and have no variance."""
    assert mean_intervals(doubles(0, 0, 0, 0, 0, 1)[:, None], seed=0) == [None]


def test_ten_thousand_samples_are_resampled_in_parts() -> None:
    (interval,) = mean_intervals(normal((10_000, 1)), seed=0)
    assert interval is not None
    assert interval.high - interval.low == pytest.approx(2 * 1.96 / 100, rel=0.1)


@pytest.mark.parametrize(
    ("interval", "excludes"),
    [
        (Interval(-1, 1), False),
        (Interval(0, 1), False),
        (Interval(-1, 0), False),
        (Interval(0.1, 1), True),
        (Interval(-2, -1), True),
    ],
)
def test_an_interval_excludes_zero_if_both_ends_have_the_same_sign(interval: Interval, excludes: bool) -> None:
    assert interval.excludes_zero == excludes


# --- integers ----------------------------------------------------------------------------------------------------------


def test_random_integers_are_uniform_and_a_function_of_their_key() -> None:
    drawn = randomness.integers(0, "bootstrap", 5, high=7, shape=(100, 700))
    assert torch.equal(drawn, randomness.integers(0, "bootstrap", 5, high=7, shape=(100, 700)))
    assert not torch.equal(drawn, randomness.integers(0, "bootstrap", 6, high=7, shape=(100, 700)))
    counts = torch.bincount(drawn.flatten(), minlength=7)
    assert len(counts) == 7
    assert (counts - 10_000).abs().max() < 400
