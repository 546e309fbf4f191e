"""The checked `[objective]` table as one object: noise levels of draws, and the loss of the network's output.

A run builds one `Objective` (utils/run/build.py); feed, loss, evaluation, previews and reports share it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from utils.config.schema.objective import ObjectiveConfig
from utils.objective import rectified_flow
from utils.objective import timestep_sampling as timesteps
from utils.objective.loss import LossTarget, mean_loss
from utils.objective.timestep_sampling import Density, TimeSampler
from utils.objective.weighting import Weighting

ShiftRule = Callable[[float, int, int], float]
"""(shift of images of `base_pixels`, base_pixels, num_pixels) -> shift of images of `num_pixels`; `ModelFamily.shift_at`."""


@dataclass(frozen=True)
class NoiseLevel:
    """The point of the path at which a draw of an example is trained."""

    t: float
    sigma: float
    weight: float
    """Factor of the loss: w(t), or the mean weight where t is drawn by the weight."""


class Objective:
    """How noise levels are drawn, what the network predicts, and how its error is penalized."""

    def __init__(self, config: ObjectiveConfig, shift_rule: ShiftRule) -> None:
        self.config = config
        self.prediction_type = config.model_prediction_type
        self._shift_rule = shift_rule
        # Building a sampler takes milliseconds and depends on the shift only; several image sizes may share a shift.
        self._sampler = cache(lambda shift: make_sampler(config, shift))

    def shift_at(self, num_pixels: int) -> float:
        """Returns the shift of images of that many pixels: the same for all, unless `shift_resolution` is set."""
        shift, side = self.config.discrete_flow_shift, self.config.shift_resolution
        return shift if side is None else self._shift_rule(shift, side**2, num_pixels)

    def encoder_dropout_rate(self, encoder: str) -> float:
        """Returns the probability that the output of this text encoder is dropped for a draw of an example."""
        rate = self.config.encoder_dropout_rate
        return rate.get(encoder, 0.0) if isinstance(rate, dict) else rate

    def sampler(self, shift: float) -> TimeSampler:
        """Returns the sampler of t for images with this shift."""
        return self._sampler(shift)

    def weight_at(self, t: Tensor, shift: float) -> Tensor:
        """Returns the weight w of each t, float64."""
        return weight_at(self.config, t, shift)

    def noise_level(self, u: float, num_pixels: int) -> NoiseLevel:
        """Maps a uniform random number u in (0, 1) to the noise level of an image of that many pixels."""
        shift = self.shift_at(num_pixels)
        sampler = self.sampler(shift)
        t = timesteps.round_time(sampler.draw(torch.tensor([u], dtype=torch.float64)), self.config.timestep_grid)
        sigma = timesteps.round_sigma(rectified_flow.shift_time(t, shift), self.config.timestep_grid)
        by_loss = self.config.weighting_by == "loss"
        weight = float(_weighting(self.config)(t, sigma)) if by_loss else sampler.mean_weight
        return NoiseLevel(float(t), float(sigma), weight)

    def target(
        self, velocity: Tensor, noisy_latents: Tensor, sigma: Tensor, weight: Tensor, mask: Tensor | None
    ) -> LossTarget:
        """Returns the target of a micro-batch.

        velocity and noisy_latents (B, C, H, W) float32, sigma and weight (B,), mask (B, 1, H, W) or None.
        """
        return LossTarget(
            output=rectified_flow.output_of(velocity, noisy_latents, self.prediction_type),
            error_scale=rectified_flow.error_scale(sigma, self.prediction_type).float(),
            weight=weight.float(),
            mask=torch.ones(len(sigma), 1, 1, 1) if mask is None else mask,
        )

    def loss(self, output: Tensor, target: LossTarget) -> Tensor:
        """Returns the mean loss over the batch, computed in float32; output (B, C, H, W)."""
        return mean_loss(output, target, self.config.loss_type, self.config.huber_c)


def make_sampler(config: ObjectiveConfig, shift: float) -> TimeSampler:
    """Returns the sampler of t for images with this shift. Raises ValueError where nothing could be drawn."""
    density = Density(config.timestep_sampling, config.logit_mean, config.logit_std, config.mode_scale)
    if config.weighting_by == "loss" or config.weighting_scheme == "none":
        return TimeSampler(density, None, config.min_t, config.max_t)
    return TimeSampler(density, lambda t: weight_at(config, t, shift), config.min_t, config.max_t)


def weight_at(config: ObjectiveConfig, t: Tensor, shift: float) -> Tensor:
    """Returns the weight w of each t, float64."""
    return _weighting(config)(t, rectified_flow.shift_time(t, shift))


def _weighting(config: ObjectiveConfig) -> Weighting:
    return Weighting(config.weighting_scheme, config.logit_mean, config.logit_std, config.mode_mean, config.mode_s_n)
