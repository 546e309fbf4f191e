"""Learning rates as functions of the step. Pure."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

Course = Literal["constant", "linear", "cosine"]


@dataclass(frozen=True)
class LearningRateSchedule:
    """A linear warm-up, then a constant, linear or cosine course that ends at the last step."""

    peak: float
    course: Course
    warmup_steps: int
    min_ratio: float
    """Learning rate of the last step as a fraction of the peak; for linear and cosine."""

    def at(self, step: int, num_steps: int) -> float:
        """The learning rate of `step` (counted from 0) in a run of `num_steps`.

        Rises linearly over the warm-up and reaches the peak in the first step after it; then constant, linear or cosine, the
        last two reaching min_ratio exactly in step num_steps - 1.
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
