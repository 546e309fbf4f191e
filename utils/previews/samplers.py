"""Sampling from noise to an image: the sequence of sigma, the solvers, and guidance of the velocity.

A sampler integrates dx/dsigma = v(x, sigma) from sigma = 1, noise, down to 0. The velocity implies an estimate of the
clean latents, D = x - sigma v, so the equation is also

    dx/dsigma = (x - D) / sigma,

and between two noise levels, with D held constant, x_next = r x + (1 - r) D for r = sigma_next / sigma: Euler's step. D
changes slowly along the path. DPM-Solver++(2M) (arXiv 2211.01095, alg. 2) makes Euler's step with D extrapolated linearly
from its last two values by half a step, as a function of lambda = -log sigma. This lambda is that of k-diffusion
(`sample_dpmpp_2m`), with which Stability's sd3.5 samples. For a flow, lambda = log((1 - sigma) / sigma) is possible too,
as in diffusers' DPMSolverMultistepScheduler: it is also of second order, but infinite at sigma = 1.

Shapes: latents and velocities (B, C, H, W). sigma is a Python float.
"""

from __future__ import annotations

import math
from typing import Literal, Protocol

import torch
from torch import Tensor

from utils.objective.rectified_flow import shift_time

SamplerName = Literal["euler", "dpmpp_2m"]


def sampling_sigmas(num_steps: int, shift: float) -> Tensor:
    """Returns num_steps + 1 values of sigma from 1 to 0, evenly spaced in t before the shift; float64."""
    return shift_time(torch.linspace(1, 0, num_steps + 1, dtype=torch.float64), shift)


# --- solvers -----------------------------------------------------------------------------------------------------------


class Sampler(Protocol):
    """A solver with the state of one batch; its steps are made in order."""

    def step(self, latents: Tensor, velocity: Tensor, sigma: float, next_sigma: float) -> Tensor:
        """Returns the latents at next_sigma, from those at sigma and their velocity."""


def euler_step(latents: Tensor, velocity: Tensor, sigma: float, next_sigma: float) -> Tensor:
    """Returns the latents after following the velocity from sigma to next_sigma in a straight line."""
    return latents + (next_sigma - sigma) * velocity


class Euler:
    """First order: doubling the number of steps halves the error."""

    def step(self, latents: Tensor, velocity: Tensor, sigma: float, next_sigma: float) -> Tensor:
        return euler_step(latents, velocity, sigma, next_sigma)


class DPMSolver2M:
    """Second order with one velocity per step, like Euler. The first step and the step to sigma 0 are Euler's."""

    def __init__(self) -> None:
        self._previous: tuple[Tensor, float] | None = None
        """The clean latents estimated in the previous step, and its sigma."""

    def step(self, latents: Tensor, velocity: Tensor, sigma: float, next_sigma: float) -> Tensor:
        clean = latents - sigma * velocity
        previous, self._previous = self._previous, (clean, sigma)
        if previous is None or next_sigma == 0:
            return euler_step(latents, velocity, sigma, next_sigma)
        previous_clean, previous_sigma = previous
        factor = math.log(sigma / next_sigma) / (2 * math.log(previous_sigma / sigma))
        extrapolated = clean + factor * (clean - previous_clean)
        ratio = next_sigma / sigma
        return ratio * latents + (1 - ratio) * extrapolated


def make_sampler(name: SamplerName) -> Sampler:
    """Returns a new sampler for one batch."""
    return Euler() if name == "euler" else DPMSolver2M()


# --- guidance ----------------------------------------------------------------------------------------------------------


def guide(conditional: Tensor, unconditional: Tensor, cfg: float | Tensor) -> Tensor:
    """Applies classifier-free guidance (arXiv 2207.12598); cfg 1 gives the conditional velocity. cfg may be (B, 1, 1, 1)."""
    return unconditional + cfg * (conditional - unconditional)


def guide_from_skipped(velocity: Tensor, conditional: Tensor, skipped: Tensor, scale: float) -> Tensor:
    """Applies skip-layer guidance: guides away from the prediction for the same prompt with some blocks skipped.

    Source: `SkipLayerCFGDenoiser` of Stability's sd3.5, there for clean latents; diffusers' StableDiffusion3Pipeline.
    """
    return velocity + scale * (conditional - skipped)


def skips_layers(step: int, num_steps: int, start: float, end: float) -> bool:
    """Whether skip-layer guidance is on in a step, counted from 0: strictly between two fractions of the steps.

    Source: as `guide_from_skipped`.
    """
    return start * num_steps < step < end * num_steps
