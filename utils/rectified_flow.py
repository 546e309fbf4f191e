"""The objective's mathematics: pure functions of tensors.

A straight path joins data and noise. With t the flow time (0 = data, 1 = noise), sigma = shift(t) is the share of noise,

    x_t = (1 - sigma) z + sigma noise,        dx/dsigma = noise - z = velocity,

and the network learns the velocity from x_t. Sampling follows it from sigma = 1 down to 0. Source: SD3 paper, arXiv
2403.03206, sect. 3; shift: sect. 5.3.2.

Shapes: B batch, C latent channels, H W latent height and width. t and sigma are float32 or float64 whatever the network
trains in: bfloat16 has no 0.999.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

TimestepSampling = Literal["sigma", "logit_normal"]


def shift_time(t: Tensor, shift: float) -> Tensor:
    """sigma = s t / (1 + (s - 1) t): moves [0, 1] towards noise for s > 1; shift 1 leaves it as it is."""
    return shift * t / (1 + (shift - 1) * t)


def time_of_draw(u: Tensor, sampling: TimestepSampling, logit_mean: float, logit_std: float) -> Tensor:
    """Flow time t in (0, 1) from a uniform draw u in (0, 1), by the inverse of the density's distribution function.

    "sigma": uniform. "logit_normal": logit(t) normal with the mean and standard deviation given (SD3 paper, eq. 19).
    """
    if sampling == "sigma":
        return u
    return torch.sigmoid(logit_mean + logit_std * torch.special.ndtri(u))


def add_noise(latents: Tensor, noise: Tensor, sigma: Tensor) -> Tensor:
    """x_t = (1 - sigma) latents + sigma noise; (B, C, H, W), (B, C, H, W), (B,) -> (B, C, H, W)."""
    share = sigma[:, None, None, None]
    return (1 - share) * latents + share * noise


def velocity_target(latents: Tensor, noise: Tensor) -> Tensor:
    """What the network should answer everywhere on the path: noise - latents."""
    return noise - latents


def flow_matching_loss(velocity: Tensor, target: Tensor) -> Tensor:
    """Mean squared error over the batch, in float32; (B, C, H, W) twice -> scalar. Every sample counts alike."""
    return (velocity.float() - target.float()).square().mean()


def sampling_sigmas(num_steps: int, shift: float) -> Tensor:
    """num_steps + 1 values of sigma from 1 to 0, evenly spaced in t before the shift; float64."""
    return shift_time(torch.linspace(1, 0, num_steps + 1, dtype=torch.float64), shift)


def euler_step(latents: Tensor, velocity: Tensor, sigma: float, next_sigma: float) -> Tensor:
    """Follow the velocity from sigma to next_sigma in a straight line."""
    return latents + (next_sigma - sigma) * velocity


def guide(conditional: Tensor, unconditional: Tensor, cfg: float) -> Tensor:
    """Classifier-free guidance: cfg 1 is the conditional velocity alone (arXiv 2207.12598)."""
    return unconditional + cfg * (conditional - unconditional)
