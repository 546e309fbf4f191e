"""What happens around the optimizer steps of a run: an event for each, with a schedule of its own.

The loop runs the events that are due, in the order of `make_events`, on all ranks together. None of them changes what is
trained. The checkpoint comes last, so that nothing that belongs to its step is missing after a resume.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from utils.checkpoint.save import save
from utils.config.schema.optimizer import DEFAULT_GROUP, NO_DECAY
from utils.distributed.world import world
from utils.evaluation.evaluate import Evaluation
from utils.evaluation.points import make_points
from utils.export.weights import Exporter, drop_weights_after, keep_newest_weights
from utils.objective.rectified_flow import shift_time
from utils.pipeline.engine import StepResult
from utils.previews.sampling import Previews
from utils.report.run_page import write_report
from utils.run.banner import objective_rows, summary
from utils.run.build import LOG, Run
from utils.run.folder import BEST_WEIGHTS, CHECKPOINTS, SAMPLES, WEIGHTS
from utils.run.schedule import EVERY_STEP, Clock, Schedule
from utils.tracking.metrics import RunLog, StepMetrics

NUM_TIME_BINS = 64


@dataclass
class TrainingState:
    """The run at one point of its loop: before the first step, or after a step."""

    clock: Clock
    result: StepResult | None = None
    """None before the first step."""
    learning_rates: Mapping[str, float] = field(default_factory=dict)
    """Parameter group -> learning rate of the step."""
    past: list[str] = field(default_factory=list)
    """Names of the events that have run at this point."""


class Event(ABC):
    """One kind of thing that happens now and then."""

    name: str
    schedule: Schedule

    def is_due(self, state: TrainingState) -> bool:
        """Whether the event happens now; the same on every rank."""
        return self.schedule.due(state.clock)

    @abstractmethod
    def run(self, state: TrainingState) -> None:
        """Called on all ranks together."""

    def state(self, clock: Clock) -> dict[str, Any]:
        """What a resumed run needs to know of earlier events; saved as JSON with every checkpoint, if it is not empty."""
        return {}


def run_due(events: Sequence[Event], state: TrainingState) -> None:
    """Runs the events that are due, in order."""
    for event in events:
        if event.is_due(state):
            event.run(state)
            state.past.append(event.name)


def make_events(run: Run, log: RunLog) -> list[Event]:
    """The events of a run, in the order in which they run at one step. All ranks together."""
    config = run.experiment.config.experiment
    write_timestep_density(run, log)
    if world().is_main:
        drop_weights_after(run.folder / BEST_WEIGHTS, run.clock.step)
    events: list[Event] = [StopIfNotFinite(run), LogStep(log)]
    if config.eval is not None:
        evaluate = Evaluate(run, log)
        events.append(evaluate)
        if config.eval.keep_best:
            events.append(ExportBest(run, evaluate))
    if run.experiment.prompts:
        events.append(Preview(run))
    if config.monitoring.report:
        events.append(Report(run))
    events.append(Export(run))
    events.append(SaveCheckpoint(run, events))
    return events


# --- every step --------------------------------------------------------------------------------------------------------


class StopIfNotFinite(Event):
    """A non-finite loss or gradient norm ends the run with an error before anything of the step is logged or saved."""

    name = "stop if not finite"
    schedule = EVERY_STEP

    def __init__(self, run: Run) -> None:
        self._order = run.order

    def run(self, state: TrainingState) -> None:
        """Raises FloatingPointError with the keys of the step's examples."""
        result, step = state.result, state.clock.step
        assert result is not None
        if not (math.isfinite(result.loss) and math.isfinite(result.grad_norm)):
            names = ", ".join(draw.example.key for draw in self._order.global_batch(step - 1))
            origin = f" (first in {result.bad_parameter})" if result.bad_parameter and math.isfinite(result.loss) else ""
            raise FloatingPointError(
                f"step {step}: loss {result.loss}, gradient norm {result.grad_norm}{origin}; the batch was {names}. "
                "No weight was changed, and nothing of this step was saved."
            )


class LogStep(Event):
    """Writes the metrics of the step. Its state is the time spent in steps, from which schedules in minutes continue."""

    name = LOG
    schedule = EVERY_STEP

    def __init__(self, log: RunLog) -> None:
        self._log = log

    def run(self, state: TrainingState) -> None:
        result, clock = state.result, state.clock
        assert result is not None
        others = {
            name: rate
            for name, rate in state.learning_rates.items()
            if name != DEFAULT_GROUP and not name.endswith(NO_DECAY)  # these have the rate of the group they are part of
        }
        metrics = StepMetrics(clock.step, clock.epoch, result.loss, state.learning_rates[DEFAULT_GROUP], result.grad_norm)
        self._log.write(metrics, clock.seconds_of_step, others)

    def state(self, clock: Clock) -> dict[str, Any]:
        return {"minutes": clock.minutes}


def write_timestep_density(run: Run, log: RunLog) -> None:
    """Writes the density of t and of sigma from this step on, averaged over buckets, to TensorBoard."""
    edges = torch.linspace(0, 1, NUM_TIME_BINS + 1, dtype=torch.float64)
    counts = run.experiment.dataset.bucket_counts()
    densities = torch.zeros(2, NUM_TIME_BINS, dtype=torch.float64)
    for bucket, count in counts.items():
        shift = run.objective.shift_at(bucket.width * bucket.height)
        sampler = run.objective.sampler(shift)
        both = [sampler.cdf(times).diff() for times in (edges, shift_time(edges, 1 / shift))]
        densities += count / sum(counts.values()) * torch.stack(both)
    for name, part in zip(("t", "sigma"), densities, strict=True):
        log.write_distribution(f"objective/{name}", run.clock.step, part.tolist())


