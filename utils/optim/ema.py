"""The decay of the exponential moving average (EMA) of the weights as a function of the step. Pure."""

from __future__ import annotations

from utils.config.schema.optimizer import EmaConfig


def ema_decay(config: EmaConfig, step: int) -> float:
    """Returns the fraction of the average, in (0, 1), that is kept when the weights after `step` steps are added to it.

    `step` counts optimizer steps from 1. With the warm-up the decay is min(decay, (1 + step) / (10 + step)), which averages
    over about step / 9 steps. Without it, the initial weights would dominate the average for 1 / (1 - decay) steps.
    """
    if not config.warmup:
        return config.decay
    return min(config.decay, (1 + step) / (10 + step))
