"""utils/objective/timestep_sampling.py: densities of t and rounding, against independent implementations, in float64."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from tests.utils.objective.published_formulas import (
    DENSITIES,
    EXTREME_DENSITIES,
    EXTREME_DRAWS,
    F64,
    density_formula,
    distribution,
    f_mode,
    midpoints,
    name_of,
    uniform,
)
from utils.config.schema.objective_choices import MAX_MODE_SCALE, MIN_MODE_SCALE, TimestepSampling
from utils.objective.rectified_flow import shift_time
from utils.objective.timestep_sampling import (
    Density,
    round_sigma,
    round_time,
)

# --- densities ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("density", DENSITIES, ids=name_of)
def test_quantile_is_the_inverse_of_the_distribution_function(density: Density) -> None:
    u = midpoints(2000)
    np.testing.assert_allclose(distribution(density, density.quantile(u).numpy()), u.numpy(), rtol=0, atol=1e-12)
    assert density.quantile(torch.tensor([0.0, 1.0], dtype=F64)).tolist() == pytest.approx([0, 1], abs=1e-15)


@pytest.mark.parametrize("density", DENSITIES, ids=name_of)
def test_the_inverse_of_the_quantile_slope_is_the_density(density: Density) -> None:
    u = midpoints(500)
    expected = density_formula(density, density.quantile(u).numpy())
    np.testing.assert_allclose(1 / density.quantile_slope(u).numpy(), expected, rtol=1e-7)


@pytest.mark.parametrize("density", DENSITIES, ids=name_of)
def test_quantile_slope_is_the_derivative_of_the_quantile(density: Density) -> None:
    u = midpoints(200).requires_grad_()
    (slope,) = torch.autograd.grad(density.quantile(u).sum(), u)
    torch.testing.assert_close(density.quantile_slope(u.detach()), slope, rtol=1e-9, atol=0)


@pytest.mark.parametrize(
    ("sampling", "values"),
    [
        ("sigma", [1, 1, 1, 1, 1]),
        ("logit_normal", [0.40, 1.16, 1.60, 1.16, 0.40]),
        ("mode", [0.50, 0.68, 3.79, 0.68, 0.50]),
        ("cosmap", [0.78, 1.02, 1.27, 1.02, 0.78]),
    ],
)
def test_density_agrees_with_values_computed_by_hand(sampling: TimestepSampling, values: list[float]) -> None:
    density = Density(sampling)
    u = density.cdf(torch.tensor([0.1, 0.25, 0.5, 0.75, 0.9], dtype=F64))
    assert (1 / density.quantile_slope(u)).tolist() == pytest.approx(values, abs=0.0051)


@pytest.mark.parametrize("scale", [MIN_MODE_SCALE, -0.3, 0.0, 0.8, 1.29, MAX_MODE_SCALE])
def test_mode_is_the_paper_s_function_of_one_minus_u(scale: float) -> None:
    u = midpoints(100)
    t = Density("mode", mode_scale=scale).quantile(u)
    np.testing.assert_allclose(t.numpy(), f_mode(1 - u.numpy(), scale), rtol=0, atol=1e-14)


def test_cosmap_is_the_paper_s_function() -> None:
    u = midpoints(100)
    expected = [1 - 1 / (math.tan(math.pi / 2 * value) + 1) for value in u.tolist()]
    assert Density("cosmap").quantile(u).tolist() == pytest.approx(expected, abs=1e-13)


@pytest.mark.parametrize("density", EXTREME_DENSITIES, ids=name_of)
def test_quantile_increases_on_the_whole_interval(density: Density) -> None:
    u = torch.cat([EXTREME_DRAWS[:1], midpoints(100_000), EXTREME_DRAWS[1:]])
    t = density.quantile(u)
    assert t.isfinite().all()
    assert (t.diff() >= -1e-15).all()
    assert ((t >= 0) & (t <= 1)).all()
    assert (density.quantile_slope(u) >= 0).all()


@pytest.mark.parametrize("density", EXTREME_DENSITIES, ids=name_of)
def test_cdf_inverts_the_quantile(density: Density) -> None:
    t = density.quantile(torch.tensor([0.001, 0.3, 0.5, 0.77, 0.999], dtype=F64))
    torch.testing.assert_close(density.quantile(density.cdf(t)), t, rtol=0, atol=1e-14)


# --- rounding ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_the_sd_scripts_grid_agrees_with_its_published_computation(shift: float) -> None:
    """sd-scripts shifts the draw, multiplies by 1000 and truncates to an integer; sigma is that integer over 1000."""
    u = torch.cat([EXTREME_DRAWS, uniform(100_000)])
    timesteps = (u * shift / (1 + (shift - 1) * u) * 1000).long()
    assert (int(timesteps.min()), int(timesteps.max())) == (0, 999)
    sigma = round_sigma(shift_time(round_time(u, "sd_scripts"), shift), "sd_scripts")
    assert torch.equal(sigma, timesteps.to(F64) / 1000)


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_the_diffusers_grid_agrees_with_its_published_computation(shift: float) -> None:
    """diffusers has a shifted table that falls from 1 in 1000 steps; the index is 1000 u, truncated to an integer."""
    falling = torch.linspace(1, 1000, 1000, dtype=F64).flip(0) / 1000
    table = shift * falling / (1 + (shift - 1) * falling)
    u = torch.cat([EXTREME_DRAWS, uniform(100_000)])
    index = (u * 1000).long()
    assert (int(index.min()), int(index.max())) == (0, 999)
    sigma = round_sigma(shift_time(round_time(1 - u, "diffusers"), shift), "diffusers")
    assert torch.equal(sigma, table[index])
    assert (float(sigma.min()), float(sigma.max())) == (float(table[-1]), 1.0)


def test_without_a_grid_neither_t_nor_sigma_is_rounded() -> None:
    u = uniform(1000)
    assert torch.equal(round_time(u, "none"), u)
    assert torch.equal(round_sigma(u, "none"), u)


def test_each_grid_rounds_either_t_or_sigma() -> None:
    """Rounding both would round the other one a second time, after the shift."""
    u = uniform(1000)
    assert torch.equal(round_sigma(u, "diffusers"), u)
    assert torch.equal(round_time(u, "sd_scripts"), u)
