"""The training loop: one optimizer step after the other, and the events that are due after each."""

from __future__ import annotations

import time
from collections.abc import Sequence

from utils.optim.ema import ema_decay
from utils.run.build import Run
from utils.run.events import Event, TrainingState, run_due


def train(run: Run, events: Sequence[Event]) -> None:
    """Trains from the step the run starts or resumes at to its last. All ranks together."""
    ema, clock = run.experiment.config.experiment.ema, run.clock
    if clock.is_start:
        run_due(events, TrainingState(clock))
    steps = range(clock.step, clock.num_steps)
    with run.feed.steps(steps) as batches:
        for step, micro_batches in zip(steps, batches, strict=True):
            began = time.monotonic()
            rates = {name: schedule.at(step, clock.num_steps) for name, schedule in run.schedules.items()}
            decay = ema_decay(ema, step + 1) if ema is not None else None
            result = run.pipeline.train_step(micro_batches, run.feed.shapes(step), rates, decay, step=step)
            clock = clock.after_step(time.monotonic() - began)
            run_due(events, TrainingState(clock, result, rates))
