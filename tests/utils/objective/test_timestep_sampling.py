"""Densities, weights and draws of the flow time, against formulas written out again and other quadrature, in float64."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache
from typing import get_args

import numpy as np
import pytest
import torch
from scipy import integrate, special, stats
from torch import Tensor

from utils.objective.rectified_flow import shift_time
from utils.objective.timestep_sampling import (
    MAX_MODE_SCALE,
    MIN_MODE_SCALE,
    Density,
    TimeSampler,
    TimestepSampling,
    Weighting,
    WeightingScheme,
    density_over_sigma,
    round_sigma,
    round_time,
)

F64 = torch.float64
Array = np.ndarray
DENSITIES = [
    Density("sigma"),
    Density("logit_normal"),
    Density("logit_normal", logit_mean=-0.5, logit_std=0.7),
    Density("mode"),
    Density("mode", mode_scale=-0.6),
    Density("cosmap"),
]
WEIGHTINGS = [
    Weighting("none"),
    Weighting("sigma_sqrt"),
    Weighting("logit_normal"),
    Weighting("logit_normal", logit_mean=0.6, logit_std=0.5),
    Weighting("mode"),
    Weighting("mode", mode_mean=0.8, mode_s_n=0.05),
    Weighting("cosmap"),
]
BOUNDS = [(0.0, 1.0), (0.2, 0.7), (0.0, 0.35), (0.9, 1.0)]
RAREST = torch.tensor([2.0**-53, 1 - 2.0**-53], dtype=F64)
ENDS = torch.tensor([0.0, 2.0**-1074, 2.0**-53, 0.5, 1 - 2.0**-53, 1.0], dtype=F64)


def name_of(value: object) -> str:
    """A test's name for a density, a weighting or bounds."""
    if isinstance(value, Density):
        return f"{value.sampling},{value.logit_mean},{value.logit_std},{value.mode_scale:.2f}"
    if isinstance(value, Weighting):
        return f"{value.scheme},{value.logit_mean},{value.logit_std},{value.mode_mean},{value.mode_s_n}"
    return str(value)


def weight_formula(weighting: Weighting, t: Array, shift: float) -> Array:
    """The weights as they are published with this program, in numpy."""
    if weighting.scheme == "none":
        return np.ones_like(t)
    if weighting.scheme == "sigma_sqrt":
        return np.sqrt(shift * t / (1 + (shift - 1) * t))
    if weighting.scheme == "logit_normal":
        mean, std = weighting.logit_mean, weighting.logit_std
        return np.exp(-((np.log(t / (1 - t)) - mean) ** 2) / (2 * std**2)) / (std * np.sqrt(2 * np.pi) * t * (1 - t))
    if weighting.scheme == "mode":
        z = (t - weighting.mode_mean) / weighting.mode_s_n
        return 1 / (np.pi * weighting.mode_s_n) / (np.exp(z) + np.exp(-z))
    return 1 - np.cos(np.pi * t / 2) ** 2


def f_mode(u: Array, scale: float) -> Array:
    """SD3 paper, eq. 20, as it stands there: falls from 1 to 0."""
    return 1 - u - scale * (np.cos(np.pi / 2 * u) ** 2 - 1 + u)


def mode_place(t: Array, scale: float) -> Array:
    """The u with f_mode(u) = t, to 1e-15."""
    low, high = np.zeros_like(t), np.ones_like(t)
    for _ in range(50):
        middle = (low + high) / 2
        above = f_mode(middle, scale) > t
        low, high = np.where(above, middle, low), np.where(above, high, middle)
    return (low + high) / 2


def distribution(density: Density, t: Array) -> Array:
    """P(draw < t) of p alone."""
    if density.sampling == "logit_normal":
        with np.errstate(divide="ignore"):
            return stats.norm.cdf((special.logit(t) - density.logit_mean) / density.logit_std)
    if density.sampling == "mode":
        return 1 - mode_place(t, density.mode_scale)
    if density.sampling == "cosmap":
        return 2 / np.pi * np.arctan2(t, 1 - t)
    return t


def density_formula(density: Density, t: Array) -> Array:
    """p(t), for t within (0, 1)."""
    if density.sampling == "logit_normal":
        return stats.norm.pdf(special.logit(t), density.logit_mean, density.logit_std) / (t * (1 - t))
    if density.sampling == "mode":
        u = mode_place(t, density.mode_scale)
        return 1 / (1 + density.mode_scale * (1 - np.pi / 2 * np.sin(np.pi * u)))
    if density.sampling == "cosmap":
        return 2 / (np.pi - 2 * np.pi * t + 2 * np.pi * t**2)
    return np.ones_like(t)


