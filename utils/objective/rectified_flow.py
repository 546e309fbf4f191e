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

PredictionType = Literal["raw", "sigma_scaled", "additive"]
LossType = Literal["l2", "huber", "smooth_l1"]


def shift_time(t: Tensor, shift: float) -> Tensor:
    """sigma = s t / (1 + (s - 1) t): moves [0, 1] towards noise for s > 1; shift 1 leaves it as it is."""
    return shift * t / (1 + (shift - 1) * t)


def add_noise(latents: Tensor, noise: Tensor, sigma: Tensor) -> Tensor:
    """x_t = (1 - sigma) latents + sigma noise; (B, C, H, W), (B, C, H, W), (B,) -> (B, C, H, W)."""
    share = sigma[:, None, None, None]
    return (1 - share) * latents + share * noise


def velocity_target(latents: Tensor, noise: Tensor) -> Tensor:
    """What the network should answer everywhere on the path: noise - latents."""
    return noise - latents


def velocity_of(output: Tensor, noisy_latents: Tensor, prediction_type: PredictionType) -> Tensor:
    """The velocity that the network's output stands for; all (B, C, H, W). additive: output + noisy latents."""
    return output + noisy_latents if prediction_type == "additive" else output


def output_of(velocity: Tensor, noisy_latents: Tensor, prediction_type: PredictionType) -> Tensor:
    """The output that stands for a velocity: the inverse of `velocity_of`."""
    return velocity - noisy_latents if prediction_type == "additive" else velocity


def error_scale(sigma: Tensor, prediction_type: PredictionType) -> Tensor:
    """What the velocity's error is multiplied by before it is penalized; (B,) -> (B,).

    sigma_scaled compares clean latents: x_t - sigma v against z differ by sigma times the velocity's error.
    """
    return sigma if prediction_type == "sigma_scaled" else torch.ones_like(sigma)


def penalty(error: Tensor, loss_type: LossType, huber_c: float) -> Tensor:
    """The loss of each error, alone.

    l2         e^2
    huber      2 c (sqrt(e^2 + c^2) - c)     e^2 where e << c, 2 c |e| where e >> c; differentiable everywhere
    smooth_l1  2 (sqrt(e^2 + c^2) - c)       2 |e| where e >> c
    Source of the smooth forms: arXiv 2403.16728, as the programs of docs/objective.md have them.
    """
    if loss_type == "l2":
        return error.square()
    # sqrt(e^2 + c^2) - c, in a form that does not lose its digits where e << c.
    distance = error.square() / ((error.square() + huber_c**2).sqrt() + huber_c)
    return 2 * (huber_c * distance if loss_type == "huber" else distance)
