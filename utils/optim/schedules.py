"""The learning rate as a function of the step. Pure."""

from __future__ import annotations

import math
from dataclasses import dataclass

from utils.config.schema.optimizer import Course, OptimizerConfig


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


def schedule_of(config: OptimizerConfig, peak: float | None = None) -> LearningRateSchedule:
    """Returns the schedule of `[optimizer]`, with another peak where a parameter group has a learning rate of its own."""
    return LearningRateSchedule(
        peak=config.learning_rate if peak is None else peak,
        course=config.lr_scheduler,
        warmup_steps=config.lr_warmup_steps,
        min_ratio=config.lr_min_ratio,
        cycles=config.lr_cycles,
        power=config.lr_power,
        decay_steps=config.lr_decay_steps,
    )
