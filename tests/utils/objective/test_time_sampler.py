"""utils/objective/timestep_sampling.py: draws of TimeSampler follow density times weight, by independent quadrature."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import numpy as np
import pytest
import torch
from scipy import integrate, special, stats
from torch import Tensor

from tests.utils.objective.published_formulas import (
    BOUNDS,
    DENSITIES,
    EXTREME_DENSITIES,
    EXTREME_DRAWS,
    F64,
    WEIGHTINGS,
    Array,
    density_formula,
    distribution,
    integral,
    make_sampler,
    midpoints,
    name_of,
    uniform,
    weight_formula,
)
from utils.config.schema.objective_choices import MAX_MODE_SCALE, MIN_MODE_SCALE
from utils.objective.rectified_flow import shift_time
from utils.objective.timestep_sampling import Density, TimeSampler, density_over_sigma
from utils.objective.weighting import Weighting


@cache
def reference(density: Density, weighting: Weighting, bounds: tuple[float, float], shift: float) -> Callable[[Array], Array]:
    """Returns the distribution function of q on [low, high], by quadrature on an even grid of t; accurate to about 1e-7."""
    low, high = bounds
    edge = 1e-12
    t = np.linspace(max(low, edge), min(high, 1 - edge), 20_001)
    mass = integrate.cumulative_simpson(density_formula(density, t) * weight_formula(weighting, t, shift), x=t, initial=0)
    return lambda at: np.interp(at, t, mass / mass[-1])


@pytest.mark.parametrize("bounds", BOUNDS, ids=name_of)
@pytest.mark.parametrize("weighting", WEIGHTINGS, ids=name_of)
@pytest.mark.parametrize("density", DENSITIES, ids=name_of)
def test_draws_follow_the_product_of_density_and_weight(
    density: Density, weighting: Weighting, bounds: tuple[float, float]
) -> None:
    sampler = make_sampler(density, weighting, bounds)
    u = midpoints(1000)
    t = sampler.draw(u)
    assert ((t >= bounds[0]) & (t <= bounds[1])).all()
    np.testing.assert_allclose(reference(density, weighting, bounds, 3.0)(t.numpy()), u.numpy(), rtol=0, atol=1e-6)
    torch.testing.assert_close(sampler.cdf(t), u, rtol=0, atol=1e-10)


def kolmogorov_smirnov(draws: Tensor, distribution_function: Callable[[Array], Array]) -> float:
    """Returns the p-value of the Kolmogorov-Smirnov test."""
    return float(stats.kstest(distribution_function(draws.numpy()), "uniform").pvalue)


CLOSED_FORMS: list[tuple[Density, Weighting, Callable[[Array], Array], Callable[[Array], Array]]] = [
    # density, weighting at shift 1, its distribution function, one with slightly different parameters
    (Density("sigma"), Weighting("none"), lambda t: t, lambda t: t**1.05),
    (
        Density("logit_normal", -0.5, 0.7),
        Weighting("none"),
        lambda t: stats.norm.cdf(special.logit(t), -0.5, 0.7),
        lambda t: stats.norm.cdf(special.logit(t), -0.46, 0.7),
    ),
    (
        Density("sigma"),
        Weighting("logit_normal", 1.0, 2.0),
        lambda t: stats.norm.cdf(special.logit(t), 1.0, 2.0),
        lambda t: stats.norm.cdf(special.logit(t), 1.0, 2.15),
    ),
    (
        Density("cosmap"),
        Weighting("none"),
        lambda t: 2 / np.pi * np.arctan(t / (1 - t)),
        lambda t: (2 / np.pi * np.arctan(t / (1 - t))) ** 1.05,
    ),
    (Density("sigma"), Weighting("sigma_sqrt"), lambda t: t**1.5, lambda t: t**1.55),
    (
        Density("sigma"),
        Weighting("cosmap"),
        lambda t: t - np.sin(np.pi * t) / np.pi,
        lambda t: t - 0.95 * np.sin(np.pi * t) / np.pi,
    ),
    (
        Density("sigma"),
        Weighting("mode", mode_mean=0.3, mode_s_n=0.1),
        lambda t: _mode_distribution(t, 0.3, 0.1),
        lambda t: _mode_distribution(t, 0.305, 0.1),
    ),
    (
        Density("mode"),
        Weighting("none"),
        lambda t: distribution(Density("mode"), t),
        lambda t: distribution(Density("mode", mode_scale=1.24), t),
    ),
]


def _mode_distribution(t: Array, mean: float, s_n: float) -> Array:
    mass = [np.arctan(np.exp((at - mean) / s_n)) for at in (np.zeros_like(t), t, np.ones_like(t))]
    return (mass[1] - mass[0]) / (mass[2] - mass[0])


@pytest.mark.parametrize(("density", "weighting", "right", "wrong"), CLOSED_FORMS)
def test_random_draws_follow_the_closed_form_and_reject_a_similar_one(
    density: Density, weighting: Weighting, right: Callable[[Array], Array], wrong: Callable[[Array], Array]
) -> None:
    draws = make_sampler(density, weighting, (0.0, 1.0), shift=1.0).draw(uniform(20_000, seed=2))
    assert kolmogorov_smirnov(draws, right) > 0.01
    assert kolmogorov_smirnov(draws, wrong) < 0.01


@pytest.mark.parametrize(
    ("density", "weighting"),
    [
        (Density("logit_normal"), Weighting("sigma_sqrt")),
        (Density("mode"), Weighting("mode")),
        (Density("cosmap"), Weighting("logit_normal")),
    ],
)
def test_random_draws_within_bounds_follow_the_product_and_not_only_the_density(
    density: Density, weighting: Weighting
) -> None:
    draws = make_sampler(density, weighting, (0.1, 0.9)).draw(uniform(20_000, seed=3))
    assert kolmogorov_smirnov(draws, reference(density, weighting, (0.1, 0.9), 3.0)) > 0.01
    assert kolmogorov_smirnov(draws, reference(density, Weighting("none"), (0.1, 0.9), 3.0)) < 0.01


def loss_at(t: Array | Tensor) -> Array | Tensor:
    """A plausible loss of a network: larger at both ends, never 0."""
    return 0.3 + 0.5 * t**2 + 0.4 * (1 - t) ** 3


def moments_by_loss(density: Density, weighting: Weighting, bounds: tuple[float, float]) -> tuple[float, float]:
    """Returns the mean and mean square of weight times loss over draws from the density alone, within the bounds."""
    mass = float(np.diff(distribution(density, np.array(bounds)))[0])

    def moment(power: int) -> float:
        def integrand(t: Array) -> Array:
            return density_formula(density, t) * (weight_formula(weighting, t, 3.0) * loss_at(t)) ** power

        return integral(integrand, *bounds) / mass

    return moment(1), moment(2)


@pytest.mark.parametrize("bounds", BOUNDS, ids=name_of)
@pytest.mark.parametrize("weighting", WEIGHTINGS, ids=name_of)
@pytest.mark.parametrize("density", DENSITIES, ids=name_of)
def test_sampling_by_weight_has_the_expectation_of_weighting_the_loss(
    density: Density, weighting: Weighting, bounds: tuple[float, float]
) -> None:
    mean, mean_square = moments_by_loss(density, weighting, bounds)
    sampler = make_sampler(density, weighting, bounds)
    losses = sampler.mean_weight * loss_at(sampler.draw(midpoints(200_000)))
    assert float(losses.mean()) == pytest.approx(mean, rel=1e-6)
    if bounds == (0, 1):  # not a theorem, but true of this loss over the whole interval
        assert float((losses**2).mean()) <= mean_square * (1 + 1e-5)


@pytest.mark.parametrize("weighting", WEIGHTINGS[1:], ids=name_of)
@pytest.mark.parametrize("density", DENSITIES, ids=name_of)
def test_scaling_the_weight_draws_the_same_t(density: Density, weighting: Weighting) -> None:
    once = TimeSampler(density, lambda t: weighting(t, t), 0.0, 1.0)
    twice = TimeSampler(density, lambda t: 2 * weighting(t, t), 0.0, 1.0)
    assert torch.equal(once.draw(midpoints(99)), twice.draw(midpoints(99)))
    assert twice.mean_weight == pytest.approx(2 * once.mean_weight, rel=1e-14)


@pytest.mark.parametrize("weighting", WEIGHTINGS, ids=name_of)
@pytest.mark.parametrize("density", EXTREME_DENSITIES, ids=name_of)
def test_the_most_extreme_draws_give_t_within_the_bounds(density: Density, weighting: Weighting) -> None:
    middle = float(density.quantile(torch.tensor(0.5, dtype=F64)))
    for bounds in [(0.0, 1.0), (0.9 * middle, 1.0), (0.0, middle)]:
        t = make_sampler(density, weighting, bounds).draw(EXTREME_DRAWS)
        assert ((t >= bounds[0]) & (t <= bounds[1])).all()
        assert shift_time(t, 3.0).isfinite().all()


@pytest.mark.parametrize(
    ("weighting", "expected"),
    [
        (Weighting("logit_normal", logit_std=0.01), lambda t: stats.norm.cdf(special.logit(t), 0, 0.01)),
        (Weighting("logit_normal", logit_std=10), lambda t: stats.norm.cdf(special.logit(t), 0, 10)),
        (Weighting("mode", mode_s_n=1e-3), lambda t: 2 / np.pi * np.arctan(np.exp((t - 0.5) / 1e-3))),
        (Weighting("mode", mode_mean=-1, mode_s_n=0.05), lambda t: -np.expm1(-t / 0.05)),
        (Weighting("mode", mode_mean=3, mode_s_n=0.02), lambda t: np.exp((t - 1) / 0.02)),
    ],
    ids=name_of,
)
def test_extreme_weights_are_sampled_correctly(weighting: Weighting, expected: Callable[[Array], Array]) -> None:
    t = make_sampler(Density("sigma"), weighting, (0.0, 1.0)).draw(midpoints(1000))
    np.testing.assert_allclose(expected(t.numpy()), midpoints(1000).numpy(), rtol=0, atol=1e-3)


@pytest.mark.parametrize(
    ("density", "weighting", "bounds", "what"),
    [
        (Density("logit_normal", logit_std=0.01), Weighting("none"), (0.9, 1.0), "density"),
        (Density("logit_normal", logit_mean=10, logit_std=0.3), Weighting("none"), (0.0, 0.5), "density"),
        (Density("sigma"), Weighting("mode", mode_mean=2, mode_s_n=1e-3), (0.0, 1.0), "weight"),
        (Density("sigma"), Weighting("logit_normal", logit_std=0.01), (0.0, 0.3), "weight"),
    ],
)
def test_bounds_with_nothing_to_draw_are_rejected(
    density: Density, weighting: Weighting, bounds: tuple[float, float], what: str
) -> None:
    with pytest.raises(ValueError, match=f"the {what} is zero everywhere between min_t and max_t"):
        make_sampler(density, weighting, bounds)


# --- for plots and histograms ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bounds", BOUNDS, ids=name_of)
@pytest.mark.parametrize("weighting", WEIGHTINGS, ids=name_of)
@pytest.mark.parametrize("density", DENSITIES, ids=name_of)
def test_plotted_density_agrees_with_the_formula_and_integrates_to_one(
    density: Density, weighting: Weighting, bounds: tuple[float, float]
) -> None:
    t, q = make_sampler(density, weighting, bounds).density_nodes(4001)
    assert (t.diff() >= 0).all()
    assert float(torch.trapezoid(q, t)) == pytest.approx(1, abs=5e-4)
    sigma, over_sigma = shift_time(t, 3.0), density_over_sigma(t, q, 3.0)
    assert float(torch.trapezoid(over_sigma, sigma)) == pytest.approx(1, abs=5e-4)
    some = t[::97].numpy()
    area = integral(lambda at: density_formula(density, at) * weight_formula(weighting, at, 3.0), *bounds)
    expected = density_formula(density, some) * weight_formula(weighting, some, 3.0) / area
    np.testing.assert_allclose(q[::97].numpy(), expected, rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize("scale", [MIN_MODE_SCALE, MAX_MODE_SCALE])
def test_plotted_density_is_not_negative_even_where_it_is_infinite(scale: float) -> None:
    _, q = make_sampler(Density("mode", mode_scale=scale), Weighting("none"), (0.0, 1.0)).density_nodes(1001)
    assert (q >= 0).all()


@pytest.mark.parametrize("bounds", BOUNDS, ids=name_of)
@pytest.mark.parametrize("weighting", WEIGHTINGS, ids=name_of)
@pytest.mark.parametrize("density", DENSITIES, ids=name_of)
def test_cdf_is_the_distribution_function(density: Density, weighting: Weighting, bounds: tuple[float, float]) -> None:
    edges = torch.linspace(0, 1, 65, dtype=F64)
    below = make_sampler(density, weighting, bounds).cdf(edges)
    np.testing.assert_allclose(below.numpy(), reference(density, weighting, bounds, 3.0)(edges.numpy()), rtol=0, atol=1e-6)


def test_cdf_is_zero_below_and_one_above_the_bounds() -> None:
    for weighting in WEIGHTINGS:
        sampler = make_sampler(Density("logit_normal"), weighting, (0.2, 0.7))
        times = torch.tensor([0.0, 0.1, 0.2, 0.7, 0.8, 1.0], dtype=F64)
        assert sampler.cdf(times).tolist() == [0, 0, 0, 1, 1, 1]