def integral(function: Callable[[Array], Array], low: float, high: float) -> float:
    """Gauss-Legendre in 64 equal parts of 32 nodes: never asks at an end."""
    nodes, weights = np.polynomial.legendre.leggauss(32)
    edges = np.linspace(low, high, 65)
    half = np.diff(edges)[:, None] / 2
    t = (edges[:-1, None] + half) + half * nodes
    return float((function(t.ravel()).reshape(t.shape) * weights * half).sum())


def make_sampler(density: Density, weighting: Weighting, bounds: tuple[float, float], shift: float = 3.0) -> TimeSampler:
    """A sampler by weight; none where every t counts alike, as the program has it."""

    def weight(t: Tensor) -> Tensor:
        return weighting(t, shift_time(t, shift))

    return TimeSampler(density, None if weighting.scheme == "none" else weight, *bounds)


def uniform(count: int, seed: int = 0) -> Tensor:
    return torch.rand(count, dtype=F64, generator=torch.Generator().manual_seed(seed))


def midpoints(count: int) -> Tensor:
    return (torch.arange(count, dtype=F64) + 0.5) / count


# --- weights -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shift", [1.0, 3.0])
@pytest.mark.parametrize("weighting", WEIGHTINGS, ids=name_of)
def test_weight_is_its_formula(weighting: Weighting, shift: float) -> None:
    t = torch.cat([torch.tensor([0.1, 0.25, 0.5, 0.75, 0.9], dtype=F64), midpoints(999)])
    expected = weight_formula(weighting, t.numpy(), shift)
    np.testing.assert_allclose(weighting(t, shift_time(t, shift)).numpy(), expected, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize(
    ("scheme", "values"),
    [
        ("none", [1, 1, 1, 1, 1]),
        ("sigma_sqrt", [0.32, 0.50, 0.71, 0.87, 0.95]),
        ("logit_normal", [0.40, 1.16, 1.60, 1.16, 0.40]),
        ("mode", [0.21, 0.42, 0.80, 0.42, 0.21]),
        ("cosmap", [0.02, 0.15, 0.50, 0.85, 0.98]),
    ],
)
def test_weight_has_the_values_worked_out_by_hand(scheme: WeightingScheme, values: list[float]) -> None:
    t = torch.tensor([0.1, 0.25, 0.5, 0.75, 0.9], dtype=F64)
    assert Weighting(scheme)(t, t).tolist() == pytest.approx(values, abs=0.0051)


def test_weights_have_their_integrals_over_all_times() -> None:
    ends = math.exp(0.5 / 0.2), math.exp(-0.5 / 0.2)
    mode = (math.atan(ends[0]) - math.atan(ends[1])) / math.pi
    expected = {"none": 1.0, "sigma_sqrt": 2 / 3, "logit_normal": 1.0, "mode": mode, "cosmap": 0.5}
    assert expected.keys() == set(get_args(WeightingScheme))
    assert 0.4 < mode < 0.5  # as a density the formula lacks a factor of two, and its tails
    for scheme in get_args(WeightingScheme):
        weighting = Weighting(scheme)
        assert integral(lambda t, w=weighting: w(torch.tensor(t), torch.tensor(t)).numpy(), 0, 1) == pytest.approx(
            expected[scheme], abs=1e-5 if scheme == "sigma_sqrt" else 1e-10
        )
        assert make_sampler(Density("sigma"), weighting, (0, 1), 1.0).mean_weight == pytest.approx(
            expected[scheme], abs=1e-7
        )


@pytest.mark.parametrize(("mean", "std"), [(0.0, 0.3), (-0.5, 0.7), (1.0, 2.0)])
def test_logit_normal_weight_is_a_density(mean: float, std: float) -> None:
    weighting = Weighting("logit_normal", mean, std)

    def over_logit(logit: float) -> float:
        t = torch.tensor(special.expit(logit), dtype=F64)
        return float(weighting(t, t) * t * (1 - t))

    assert integrate.quad(over_logit, mean - 8 * std, mean + 8 * std)[0] == pytest.approx(1, abs=1e-9)


@pytest.mark.parametrize(
    "weighting",
    [
        *WEIGHTINGS,
        Weighting("logit_normal", logit_std=0.01),
        Weighting("logit_normal", logit_std=10),
        Weighting("logit_normal", logit_mean=-30),
        Weighting("mode", mode_s_n=1e-3),
        Weighting("mode", mode_mean=-5, mode_s_n=1e-3),
        Weighting("mode", mode_mean=7),
    ],
    ids=name_of,
)
def test_weights_are_finite_and_never_negative_up_to_the_very_ends(weighting: Weighting) -> None:
    t = torch.cat([ENDS, midpoints(10_000)])
    weight = weighting(t, shift_time(t, 3.0))
    assert weight.isfinite().all()
    assert (weight >= 0).all()


def test_logit_normal_weight_falls_to_zero_at_both_ends() -> None:
    assert Weighting("logit_normal")(ENDS[[0, -1]], ENDS[[0, -1]]).tolist() == [0, 0]


# --- densities ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("density", DENSITIES, ids=name_of)
def test_time_is_the_inverse_of_the_distribution_function(density: Density) -> None:
    u = midpoints(2000)
    np.testing.assert_allclose(distribution(density, density.time(u).numpy()), u.numpy(), rtol=0, atol=1e-12)
    assert density.time(torch.tensor([0.0, 1.0], dtype=F64)).tolist() == pytest.approx([0, 1], abs=1e-15)


@pytest.mark.parametrize("density", DENSITIES, ids=name_of)
def test_one_over_the_slope_is_the_density(density: Density) -> None:
    u = midpoints(500)
    expected = density_formula(density, density.time(u).numpy())
    np.testing.assert_allclose(1 / density.slope(u).numpy(), expected, rtol=1e-7)


@pytest.mark.parametrize("density", DENSITIES, ids=name_of)
def test_slope_is_the_derivative_of_time(density: Density) -> None:
    u = midpoints(200).requires_grad_()
    (slope,) = torch.autograd.grad(density.time(u).sum(), u)
    torch.testing.assert_close(density.slope(u.detach()), slope, rtol=1e-9, atol=0)


@pytest.mark.parametrize(
    ("sampling", "values"),
    [
        ("sigma", [1, 1, 1, 1, 1]),
        ("logit_normal", [0.40, 1.16, 1.60, 1.16, 0.40]),
        ("mode", [0.50, 0.68, 3.79, 0.68, 0.50]),
        ("cosmap", [0.78, 1.02, 1.27, 1.02, 0.78]),
    ],
)
def test_density_has_the_values_worked_out_by_hand(sampling: TimestepSampling, values: list[float]) -> None:
    density = Density(sampling)
    u = density.uniform_of(torch.tensor([0.1, 0.25, 0.5, 0.75, 0.9], dtype=F64))
    assert (1 / density.slope(u)).tolist() == pytest.approx(values, abs=0.0051)


@pytest.mark.parametrize("scale", [MIN_MODE_SCALE, -0.3, 0.0, 0.8, 1.29, MAX_MODE_SCALE])
def test_mode_is_the_papers_function_of_the_other_end(scale: float) -> None:
    u = midpoints(100)
    time = Density("mode", mode_scale=scale).time(u)
    np.testing.assert_allclose(time.numpy(), f_mode(1 - u.numpy(), scale), rtol=0, atol=1e-14)


def test_cosmap_is_the_papers_function() -> None:
    u = midpoints(100)
    expected = [1 - 1 / (math.tan(math.pi / 2 * value) + 1) for value in u.tolist()]
    assert Density("cosmap").time(u).tolist() == pytest.approx(expected, abs=1e-13)


EXTREME_DENSITIES = [
    *DENSITIES,
    Density("logit_normal", logit_std=0.01),
    Density("logit_normal", logit_std=10),
    Density("logit_normal", logit_mean=-12),
    Density("mode", mode_scale=MIN_MODE_SCALE),
    Density("mode", mode_scale=MAX_MODE_SCALE),
]


@pytest.mark.parametrize("density", EXTREME_DENSITIES, ids=name_of)
def test_time_rises_throughout(density: Density) -> None:
    u = torch.cat([RAREST[:1], midpoints(100_000), RAREST[1:]])
    t = density.time(u)
    assert t.isfinite().all()
    assert (t.diff() >= -1e-15).all()
    assert ((t >= 0) & (t <= 1)).all()
    assert (density.slope(u) >= 0).all()


@pytest.mark.parametrize("density", EXTREME_DENSITIES, ids=name_of)
def test_the_place_of_a_time_is_found_again(density: Density) -> None:
    t = density.time(torch.tensor([0.001, 0.3, 0.5, 0.77, 0.999], dtype=F64))
    torch.testing.assert_close(density.time(density.uniform_of(t)), t, rtol=0, atol=1e-14)


# --- drawing -----------------------------------------------------------------------------------------------------------


@cache
def reference(density: Density, weighting: Weighting, bounds: tuple[float, float], shift: float) -> Callable[[Array], Array]:
    """The distribution function of q on [low, high], from the formulas on an even grid of t; about 1e-7 off."""
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
    torch.testing.assert_close(sampler.share_below(t), u, rtol=0, atol=1e-10)


def smirnov(draws: Tensor, distribution_function: Callable[[Array], Array]) -> float:
    """p value of the Kolmogorov-Smirnov test."""
    return float(stats.kstest(distribution_function(draws.numpy()), "uniform").pvalue)


CLOSED_FORMS: list[tuple[Density, Weighting, Callable[[Array], Array], Callable[[Array], Array]]] = [
    # density, weighting at shift 1, its distribution function, one of slightly other parameters
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
def test_random_draws_follow_the_closed_form_and_no_other(
    density: Density, weighting: Weighting, right: Callable[[Array], Array], wrong: Callable[[Array], Array]
) -> None:
    draws = make_sampler(density, weighting, (0.0, 1.0), shift=1.0).draw(uniform(20_000, seed=2))
    assert smirnov(draws, right) > 0.01
    assert smirnov(draws, wrong) < 0.01


@pytest.mark.parametrize(
    ("density", "weighting"),
    [
        (Density("logit_normal"), Weighting("sigma_sqrt")),
        (Density("mode"), Weighting("mode")),
        (Density("cosmap"), Weighting("logit_normal")),
    ],
)
def test_random_draws_within_bounds_follow_the_product_and_not_the_density_alone(
    density: Density, weighting: Weighting
) -> None:
    draws = make_sampler(density, weighting, (0.1, 0.9)).draw(uniform(20_000, seed=3))
    assert smirnov(draws, reference(density, weighting, (0.1, 0.9), 3.0)) > 0.01
    assert smirnov(draws, reference(density, Weighting("none"), (0.1, 0.9), 3.0)) < 0.01


def loss_at(t: Array | Tensor) -> Array | Tensor:
    """A loss as a network's might be: larger at both ends, never 0."""
    return 0.3 + 0.5 * t**2 + 0.4 * (1 - t) ** 3


def moments_by_loss(density: Density, weighting: Weighting, bounds: tuple[float, float]) -> tuple[float, float]:
    """Mean and mean square of weight times loss over draws of the density alone, within the bounds."""
    share = float(np.diff(distribution(density, np.array(bounds)))[0])

    def moment(power: int) -> float:
        def integrand(t: Array) -> Array:
            return density_formula(density, t) * (weight_formula(weighting, t, 3.0) * loss_at(t)) ** power

        return integral(integrand, *bounds) / share

    return moment(1), moment(2)


@pytest.mark.parametrize("bounds", BOUNDS, ids=name_of)
@pytest.mark.parametrize("weighting", WEIGHTINGS, ids=name_of)
@pytest.mark.parametrize("density", DENSITIES, ids=name_of)
def test_sampling_by_weight_has_the_expectation_of_weighing_the_loss(
    density: Density, weighting: Weighting, bounds: tuple[float, float]
) -> None:
    mean, mean_square = moments_by_loss(density, weighting, bounds)
    sampler = make_sampler(density, weighting, bounds)
    losses = sampler.mean_weight * loss_at(sampler.draw(midpoints(200_000)))
    assert float(losses.mean()) == pytest.approx(mean, rel=1e-6)
    if bounds == (0, 1):  # no law, as the loss may fall where the weight rises; so for this loss over all times
        assert float((losses**2).mean()) <= mean_square * (1 + 1e-5)


@pytest.mark.parametrize("weighting", WEIGHTINGS[1:], ids=name_of)
@pytest.mark.parametrize("density", DENSITIES, ids=name_of)
def test_a_weight_of_another_size_draws_the_same_times(density: Density, weighting: Weighting) -> None:
    once = TimeSampler(density, lambda t: weighting(t, t), 0.0, 1.0)
    twice = TimeSampler(density, lambda t: 2 * weighting(t, t), 0.0, 1.0)
    assert torch.equal(once.draw(midpoints(99)), twice.draw(midpoints(99)))
    assert twice.mean_weight == pytest.approx(2 * once.mean_weight, rel=1e-14)


@pytest.mark.parametrize("weighting", WEIGHTINGS, ids=name_of)
@pytest.mark.parametrize("density", EXTREME_DENSITIES, ids=name_of)
def test_the_rarest_draws_give_times_within_the_bounds(density: Density, weighting: Weighting) -> None:
    middle = float(density.time(torch.tensor(0.5, dtype=F64)))
    for bounds in [(0.0, 1.0), (0.9 * middle, 1.0), (0.0, middle)]:
        t = make_sampler(density, weighting, bounds).draw(RAREST)
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
def test_extreme_weights_are_drawn_right_too(weighting: Weighting, expected: Callable[[Array], Array]) -> None:
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
def test_bounds_that_leave_nothing_to_draw_are_refused(
    density: Density, weighting: Weighting, bounds: tuple[float, float], what: str
) -> None:
    with pytest.raises(ValueError, match=f"the {what} is zero everywhere between min_t and max_t"):
        make_sampler(density, weighting, bounds)


# --- for plots and histograms ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bounds", BOUNDS, ids=name_of)
@pytest.mark.parametrize("weighting", WEIGHTINGS, ids=name_of)
@pytest.mark.parametrize("density", DENSITIES, ids=name_of)
def test_plotted_density_is_the_formula_and_has_an_area_of_one(
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
def test_plotted_density_is_never_negative_where_it_is_infinite_too(scale: float) -> None:
    _, q = make_sampler(Density("mode", mode_scale=scale), Weighting("none"), (0.0, 1.0)).density_nodes(1001)
    assert (q >= 0).all()


@pytest.mark.parametrize("bounds", BOUNDS, ids=name_of)
@pytest.mark.parametrize("weighting", WEIGHTINGS, ids=name_of)
@pytest.mark.parametrize("density", DENSITIES, ids=name_of)
def test_share_below_is_the_distribution_function(
    density: Density, weighting: Weighting, bounds: tuple[float, float]
) -> None:
    edges = torch.linspace(0, 1, 65, dtype=F64)
    below = make_sampler(density, weighting, bounds).share_below(edges)
    np.testing.assert_allclose(below.numpy(), reference(density, weighting, bounds, 3.0)(edges.numpy()), rtol=0, atol=1e-6)


def test_outside_of_the_bounds_nothing_is_drawn() -> None:
    for weighting in WEIGHTINGS:
        sampler = make_sampler(Density("logit_normal"), weighting, (0.2, 0.7))
        times = torch.tensor([0.0, 0.1, 0.2, 0.7, 0.8, 1.0], dtype=F64)
        assert sampler.share_below(times).tolist() == [0, 0, 0, 1, 1, 1]


# --- rounding ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_grid_of_sd_scripts(shift: float) -> None:
    """Its published steps: shift the draw, times 1000, cut to a whole number; that over 1000 is sigma."""
    u = torch.cat([RAREST, uniform(100_000)])
    timesteps = (u * shift / (1 + (shift - 1) * u) * 1000).long()
    assert (int(timesteps.min()), int(timesteps.max())) == (0, 999)
    sigma = round_sigma(shift_time(round_time(u, "sd_scripts"), shift), "sd_scripts")
    assert torch.equal(sigma, timesteps.to(F64) / 1000)


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_grid_of_diffusers(shift: float) -> None:
    """Its published steps: a table that falls from 1 in 1000 steps, shifted; the index is 1000 u, cut to a whole number."""
    falling = torch.linspace(1, 1000, 1000, dtype=F64).flip(0) / 1000
    table = shift * falling / (1 + (shift - 1) * falling)
    u = torch.cat([RAREST, uniform(100_000)])
    index = (u * 1000).long()
    assert (int(index.min()), int(index.max())) == (0, 999)
    sigma = round_sigma(shift_time(round_time(1 - u, "diffusers"), shift), "diffusers")
    assert torch.equal(sigma, table[index])
    assert (float(sigma.min()), float(sigma.max())) == (float(table[-1]), 1.0)


def test_without_a_grid_nothing_is_rounded() -> None:
    u = uniform(1000)
    assert torch.equal(round_time(u, "none"), u)
    assert torch.equal(round_sigma(u, "none"), u)


def test_each_grid_rounds_once() -> None:
    """Of t and sigma each grid rounds one: rounding both would move the other."""
    u = uniform(1000)
    assert torch.equal(round_sigma(u, "diffusers"), u)
    assert torch.equal(round_time(u, "sd_scripts"), u)
