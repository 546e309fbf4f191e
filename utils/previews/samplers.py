"""From noise to an image: the steps of sigma, the solvers that take them, and what guides the velocity.

A sampler follows dx/dsigma = v(x, sigma) from sigma = 1, noise, down to 0. The velocity points from the clean latents
D = x - sigma v that the network has in mind to the noise, so the equation is also

    dx/dsigma = (x - D) / sigma,

and between two noise levels, with D held fixed, x_next = r x + (1 - r) D for r = sigma_next / sigma: that is Euler's step.
D changes slowly along the way. DPM-Solver++(2M) (arXiv 2211.01095, alg. 2) makes Euler's step with D carried forward in a
straight line through its last two values, by half a step; the line is drawn over lambda = -log sigma. The choice of lambda
is k-diffusion's (`sample_dpmpp_2m`), which is what Stability's sd3.5 samples with. Of the flow, log((1 - sigma) / sigma)
could be taken as well, as diffusers' DPMSolverMultistepScheduler does: also of second order, and infinite at sigma = 1.

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
    """num_steps + 1 values of sigma from 1 to 0, evenly spaced in t before the shift; float64."""
    return shift_time(torch.linspace(1, 0, num_steps + 1, dtype=torch.float64), shift)


# --- solvers -----------------------------------------------------------------------------------------------------------


class Sampler(Protocol):
    """Takes the steps of one batch, in order."""

    def step(self, latents: Tensor, velocity: Tensor, sigma: float, next_sigma: float) -> Tensor:
        """The latents at next_sigma, from those at sigma and their velocity."""


def euler_step(latents: Tensor, velocity: Tensor, sigma: float, next_sigma: float) -> Tensor:
    """Follow the velocity from sigma to next_sigma in a straight line."""
    return latents + (next_sigma - sigma) * velocity


class Euler:
    """First order: the error halves when the steps double."""

    def step(self, latents: Tensor, velocity: Tensor, sigma: float, next_sigma: float) -> Tensor:
        return euler_step(latents, velocity, sigma, next_sigma)


class DPMSolver2M:
    """Second order, at one velocity a step like Euler. The first step and that to sigma 0 are Euler's."""

    def __init__(self) -> None:
        self._previous: tuple[Tensor, float] | None = None
        """Clean latents of the step before, and its sigma."""

    def step(self, latents: Tensor, velocity: Tensor, sigma: float, next_sigma: float) -> Tensor:
        clean = latents - sigma * velocity
        previous, self._previous = self._previous, (clean, sigma)
        if previous is None or next_sigma == 0:
            return euler_step(latents, velocity, sigma, next_sigma)
        previous_clean, previous_sigma = previous
        share = math.log(sigma / next_sigma) / (2 * math.log(previous_sigma / sigma))
        ahead = clean + share * (clean - previous_clean)
        ratio = next_sigma / sigma
        return ratio * latents + (1 - ratio) * ahead


def make_sampler(name: SamplerName) -> Sampler:
    """A sampler for one batch."""
    return Euler() if name == "euler" else DPMSolver2M()


# --- guidance ----------------------------------------------------------------------------------------------------------


def guide(conditional: Tensor, unconditional: Tensor, cfg: float | Tensor) -> Tensor:
    """Classifier-free guidance: cfg 1 is the conditional velocity alone (arXiv 2207.12598). cfg may be (B, 1, 1, 1)."""
    return unconditional + cfg * (conditional - unconditional)


def guide_from_skipped(velocity: Tensor, conditional: Tensor, skipped: Tensor, scale: float) -> Tensor:
    """Skip-layer guidance: the guided velocity, led away from what the network answers to the prompt without some blocks.

    Source: `SkipLayerCFGDenoiser` of Stability's sd3.5, in clean latents there; diffusers' StableDiffusion3Pipeline.
    """
    return velocity + scale * (conditional - skipped)


def skips_layers(step: int, num_steps: int, start: float, end: float) -> bool:
    """Whether skip-layer guidance is on in a step, counted from 0: strictly between two shares of the steps.

    Source: as `guide_from_skipped`.
    """
    return start * num_steps < step < end * num_steps
