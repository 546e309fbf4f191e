"""Rectified flow: the path from data to noise, the velocity along it, and the network's prediction. Pure functions.

A straight path connects data and noise. With t the flow time (0 = data, 1 = noise), sigma = shift(t) is the noise fraction,

    x_t = (1 - sigma) z + sigma noise,        dx/dsigma = noise - z = velocity,

and the network is trained to predict the velocity from x_t. Sampling follows the velocity from sigma = 1 down to 0. Source:
SD3 paper, arXiv 2403.03206, sect. 3; shift: sect. 5.3.2.

Shapes: B batch, C latent channels, H W latent height and width. t and sigma are float32 or float64 whatever the training
dtype: bfloat16 cannot represent 0.999.
"""

from __future__ import annotations

import torch
from torch import Tensor

from utils.config.schema.objective_choices import PredictionType


def shift_time(t: Tensor, shift: float) -> Tensor:
    """Returns sigma = s t / (1 + (s - 1) t): s > 1 moves [0, 1] towards noise; shift 1 changes nothing."""
    return shift * t / (1 + (shift - 1) * t)


def add_noise(latents: Tensor, noise: Tensor, sigma: Tensor) -> Tensor:
    """Returns x_t = (1 - sigma) latents + sigma noise; (B, C, H, W), (B, C, H, W), (B,) -> (B, C, H, W)."""
    fraction = sigma[:, None, None, None]
    return (1 - fraction) * latents + fraction * noise


def velocity_target(latents: Tensor, noise: Tensor) -> Tensor:
    """Returns the velocity to be predicted at every t: noise - latents."""
    return noise - latents


def velocity_of(output: Tensor, noisy_latents: Tensor, prediction_type: PredictionType) -> Tensor:
    """Converts the network's output to a velocity; all (B, C, H, W). additive: output + noisy latents."""
    return output + noisy_latents if prediction_type == "additive" else output


def output_of(velocity: Tensor, noisy_latents: Tensor, prediction_type: PredictionType) -> Tensor:
    """Converts a velocity to the output that represents it: the inverse of `velocity_of`."""
    return velocity - noisy_latents if prediction_type == "additive" else velocity


def error_scale(sigma: Tensor, prediction_type: PredictionType) -> Tensor:
    """Returns the factor of the velocity's error before it is penalized; (B,) -> (B,).

    sigma_scaled compares clean latents: the error of x_t - sigma v as an estimate of z is sigma times the velocity's error.
    """
    return sigma if prediction_type == "sigma_scaled" else torch.ones_like(sigma)
