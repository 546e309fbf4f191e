"""The `[objective]` table as one object: which noise level a draw gets, and what the network's answer to it costs."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

from utils.config.presets import PRESETS
from utils.config.schema.objective import ObjectiveConfig
from utils.objective import rectified_flow
from utils.objective import timestep_sampling as timesteps
from utils.objective.timestep_sampling import Density, TimeSampler, Weighting


@dataclass(frozen=True)
class NoiseLevel:
    """Where on the path a draw is trained."""

    t: float
    sigma: float
    weight: float
    """Factor of its loss: the weight at t, or the mean weight where times are drawn by the weight."""


class LossTarget(NamedTuple):
    """What the last stage compares the network's output with; B rows. A tuple, as the engine moves tuples of tensors."""

    output: Tensor
    """(B, C, H, W) float32: what the output should be."""
    error_scale: Tensor
    """(B,) float32: factor of the error before it is penalized."""
    weight: Tensor
    """(B,) float32: factor of each row's loss."""
    mask: Tensor
    """(B, 1, H, W) float32 in [0, 1], how much each place counts; (B, 1, 1, 1) of ones where all count alike."""


class Objective:
    """What a checked `[objective]` means."""

    def __init__(self, config: ObjectiveConfig) -> None:
        self.config = config
        self.prediction_type = config.model_prediction_type
        self.density = Density(config.timestep_sampling, config.logit_mean, config.logit_std, config.mode_scale)
        self.weighting = Weighting(
            config.weighting_scheme, config.logit_mean, config.logit_std, config.mode_mean, config.mode_s_n
        )
        # A sampler takes milliseconds to make and only depends on the shift; sizes share shifts.
        self._sampler = cache(self._make_sampler)

    def shift_at(self, num_pixels: int) -> float:
        """The shift of images of that many pixels: sqrt(m / n) times the shift at n (SD3 paper, eq. 23)."""
        shift, side = self.config.discrete_flow_shift, self.config.shift_resolution
        return shift if side is None else shift * math.sqrt(num_pixels / side**2)

    def encoder_dropout_rate(self, encoder: str) -> float:
        """The share of draws at which this text encoder's output is dropped."""
        rate = self.config.encoder_dropout_rate
        return rate.get(encoder, 0.0) if isinstance(rate, dict) else rate

    def sampler(self, shift: float) -> TimeSampler:
        """What draws t where the shift is this."""
        return self._sampler(shift)

    def _make_sampler(self, shift: float) -> TimeSampler:
        config = self.config
        if config.weighting_by == "loss" or config.weighting_scheme == "none":
            return TimeSampler(self.density, None, config.min_t, config.max_t)
        return TimeSampler(self.density, lambda t: self.weight_at(t, shift), config.min_t, config.max_t)

    def weight_at(self, t: Tensor, shift: float) -> Tensor:
        """The weight w of each t, float64."""
        return self.weighting(t, rectified_flow.shift_time(t, shift))

    def noise_level(self, u: float, num_pixels: int) -> NoiseLevel:
        """The level of a uniform draw u in (0, 1) for an image of that many pixels."""
        shift = self.shift_at(num_pixels)
        sampler = self.sampler(shift)
        t = timesteps.round_time(sampler.draw(torch.tensor([u], dtype=torch.float64)), self.config.timestep_grid)
        sigma = timesteps.round_sigma(rectified_flow.shift_time(t, shift), self.config.timestep_grid)
        by_loss = self.config.weighting_by == "loss"
        weight = float(self.weighting(t, sigma)) if by_loss else sampler.mean_weight
        return NoiseLevel(float(t), float(sigma), weight)

    def target(
        self, velocity: Tensor, noisy_latents: Tensor, sigma: Tensor, weight: Tensor, mask: Tensor | None
    ) -> LossTarget:
        """velocity and noisy_latents (B, C, H, W) float32, sigma and weight (B,), mask (B, 1, H, W) or None."""
        return LossTarget(
            output=rectified_flow.output_of(velocity, noisy_latents, self.prediction_type),
            error_scale=rectified_flow.error_scale(sigma, self.prediction_type).float(),
            weight=weight.float(),
            mask=torch.ones(len(sigma), 1, 1, 1) if mask is None else mask,
        )

    def loss(self, output: Tensor, target: LossTarget) -> Tensor:
        """Mean over the batch, in float32; output (B, C, H, W). Masked places count in the mean, as nothing."""
        error = (output.float() - target.output) * target.error_scale[:, None, None, None]
        penalty = rectified_flow.penalty(error, self.config.loss_type, self.config.huber_c)
        return ((penalty * target.mask).mean(dim=(1, 2, 3)) * target.weight).mean()


NO_TARGET = LossTarget(*(torch.empty(0) for _ in range(4)))
"""Of stages that are not the last."""


MIN_MEAN_WEIGHT = 1e-4
"""Below it, what is trained counts for next to nothing: somebody took t for a timestep, or bounds for others."""


def keys_in_use(config: ObjectiveConfig) -> dict[str, bool]:
    """Keys that matter to some objectives only -> whether they matter to this one."""
    normal = "logit_normal" in (config.timestep_sampling, config.weighting_scheme)
    return {
        "logit_mean": normal,
        "logit_std": normal,
        "mode_scale": config.timestep_sampling == "mode",
        "mode_mean": config.weighting_scheme == "mode",
        "mode_s_n": config.weighting_scheme == "mode",
        "huber_c": config.loss_type != "l2",
        "weighting_by": config.weighting_scheme != "none",
    }


def unread_keys(config: ObjectiveConfig) -> list[str]:
    """Keys that were given another value than the preset's or the default and have no effect on this objective."""
    defaults = {name: field.default for name, field in type(config).model_fields.items()}
    usual = {**defaults, **(PRESETS[config.preset] if config.preset is not None else {})}
    values = config.model_dump()
    return sorted(key for key, used in keys_in_use(config).items() if not used and values[key] != usual[key])


def objective_errors(config: ObjectiveConfig) -> list[tuple[str, str]]:
    """Settings that are possible one by one and together leave nothing to train, as (key, message)."""
    advice = "widen min_t to max_t, or change timestep_sampling or weighting_scheme"
    by_sampling = Objective(config.model_copy(update={"weighting_by": "sampling"}))
    try:
        mean = by_sampling.sampler(config.discrete_flow_shift).mean_weight
    except ValueError as error:
        return [("objective", f"{error}; {advice}")]
    if mean < MIN_MEAN_WEIGHT:
        message = f"between min_t and max_t the weight {config.weighting_scheme} is next to nothing, {mean:.1g} on average"
        return [("objective", f"{message}; {advice}")]
    return []
