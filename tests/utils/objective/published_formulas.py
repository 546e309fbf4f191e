"""Independent NumPy and SciPy implementations of the densities and weights, for the tests of utils/objective."""

from __future__ import annotations

from collections.abc import Callable
from types import FunctionType

import numpy as np
import torch
from scipy import special, stats
from torch import Tensor

from utils.config.schema.objective_choices import MAX_MODE_SCALE, MIN_MODE_SCALE
from utils.objective.rectified_flow import shift_time
from utils.objective.timestep_sampling import Density, TimeSampler
from utils.objective.weighting import Weighting

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
EXTREME_DENSITIES = [
    *DENSITIES,
    Density("logit_normal", logit_std=0.01),
    Density("logit_normal", logit_std=10),
    Density("logit_normal", logit_mean=-12),
    Density("mode", mode_scale=MIN_MODE_SCALE),
    Density("mode", mode_scale=MAX_MODE_SCALE),
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
EXTREME_DRAWS = torch.tensor([2.0**-53, 1 - 2.0**-53], dtype=F64)
"""The smallest and the largest uniform number that a float64 generator returns."""


def name_of(value: object) -> str:
    """Returns the name of a density, a weighting or bounds in the names of tests."""
    if isinstance(value, Density):
        return f"{value.sampling},{value.logit_mean},{value.logit_std},{value.mode_scale:.2f}"
    if isinstance(value, Weighting):
        return f"{value.scheme},{value.logit_mean},{value.logit_std},{value.mode_mean},{value.mode_s_n}"
    return value.__name__ if isinstance(value, FunctionType) else str(value)


def weight_formula(weighting: Weighting, t: Array, shift: float) -> Array:
    """Returns w(t) by the formulas of docs/objective.md."""
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
    """Returns f_mode(u) as in eq. 20 of the SD3 paper: it decreases from 1 to 0."""
    return 1 - u - scale * (np.cos(np.pi / 2 * u) ** 2 - 1 + u)


def inverse_f_mode(t: Array, scale: float) -> Array:
    """Returns the u with f_mode(u) = t, to 1e-15."""
    low, high = np.zeros_like(t), np.ones_like(t)
    for _ in range(50):
        middle = (low + high) / 2
        above = f_mode(middle, scale) > t
        low, high = np.where(above, middle, low), np.where(above, high, middle)
    return (low + high) / 2


def distribution(density: Density, t: Array) -> Array:
    """Returns the probability of a draw from p below t."""
    if density.sampling == "logit_normal":
        with np.errstate(divide="ignore"):
            return stats.norm.cdf((special.logit(t) - density.logit_mean) / density.logit_std)
    if density.sampling == "mode":
        return 1 - inverse_f_mode(t, density.mode_scale)
    if density.sampling == "cosmap":
        return 2 / np.pi * np.arctan2(t, 1 - t)
    return t


def density_formula(density: Density, t: Array) -> Array:
    """Returns p(t), for t within (0, 1)."""
    if density.sampling == "logit_normal":
        return stats.norm.pdf(special.logit(t), density.logit_mean, density.logit_std) / (t * (1 - t))
    if density.sampling == "mode":
        u = inverse_f_mode(t, density.mode_scale)
        return 1 / (1 + density.mode_scale * (1 - np.pi / 2 * np.sin(np.pi * u)))
    if density.sampling == "cosmap":
        return 2 / (np.pi - 2 * np.pi * t + 2 * np.pi * t**2)
    return np.ones_like(t)


def integral(function: Callable[[Array], Array], low: float, high: float) -> float:
    """Integrates by Gauss-Legendre quadrature of 32 nodes in each of 64 equal parts, never evaluating at an end."""
    nodes, weights = np.polynomial.legendre.leggauss(32)
    edges = np.linspace(low, high, 65)
    half = np.diff(edges)[:, None] / 2
    t = (edges[:-1, None] + half) + half * nodes
    return float((function(t.ravel()).reshape(t.shape) * weights * half).sum())


def make_sampler(density: Density, weighting: Weighting, bounds: tuple[float, float], shift: float = 3.0) -> TimeSampler:
    """Returns a sampler by weight; without a weight for the scheme "none", as the program builds it."""

    def weight(t: Tensor) -> Tensor:
        return weighting(t, shift_time(t, shift))

    return TimeSampler(density, None if weighting.scheme == "none" else weight, *bounds)


def uniform(count: int, seed: int = 0) -> Tensor:
    return torch.rand(count, dtype=F64, generator=torch.Generator().manual_seed(seed))


def midpoints(count: int) -> Tensor:
    """Returns the midpoints of `count` equal parts of (0, 1)."""
    return (torch.arange(count, dtype=F64) + 0.5) / count
