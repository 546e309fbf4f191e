"""Where on the path the network is trained: densities of the flow time t, weights of the loss over t, and drawing from both.

Three things are kept apart that other programs call by the same words (docs/objective.md):

* a density p(t) says how often a time is drawn: `timestep_sampling`;
* a weight w(t) says how much a time counts: `weighting_scheme`;
* what is trained is their product. It can be had by drawing from p and multiplying the loss by w, or by drawing from
  q = p w / Z and multiplying by the constant Z, the integral of p w: the same expectation, but no draw is wasted on a time
  that hardly counts, and no single draw counts fifty times as much as another.

Everything is float64. t is in [0, 1], 1 = noise. Draws take uniform numbers in (0, 1) and make none.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

TimestepSampling = Literal["sigma", "logit_normal", "mode", "cosmap"]
WeightingScheme = Literal["none", "sigma_sqrt", "logit_normal", "mode", "cosmap"]
TimestepGrid = Literal["none", "sd_scripts", "diffusers"]
Function = Callable[[Tensor], Tensor]

MIN_MODE_SCALE, MAX_MODE_SCALE = -1.0, 2 / (math.pi - 2)
"""Between these f_mode rises or falls throughout (SD3 paper, sect. 3.1)."""
_NUM_NODES = 2**17
_GRID_STEPS = 1000.0
_SMALLEST_SHARE = 1e-9
"""Of p's draws between min_t and max_t: below, too few float64 numbers are left of u to tell one draw from another."""


# --- weights -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Weighting:
    """A weight w(t) of the loss, with its parameters."""

    scheme: WeightingScheme
    logit_mean: float = 0.0
    logit_std: float = 1.0
    mode_mean: float = 0.5
    mode_s_n: float = 0.2

    def __call__(self, t: Tensor, sigma: Tensor) -> Tensor:
        """w at t, and for sigma_sqrt at sigma = shift(t); finite and at least 0 on the whole of [0, 1].

        none          1
        sigma_sqrt    sqrt(sigma)
        logit_normal  1/(s sqrt(2 pi)) 1/(t (1 - t)) exp(-(logit t - m)^2 / (2 s^2)), 0 at both ends
        mode          1/(pi s_n) / (e^z + e^-z) with z = (t - mu) / s_n
        cosmap        1 - cos^2(pi t / 2)
        """
        if self.scheme == "sigma_sqrt":
            return sigma.sqrt()
        if self.scheme == "logit_normal":
            return _logit_normal(t, self.logit_mean, self.logit_std)
        if self.scheme == "mode":
            decay = torch.exp(-((t - self.mode_mean) / self.mode_s_n).abs())  # e^-|z|: e^z itself overflows
            return decay / (1 + decay.square()) / (math.pi * self.mode_s_n)
        if self.scheme == "cosmap":
            return torch.sin(math.pi / 2 * t).square()
        return torch.ones_like(t)


def _logit_normal(t: Tensor, mean: float, std: float) -> Tensor:
    """The density of t whose logit is normal; 0 at 0 and 1, where the exponential falls faster than 1/(t (1 - t)) grows."""
    inside = t.clamp(torch.finfo(t.dtype).tiny, 1 - torch.finfo(t.dtype).eps / 2)
    logit = torch.log(inside) - torch.log1p(-inside)
    exponent = -((logit - mean) ** 2) / (2 * std**2) - torch.log(inside) - torch.log1p(-inside)
    return torch.where((t > 0) & (t < 1), exponent.exp() / (std * math.sqrt(2 * math.pi)), 0.0)


