"""Schedules are pure functions of the clock: due steps for every interval, at the start, at the end, after a resume."""

from __future__ import annotations

import pytest

from utils.run.schedule import EVERY_STEP, Clock, Schedule


def due_steps(
    schedule: Schedule, num_steps: int = 10, steps_per_epoch: int = 4, start: int = 0, minutes: float = 0.0
) -> list[int]:
    """The steps at which the schedule is due in a run whose steps take 30 seconds each."""
    clock = Clock(start, num_steps, steps_per_epoch, minutes)
    steps = [0] if start == 0 and schedule.due(clock) else []
    for _ in range(start, num_steps):
        clock = clock.after_step(30.0)
        if schedule.due(clock):
            steps.append(clock.step)
    return steps


@pytest.mark.parametrize(
    ("schedule", "steps"),
    [
        (Schedule(), []),
        (EVERY_STEP, list(range(1, 11))),
        (Schedule(every_steps=3), [3, 6, 9]),
        (Schedule(every_steps=3, at_end=True), [3, 6, 9, 10]),
        (Schedule(every_steps=5, at_start=True, at_end=True), [0, 5, 10]),
        (Schedule(at_start=True), [0]),
        (Schedule(every_epochs=1), [4, 8]),
        (Schedule(every_epochs=0.5), [2, 4, 6, 8, 10]),
        (Schedule(every_epochs=0.375), [2, 3, 5, 6, 8, 9]),
        (Schedule(every_minutes=2), [4, 8]),
        (Schedule(every_minutes=0.1), list(range(1, 11))),
        (Schedule(every_steps=5, every_epochs=1, every_minutes=1.5), [3, 4, 5, 6, 8, 9, 10]),
    ],
)
def test_due_steps(schedule: Schedule, steps: list[int]) -> None:
    assert due_steps(schedule) == steps


@pytest.mark.parametrize("schedule", [Schedule(every_steps=3), Schedule(every_epochs=0.75), Schedule(every_minutes=1.5)])
@pytest.mark.parametrize("start", range(10))
def test_a_resumed_run_has_the_due_steps_of_an_uninterrupted_one(schedule: Schedule, start: int) -> None:
    uninterrupted = [step for step in due_steps(schedule) if step > start]
    assert due_steps(schedule, start=start, minutes=start / 2) == uninterrupted


def test_clock_counts_epochs_from_zero() -> None:
    clock = Clock(0, 10, 4)
    epochs = []
    for _ in range(10):
        clock = clock.after_step(1.0)
        epochs.append(clock.epoch)
    assert epochs == [0, 0, 0, 0, 1, 1, 1, 1, 2, 2]


def test_clock_has_the_duration_of_the_last_step() -> None:
    assert Clock(3, 10, 4, minutes=5.0).after_step(12.0).seconds_of_step == pytest.approx(12.0)
