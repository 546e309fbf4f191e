"""utils/objective/objective.py: noise levels of draws, whatever the scheme, and the shift at each resolution."""

from __future__ import annotations

import math

import pytest

from tests.utils.objective.sd3_objective import sd3_objective
from utils.objective.objective import NoiseLevel, Objective

PIXELS = 1024**2
DRAWS = [2**-53, 1e-6, 0.003, 0.0305, 0.2, 0.37, 0.51, 0.6180339, 0.81, 0.9994, 1 - 1e-6, 1 - 2**-53]


def levels(objective: Objective) -> list[NoiseLevel]:
    return [objective.noise_level(u, PIXELS) for u in DRAWS]


def test_the_default_is_logit_normal_by_sampling() -> None:
    objective = sd3_objective()
    config = objective.config
    assert (config.timestep_sampling, config.weighting_scheme, config.weighting_by) == ("sigma", "logit_normal", "sampling")
    by_density = sd3_objective(timestep_sampling="logit_normal")
    # The last of 2**53 possible draws is excluded: its cumulative sum in the table is rounded to that of t = 1.
    for ours, theirs in zip(levels(objective)[:-1], levels(by_density)[:-1], strict=True):
        assert ours.t == pytest.approx(theirs.t, abs=1e-6)
        assert ours.weight == pytest.approx(1, abs=1e-6)


@pytest.mark.parametrize("scheme", ["none", "sigma_sqrt", "logit_normal", "mode", "cosmap"])
def test_weighting_by_loss_and_by_sampling_have_the_same_expectation(scheme: str) -> None:
    count = 4000
    expectations = []
    for by in ("loss", "sampling"):
        objective = sd3_objective(weighting_scheme=scheme, weighting_by=by, discrete_flow_shift=2.0)
        found = [objective.noise_level((index + 0.5) / count, PIXELS) for index in range(count)]
        errors = [level.weight * (1 + math.sin(4 * level.sigma)) for level in found]
        expectations.append(sum(errors) / count)
    assert expectations[0] == pytest.approx(expectations[1], rel=1e-4)


@pytest.mark.parametrize("scheme", ["none", "sigma_sqrt", "logit_normal", "mode", "cosmap"])
@pytest.mark.parametrize("by", ["loss", "sampling"])
@pytest.mark.parametrize("grid", ["none", "sd_scripts", "diffusers"])
def test_the_most_extreme_draws_have_finite_noise_levels(scheme: str, by: str, grid: str) -> None:
    objective = sd3_objective(weighting_scheme=scheme, weighting_by=by, timestep_grid=grid)
    for level in levels(objective):
        assert 0 <= level.t <= 1
        assert 0 <= level.sigma <= 1
        assert math.isfinite(level.weight) and level.weight >= 0


def test_t_stays_within_its_bounds() -> None:
    for scheme in ("none", "logit_normal"):
        found = levels(sd3_objective(weighting_scheme=scheme, min_t=0.25, max_t=0.5))
        assert min(level.t for level in found) == pytest.approx(0.25, abs=1e-4)
        assert max(level.t for level in found) == pytest.approx(0.5, abs=1e-4)
        assert all(0.25 <= level.t <= 0.5 for level in found)


def test_with_the_sd3_rule_the_shift_grows_with_the_root_of_the_pixels() -> None:
    """SD3 paper, eq. 23: four times the pixels, twice the shift."""
    objective = sd3_objective(discrete_flow_shift=3.0, shift_resolution=1024)
    assert objective.shift_at(1024 * 1024) == 3.0
    assert objective.shift_at(512 * 512) == 1.5
    assert objective.shift_at(2048 * 512) == 3.0
    assert sd3_objective().shift_at(512 * 512) == 3.0
    small, large = objective.noise_level(0.5, 512 * 512), objective.noise_level(0.5, 1024 * 1024)
    assert small.t == pytest.approx(large.t)
    assert small.sigma == pytest.approx(0.6)
    assert large.sigma == pytest.approx(0.75)