# --- densities ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Density:
    """A density p(t) on [0, 1], with its parameters."""

    sampling: TimestepSampling
    logit_mean: float = 0.0
    logit_std: float = 1.0
    mode_scale: float = 1.29

    def time(self, u: Tensor) -> Tensor:
        """Inverse of the distribution function: t of a uniform u in [0, 1]; rises from 0 to 1.

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

    def slope(self, u: Tensor) -> Tensor:
        """dt/du, so that p(t(u)) = 1 / slope(u)."""
        if self.sampling == "logit_normal":
            return 1 / _logit_normal(self.time(u), self.logit_mean, self.logit_std)
        if self.sampling == "mode":
            return (1 - self.mode_scale * (math.pi / 2 * torch.sin(math.pi * u) - 1)).clamp(min=0)  # 0 at either limit
        if self.sampling == "cosmap":
            return math.pi / 2 / (1 + torch.sin(math.pi * u))
        return torch.ones_like(u)

    def uniform_of(self, t: Tensor) -> Tensor:
        """Distribution function: the u whose time is t, by bisection; (N,) float64."""
        low, high = torch.zeros_like(t), torch.ones_like(t)
        for _ in range(80):
            middle = (low + high) / 2
            is_low = self.time(middle) < t
            low, high = torch.where(is_low, middle, low), torch.where(is_low, high, middle)
        return (low + high) / 2


# --- drawing -----------------------------------------------------------------------------------------------------------


class TimeSampler:
    """Draws t from q(t) = p(t) w(t) / Z on [min_t, max_t].

    Z, `mean_weight`, is the mean of w over draws from p alone, within the same bounds. Without a weight q = p and Z = 1.
    """

    def __init__(self, density: Density, weight: Function | None, min_t: float, max_t: float) -> None:
        """`weight` takes t and gives w, both (N,) float64. Raises ValueError where nothing could be drawn."""
        self._density, self._weight = density, weight
        self._bounds = (min_t, max_t)
        low, high = density.uniform_of(torch.tensor([min_t, max_t], dtype=torch.float64)).tolist()
        self._low, self._high = low if min_t > 0 else 0.0, high if max_t < 1 else 1.0
        if not self._high - self._low > _SMALLEST_SHARE:
            raise ValueError("the density is zero everywhere between min_t and max_t")
        self.mean_weight = 1.0
        self._shares = self._mass = torch.empty(0, dtype=torch.float64)
        if weight is not None:
            self._tabulate(weight)

    def _tabulate(self, weight: Function) -> None:
        """Mass of w up to each of many shares of p's draws."""
        # Evenly spaced in the logit: a weight may have its mass anywhere, also very near to an end.
        self._shares = torch.sigmoid(torch.linspace(-40, 40, _NUM_NODES, dtype=torch.float64))
        self._shares[0], self._shares[-1] = 0.0, 1.0
        mass = torch.cumulative_trapezoid(weight(self._density.time(self._uniform(self._shares))), self._shares)
        self._mass = torch.cat([torch.zeros(1, dtype=torch.float64), mass])
        self.mean_weight = float(self._mass[-1])
        if not self.mean_weight > 0:
            raise ValueError("the weight is zero everywhere between min_t and max_t")

    def _uniform(self, share: Tensor) -> Tensor:
        """The u that p's draws between the bounds are made of, at a share of them."""
        return self._low + (self._high - self._low) * share

    def _share(self, u: Tensor) -> Tensor:
        """The share of p's draws that is below the same t as a share u of q's."""
        return u if self._weight is None else _interpolate(u * self._mass[-1], self._mass, self._shares)

    def draw(self, u: Tensor) -> Tensor:
        """t (N,) float64 of uniform numbers u (N,) in (0, 1)."""
        return self._density.time(self._uniform(self._share(u))).clamp(*self._bounds)

    def share_below(self, t: Tensor) -> Tensor:
        """Distribution function of q: the share of draws below t; (N,) float64."""
        share = (self._density.uniform_of(t) - self._low) / (self._high - self._low)
        if self._weight is not None:
            share = _interpolate(share.clamp(0, 1), self._shares, self._mass) / self.mean_weight
        low, high = self._bounds
        return torch.where(t <= low, 0.0, torch.where(t >= high, 1.0, share))

    def density_nodes(self, num_nodes: int) -> tuple[Tensor, Tensor]:
        """(t, q(t)) at rising t, for plots: half of them evenly spaced, half where q draws. q may be infinite at points."""
        margin = 1e-6  # at the very ends p or w may be infinite
        even = torch.linspace(margin, 1 - margin, num_nodes // 2, dtype=torch.float64)
        low, high = self._bounds
        u = torch.cat([self._density.uniform_of(low + (high - low) * even), self._uniform(self._share(even))]).unique()
        t = self._density.time(u)
        weight = torch.ones_like(t) if self._weight is None else self._weight(t) / self.mean_weight
        return t, weight / self._density.slope(u) / (self._high - self._low)


def _interpolate(x: Tensor, xs: Tensor, ys: Tensor) -> Tensor:
    """y (N,) at x (N,) on the straight lines through (xs, ys), both rising and (M,)."""
    right = torch.searchsorted(xs, x).clamp(1, len(xs) - 1)
    left = right - 1
    part = (x - xs[left]) / (xs[right] - xs[left])
    return ys[left] + part * (ys[right] - ys[left])


def density_over_sigma(t: Tensor, density: Tensor, shift: float) -> Tensor:
    """The density of sigma = shift t / (1 + (shift - 1) t), at the sigma of each t, from that of t; all (N,)."""
    return density * (1 + (shift - 1) * t).square() / shift


# --- rounding ----------------------------------------------------------------------------------------------------------


def round_time(t: Tensor, grid: TimestepGrid) -> Tensor:
    """t as diffusers' scheduler table has it: its index is rounded down, and counts from noise. Else unchanged."""
    return torch.ceil(t * _GRID_STEPS) / _GRID_STEPS if grid == "diffusers" else t


def round_sigma(sigma: Tensor, grid: TimestepGrid) -> Tensor:
    """sigma as sd-scripts has it: the timestep is rounded down after the shift, to 0 at the lowest. Else unchanged."""
    return torch.floor(sigma * _GRID_STEPS) / _GRID_STEPS if grid == "sd_scripts" else sigma
