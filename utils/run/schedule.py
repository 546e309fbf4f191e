"""When events happen: a clock of the run, and schedules as pure functions of it."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Clock:
    """How far a run has come, after an optimizer step or before the first."""

    step: int
    """Optimizer steps done."""
    num_steps: int
    """Optimizer steps of the whole run."""
    steps_per_epoch: int
    minutes: float = 0.0
    """Time spent in optimizer steps, resumed runs included."""
    previous_minutes: float = 0.0
    """`minutes` one step earlier."""

    @property
    def is_start(self) -> bool:
        return self.step == 0

    @property
    def is_end(self) -> bool:
        return self.step == self.num_steps

    @property
    def seconds_of_step(self) -> float:
        """Duration of the last step."""
        return 60 * (self.minutes - self.previous_minutes)

    @property
    def epoch(self) -> int:
        """The epoch, counted from 0, that the last step belonged to."""
        return max(0, self.step - 1) // self.steps_per_epoch

    def after_step(self, seconds: float) -> Clock:
        """The clock one optimizer step of that duration later."""
        minutes = self.minutes + seconds / 60
        return replace(self, step=self.step + 1, minutes=minutes, previous_minutes=self.minutes)


@dataclass(frozen=True)
class Schedule:
    """At the start, at the end, and whenever a multiple of some steps, epochs or minutes has been reached in between."""

    every_steps: int | None = None
    every_epochs: float | None = None
    every_minutes: float | None = None
    at_start: bool = False
    at_end: bool = False

    def due(self, clock: Clock) -> bool:
        """Whether the event happens now."""
        if clock.is_start:
            return self.at_start
        if clock.is_end and self.at_end:
            return True
        return (
            _passed(clock.step - 1, clock.step, self.every_steps)
            or _passed(clock.step - 1, clock.step, self.every_epochs and self.every_epochs * clock.steps_per_epoch)
            or _passed(clock.previous_minutes, clock.minutes, self.every_minutes)
        )


EVERY_STEP = Schedule(every_steps=1)


def _passed(before: float, now: float, interval: float | None) -> bool:
    """Whether a multiple of the interval lies in (before, now]."""
    return interval is not None and math.floor(now / interval) > math.floor(before / interval)
