"""Timestep densities, and sampling of the flow time t from the product of a density and a weight.

Three concepts are separate here that other programs call by the same names (docs/objective.md):

* a density p(t) is how often a t is drawn: `timestep_sampling`;
* a weight w(t) is how much a t counts: `weighting_scheme` (weighting.py);
* the network is trained on their product. Either t is drawn from p and the loss is multiplied by w, or t is drawn from
  q = p w / Z and the loss is multiplied by the constant Z, the integral of p w. The expectation is the same, but the second
  wastes no draw on a t that hardly counts, and no single draw has fifty times the weight of another.

Everything is float64. t is in [0, 1], 1 = noise. The functions take uniform random numbers in (0, 1) and generate none.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from utils.config.schema.objective_choices import TimestepGrid, TimestepSampling
from utils.objective.weighting import logit_normal_density

Function = Callable[[Tensor], Tensor]

_NUM_NODES = 2**17
_GRID_STEPS = 1000.0
_MIN_PROBABILITY = 1e-9
"""Minimum probability mass of p between min_t and max_t; below it float64 cannot separate draws."""


# --- densities ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Density:
    """A density p(t) on [0, 1], with its parameters."""

    sampling: TimestepSampling
    logit_mean: float = 0.0
    logit_std: float = 1.0
    mode_scale: float = 1.29

    def quantile(self, u: Tensor) -> Tensor:
        """Returns the t of a uniform u in [0, 1], the inverse of `cdf`; increases from 0 to 1.

        sigma         t = u
        logit_normal  logit t = m + s ndtri(u)                                        (SD3 paper, eq. 19)
        mode          t = 1 - v - a (cos^2(pi v / 2) - 1 + v) with v = 1 - u          (eq. 20)
        cosmap        t = 1 - 1 / (tan(pi u / 2) + 1)                                 (eq. 21)
        """
        if self.sampling == "logit_normal":
            return torch.sigmoid(self.logit_mean + self.logit_std * torch.special.ndtri(u))
        if self.sampling == "mode":
            return u - self.mode_scale * (torch.sin(math.pi / 2 * u).square() - u)
        if self.sampling == "cosmap":
            sine, cosine = torch.sin(math.pi / 2 * u), torch.cos(math.pi / 2 * u)
            return sine / (sine + cosine)
        return u

    def quantile_slope(self, u: Tensor) -> Tensor:
        """Returns dt/du, so that p(t(u)) = 1 / quantile_slope(u)."""
        if self.sampling == "logit_normal":
            return 1 / logit_normal_density(self.quantile(u), self.logit_mean, self.logit_std)
        if self.sampling == "mode":
            # The clamp removes rounding errors below 0 where mode_scale is at either limit.
            return (1 - self.mode_scale * (math.pi / 2 * torch.sin(math.pi * u) - 1)).clamp(min=0)
        if self.sampling == "cosmap":
            return math.pi / 2 / (1 + torch.sin(math.pi * u))
        return torch.ones_like(u)

    def cdf(self, t: Tensor) -> Tensor:
        """Returns the probability of a draw below t, by bisection of `quantile`; (N,) float64."""
        low, high = torch.zeros_like(t), torch.ones_like(t)
        for _ in range(80):
            middle = (low + high) / 2
            is_low = self.quantile(middle) < t
            low, high = torch.where(is_low, middle, low), torch.where(is_low, high, middle)
        return (low + high) / 2


# --- sampling ----------------------------------------------------------------------------------------------------------


class TimeSampler:
    """Samples t from q(t) = p(t) w(t) / Z on [min_t, max_t].

    `mean_weight` is Z, the mean of w over draws from p within the same bounds. Without a weight q = p and Z = 1.
    """

    def __init__(self, density: Density, weight: Function | None, min_t: float, max_t: float) -> None:
        """`weight` maps t to w, both (N,) float64. Raises ValueError where q would be 0 everywhere."""
        self._density, self._weight = density, weight
        self._bounds = (min_t, max_t)
        low, high = density.cdf(torch.tensor([min_t, max_t], dtype=torch.float64)).tolist()
        self._low, self._high = low if min_t > 0 else 0.0, high if max_t < 1 else 1.0
        if not self._high - self._low > _MIN_PROBABILITY:
            raise ValueError("the density is zero everywhere between min_t and max_t")
        self.mean_weight = 1.0
        self._fractions = self._mass = torch.empty(0, dtype=torch.float64)
        if weight is not None:
            self._tabulate(weight)

    def _tabulate(self, weight: Function) -> None:
        """Tabulates the integral of w over the first fraction of p's draws between the bounds, for many fractions."""
        # Evenly spaced in the logit: a weight may have its mass anywhere, also very close to an end.
        self._fractions = torch.sigmoid(torch.linspace(-40, 40, _NUM_NODES, dtype=torch.float64))
        self._fractions[0], self._fractions[-1] = 0.0, 1.0
        weights = weight(self._density.quantile(self._uniform(self._fractions)))
        mass = torch.cumulative_trapezoid(weights, self._fractions)
        self._mass = torch.cat([torch.zeros(1, dtype=torch.float64), mass])
        self.mean_weight = float(self._mass[-1])
        if not self.mean_weight > 0:
            raise ValueError("the weight is zero everywhere between min_t and max_t")

    def _uniform(self, fraction: Tensor) -> Tensor:
        """Maps a fraction of p's draws between the bounds to the uniform number of `Density.quantile`."""
        return self._low + (self._high - self._low) * fraction

    def _fraction(self, u: Tensor) -> Tensor:
        """Maps a fraction of q's draws to the fraction of p's draws that lies below the same t."""
        return u if self._weight is None else _interpolate(u * self._mass[-1], self._mass, self._fractions)

    def draw(self, u: Tensor) -> Tensor:
        """Maps uniform random numbers u (N,) in (0, 1) to t (N,) float64."""
        return self._density.quantile(self._uniform(self._fraction(u))).clamp(*self._bounds)

    def cdf(self, t: Tensor) -> Tensor:
        """Returns the probability of a draw below t; (N,) float64."""
        fraction = (self._density.cdf(t) - self._low) / (self._high - self._low)
        if self._weight is not None:
            fraction = _interpolate(fraction.clamp(0, 1), self._fractions, self._mass) / self.mean_weight
        low, high = self._bounds
        return torch.where(t <= low, 0.0, torch.where(t >= high, 1.0, fraction))

    def density_nodes(self, num_nodes: int) -> tuple[Tensor, Tensor]:
        """Returns (t, q(t)) at increasing t for plots. q may be infinite at single points.

        Half of the nodes are evenly spaced between the bounds, half are quantiles of q.
        """
        margin = 1e-6  # at 0 and 1 themselves p or w may be infinite
        even = torch.linspace(margin, 1 - margin, num_nodes // 2, dtype=torch.float64)
        low, high = self._bounds
        u = torch.cat([self._density.cdf(low + (high - low) * even), self._uniform(self._fraction(even))]).unique()
        t = self._density.quantile(u)
        weight = torch.ones_like(t) if self._weight is None else self._weight(t) / self.mean_weight
        return t, weight / self._density.quantile_slope(u) / (self._high - self._low)


def _interpolate(x: Tensor, xs: Tensor, ys: Tensor) -> Tensor:
    """Interpolates y (N,) at x (N,) linearly through (xs, ys), both increasing and (M,)."""
    right = torch.searchsorted(xs, x).clamp(1, len(xs) - 1)
    left = right - 1
    part = (x - xs[left]) / (xs[right] - xs[left])
    return ys[left] + part * (ys[right] - ys[left])


def density_over_sigma(t: Tensor, density: Tensor, shift: float) -> Tensor:
    """Converts the density of t to that of sigma = shift t / (1 + (shift - 1) t), at the sigma of each t; all (N,)."""
    return density * (1 + (shift - 1) * t).square() / shift


# --- rounding ----------------------------------------------------------------------------------------------------------


def round_time(t: Tensor, grid: TimestepGrid) -> Tensor:
    """Rounds t up to thousandths for "diffusers", which rounds down an index that counts from noise; else returns t."""
    return torch.ceil(t * _GRID_STEPS) / _GRID_STEPS if grid == "diffusers" else t


def round_sigma(sigma: Tensor, grid: TimestepGrid) -> Tensor:
    """Rounds sigma down to thousandths for "sd_scripts", which rounds down the timestep after the shift; else returns it."""
    return torch.floor(sigma * _GRID_STEPS) / _GRID_STEPS if grid == "sd_scripts" else sigma
