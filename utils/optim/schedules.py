"""The learning rate as a function of the step. Pure."""

from __future__ import annotations

import math
from dataclasses import dataclass

from utils.config.schema.optimizer import Course, OptimizerConfig


@dataclass(frozen=True)
class LearningRateSchedule:
    """A linear warm-up, then a constant, linear or cosine course that ends at the last step."""

    peak: float
    """The highest learning rate."""
    course: Course
    warmup_steps: int
    min_ratio: float
    """Learning rate of the last step as a fraction of the peak; for linear and cosine."""

    def at(self, step: int, num_steps: int) -> float:
        """Returns the learning rate of `step` (counted from 0) in a run of `num_steps`.

        It rises linearly over the warm-up and reaches the peak in the first step after it. A linear or cosine course then
        reaches min_ratio * peak exactly in step num_steps - 1.
        """
        if step < self.warmup_steps:
            return self.peak * (step + 1) / (self.warmup_steps + 1)
        progress = (step - self.warmup_steps) / max(1, num_steps - 1 - self.warmup_steps)
        if self.course == "constant":
            fraction = 1.0
        elif self.course == "linear":
            fraction = 1.0 - progress
        else:
            fraction = 0.5 * (1.0 + math.cos(math.pi * progress))
        return self.peak * (self.min_ratio + (1.0 - self.min_ratio) * fraction)


def schedule_of(config: OptimizerConfig, peak: float | None = None) -> LearningRateSchedule:
    """Returns the schedule of `[optimizer]`, with another peak where a parameter group has a learning rate of its own."""
    return LearningRateSchedule(
        peak=config.learning_rate if peak is None else peak,
        course=config.lr_scheduler,
        warmup_steps=config.lr_warmup_steps,
        min_ratio=config.lr_min_ratio,
    )
