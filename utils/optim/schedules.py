"""The learning rate as a function of the step. Pure."""

from __future__ import annotations

import math
from dataclasses import dataclass

from utils.config.schema.optimizer import Course, OptimizerConfig, OptimizerGroupConfig


@dataclass(frozen=True)
class LearningRateSchedule:
    """A linear warm-up, then a course that ends at the last step."""

    peak: float
    """The highest learning rate."""
    course: Course
    warmup_steps: int | float
    """A number of steps, or a fraction of all steps if it is a float."""
    min_ratio: float
    """Learning rate of the last step as a fraction of the peak; not for constant and inverse_sqrt."""
    cycles: int = 1
    """Falls from the peak; for cosine_with_restarts."""
    power: float = 2.0
    """Exponent of polynomial."""
    decay_steps: int | float = 0.2
    """Last steps of warmup_stable_decay over which the rate falls; a fraction of all steps if it is a float."""

    def at(self, step: int, num_steps: int) -> float:
        """Returns the learning rate of `step` (counted from 0) in a run of `num_steps`.

        It rises linearly over the warm-up and reaches the peak in the first step after it. Every course but constant and
        inverse_sqrt then reaches min_ratio * peak exactly in step num_steps - 1.
        """
        warmup = _steps(self.warmup_steps, num_steps)
        if step < warmup:
            return self.peak * (step + 1) / (warmup + 1)
        if self.course == "inverse_sqrt":
            return self.peak * math.sqrt(max(1, warmup) / max(1, step + (warmup == 0)))
        progress = (step - warmup) / max(1, num_steps - 1 - warmup)
        fraction = self._fraction(min(1.0, progress), step, num_steps)
        return self.peak * (self.min_ratio + (1.0 - self.min_ratio) * fraction)

    def _fraction(self, progress: float, step: int, num_steps: int) -> float:
        """The fraction of the way from the lowest rate to the peak; `progress` in [0, 1] from the warm-up to the end."""
        if self.course == "constant":
            return 1.0
        if self.course == "linear":
            return 1.0 - progress
        if self.course == "polynomial":
            return float((1.0 - progress) ** self.power)
        if self.course == "warmup_stable_decay":
            decay = _steps(self.decay_steps, num_steps)
            return min(1.0, (num_steps - 1 - step) / max(1, decay))
        if self.course == "cosine_with_restarts" and progress < 1:
            progress = (progress * self.cycles) % 1.0
        return 0.5 * (1.0 + math.cos(math.pi * progress))


def _steps(value: int | float, num_steps: int) -> int:
    return round(value * num_steps) if isinstance(value, float) else value


def schedule_of(config: OptimizerConfig, group: OptimizerGroupConfig | None = None) -> LearningRateSchedule:
    """Returns the schedule of `[optimizer]`, with the values of a parameter group where it has its own."""
    own = {} if group is None else group.model_dump(include=_KEYS, exclude_none=True)
    if group is not None and group.lr_mult is not None:
        own["learning_rate"] = group.lr_mult * config.learning_rate
    config = config.model_copy(update=own)
    return LearningRateSchedule(
        peak=config.learning_rate,
        course=config.lr_scheduler,
        warmup_steps=config.lr_warmup_steps,
        min_ratio=config.lr_min_ratio,
        cycles=config.lr_cycles,
        power=config.lr_power,
        decay_steps=config.lr_decay_steps,
    )


_KEYS = {"learning_rate", "lr_scheduler", "lr_warmup_steps", "lr_min_ratio", "lr_cycles", "lr_power", "lr_decay_steps"}
"""Keys of a schedule, which `[optimizer]` and its groups have in common."""