# --- now and then ------------------------------------------------------------------------------------------------------


class Evaluate(Event):
    """Evaluates at the start, at the end and every `eval.every_n_steps`, and when the run folder has no evaluation yet."""

    name = "evaluate"

    def __init__(self, run: Run, log: RunLog) -> None:
        config = run.experiment.config.experiment
        assert config.eval is not None
        points = make_points(run.experiment.eval_sets, config.eval.num_t_bands, config.seed, run.objective.shift_at)
        self.schedule = Schedule(config.eval.every_n_steps, at_start=True, at_end=True)
        self.is_best = False
        """Whether the last evaluation had the lowest loss so far."""
        self._best: dict[str, Any] = run.saved_events.get(self.name, {})
        """Points and loss of the best evaluation; kept in checkpoints, so that evaluations.jsonl may be lost."""
        self._log = log
        self._evaluation = Evaluation(
            run.experiment.family,
            run.data,
            run.pipeline,
            run.objective,
            config.eval,
            points,
            dtype=config.model.torch_dtype,
            folder=run.folder,
            seed=config.seed,
            num_replicas=run.experiment.num_replicas,
            start_step=run.clock.step,
        )

    def is_due(self, state: TrainingState) -> bool:
        return super().is_due(state) or not self._evaluation.has_results

    def run(self, state: TrainingState) -> None:
        result = self._evaluation.run(state.clock.step)
        comparable = self._best.get("points") == result.fingerprint
        self.is_best = result.is_best and not (comparable and self._best["loss"] <= result.loss)
        if self.is_best:
            self._best = {"points": result.fingerprint, "step": result.step, "loss": result.loss}
        self._log.write_scalars(state.clock.step, result.scalars())

    def state(self, clock: Clock) -> dict[str, Any]:
        return self._best


class ExportBest(Event):
    """Exports the weights after an evaluation with the lowest loss so far; the initial weights are never exported."""

    name = "export best"

    def __init__(self, run: Run, evaluate: Evaluate) -> None:
        self._run, self._evaluate = run, evaluate

    def is_due(self, state: TrainingState) -> bool:
        return self._evaluate.name in state.past and self._evaluate.is_best and not state.clock.is_start

    def run(self, state: TrainingState) -> None:
        _export(self._run, BEST_WEIGHTS, state.clock.step)


class Preview(Event):
    """Generates preview images at the start, at the end and every `sampling.every_n_steps`."""

    name = "preview"

    def __init__(self, run: Run) -> None:
        config = run.experiment.config.experiment
        self.schedule = Schedule(config.sampling.every_n_steps, at_start=True, at_end=True)
        self._previews = Previews(
            run.experiment.family,
            run.data,
            run.pipeline,
            run.objective,
            config.sampling,
            run.experiment.prompts,
            dtype=config.model.torch_dtype,
            num_replicas=run.experiment.num_replicas,
            folder=run.folder / SAMPLES,
        )

    def run(self, state: TrainingState) -> None:
        self._previews.generate(state.clock.step)


class Report(Event):
    """Writes report.html at the start and at the end, and after every evaluation and preview."""

    name = "report"
    schedule = Schedule(at_start=True, at_end=True)

    def __init__(self, run: Run) -> None:
        self._run = run

    def is_due(self, state: TrainingState) -> bool:
        return super().is_due(state) or not {Evaluate.name, Preview.name}.isdisjoint(state.past)

    def run(self, state: TrainingState) -> None:
        if world().is_main:
            experiment = self._run.experiment
            rows = summary(experiment, self._run.order)
            write_report(self._run.folder, rows, objective_rows(experiment.config.experiment.objective), self._run.objective)


class Export(Event):
    """Exports public weights at the end and every `save.export_every_n_steps`."""

    name = "export"

    def __init__(self, run: Run) -> None:
        self._run = run
        self.schedule = Schedule(run.experiment.config.experiment.save.export_every_n_steps, at_end=True)

    def run(self, state: TrainingState) -> None:
        _export(self._run, WEIGHTS, state.clock.step)


def _export(run: Run, folder: str, step: int) -> None:
    experiment = run.experiment
    exporter = Exporter(run.pipeline, experiment.family, experiment.trainable, experiment.config.experiment)
    exporter.write(run.folder / folder, step)


class SaveCheckpoint(Event):
    """Saves a checkpoint at the end and every `save.checkpoint_every_n_steps`; then older best weights can go."""

    name = "checkpoint"

    def __init__(self, run: Run, events: Sequence[Event]) -> None:
        config = run.experiment.config.experiment.save
        self.schedule = Schedule(config.checkpoint_every_n_steps, at_end=True)
        self._run, self._events, self._keep_last = run, events, config.keep_last

    def run(self, state: TrainingState) -> None:
        run = self._run
        states = {event.name: event.state(state.clock) for event in self._events}
        states = {name: entries for name, entries in states.items() if entries}
        save(run.pipeline, run.folder / CHECKPOINTS, state.clock.step, run.experiment.identity, self._keep_last, states)
        if world().is_main:  # no run resumes from an earlier step, so the newest best weights are enough
            keep_newest_weights(run.folder / BEST_WEIGHTS)
