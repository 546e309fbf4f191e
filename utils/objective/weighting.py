"""Weights of the loss over the flow time t: how much each t counts. Float64, pure; t is in [0, 1], 1 = noise."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from utils.config.schema.objective_choices import WeightingScheme


@dataclass(frozen=True)
class Weighting:
    """A weight w(t) of the loss, with its parameters."""

    scheme: WeightingScheme
    logit_mean: float = 0.0
    logit_std: float = 1.0
    mode_mean: float = 0.5
    mode_s_n: float = 0.2

    def __call__(self, t: Tensor, sigma: Tensor) -> Tensor:
        """Returns w at t, or for sigma_sqrt at sigma = shift(t); finite and at least 0 on the whole of [0, 1].

        none          1
        sigma_sqrt    sqrt(sigma)
        logit_normal  1/(s sqrt(2 pi)) 1/(t (1 - t)) exp(-(logit t - m)^2 / (2 s^2)), 0 at both ends
        mode          1/(pi s_n) / (e^z + e^-z) with z = (t - mu) / s_n
        cosmap        1 - cos^2(pi t / 2)
        """
        if self.scheme == "sigma_sqrt":
            return sigma.sqrt()
        if self.scheme == "logit_normal":
            return logit_normal_density(t, self.logit_mean, self.logit_std)
        if self.scheme == "mode":
            decay = torch.exp(-((t - self.mode_mean) / self.mode_s_n).abs())  # e^-|z|: e^z itself overflows
            return decay / (1 + decay.square()) / (math.pi * self.mode_s_n)
        if self.scheme == "cosmap":
            return torch.sin(math.pi / 2 * t).square()
        return torch.ones_like(t)


def logit_normal_density(t: Tensor, mean: float, std: float) -> Tensor:
    """Returns the density at t of a variable whose logit is normal.

    It is 0 at t = 0 and 1, where the exponential vanishes faster than 1 / (t (1 - t)) grows.
    """
    inside = t.clamp(torch.finfo(t.dtype).tiny, 1 - torch.finfo(t.dtype).eps / 2)
    logit = torch.log(inside) - torch.log1p(-inside)
    exponent = -((logit - mean) ** 2) / (2 * std**2) - torch.log(inside) - torch.log1p(-inside)
    return torch.where((t > 0) & (t < 1), exponent.exp() / (std * math.sqrt(2 * math.pi)), 0.0)
