"""Builds what a run trains with: objective, pipeline, feed. Each is built here, once."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from models.streams import Sample, SampleShape
from utils.checkpoint.load import load
from utils.console import format_bytes, print_line
from utils.data.batches import BatchOrder
from utils.data.encoding.encoded import EncodedData
from utils.distributed import group
from utils.distributed.world import world
from utils.objective.loss import LossTarget
from utils.objective.objective import Objective
from utils.optim.registry import is_separable, make_optimizer, num_sums, state_bytes
from utils.optim.schedules import LearningRateSchedule
from utils.pipeline.engine import EngineSettings, Pipeline
from utils.pipeline.feed import Feed, Layout
from utils.pipeline.optimizer_step import MASTER
from utils.run.experiment import Experiment
from utils.run.partition import random_sample
from utils.run.schedule import Clock
from utils.trainable.groups import group_schedules

FREE_FRACTION = 0.9
"""Part of the free memory that `recompute = "auto"` fills; the rest is for what it does not count."""
LOG = "log"
"""The event that logs every step; its saved state has the clock's minutes."""


@dataclass(frozen=True)
class Run:
    """Everything the training loop and its events use; complete on every rank."""

    experiment: Experiment
    folder: Path
    data: EncodedData
    objective: Objective
    pipeline: Pipeline
    feed: Feed
    order: BatchOrder
    """The order of examples, for asking about steps; the feed runs ahead and has its own."""
    clock: Clock
    """Where the run starts or resumes."""
    schedules: Mapping[str, LearningRateSchedule]
    """Parameter group -> its learning rate."""
    saved_events: Mapping[str, dict[str, Any]]
    """Event name -> its state in the checkpoint the run resumes from."""


def build_run(experiment: Experiment, folder: Path, data: EncodedData) -> Run:
    """Builds the pipeline and loads the checkpoint to resume from. All ranks together."""
    objective, order = (
        Objective(experiment.config.experiment.objective, experiment.family.shift_at),
        experiment.batch_order(),
    )
    pipeline = build_pipeline(experiment, objective)
    if experiment.config.experiment.pipeline.recompute == "auto":
        fit_recompute(experiment, pipeline)
    if experiment.resume_from is not None:
        load(pipeline, experiment.resume_from)
    saved_events = experiment.resume_from.events if experiment.resume_from is not None else {}
    minutes = float(saved_events.get(LOG, {}).get("minutes", 0.0))
    return Run(
        experiment=experiment,
        folder=folder,
        data=data,
        objective=objective,
        pipeline=pipeline,
        feed=build_feed(experiment, pipeline, data, objective),
        order=order,
        clock=Clock(experiment.start_step, experiment.num_steps(order), order.steps_per_epoch, minutes, minutes),
        schedules=group_schedules(experiment.config.experiment.optimizer),
        saved_events=saved_events,
    )


def build_pipeline(experiment: Experiment, objective: Objective) -> Pipeline:
    """The network over the processes, each with its own layers only, and what is trained of it."""
    config, family, trainable = experiment.config.experiment, experiment.family, experiment.trainable

    def loss(output: Tensor, target: tuple[Tensor, ...], shape: SampleShape) -> Tensor:
        return objective.loss(family.velocity(output, shape), LossTarget(*target))

    settings = EngineSettings(
        micro_batch_size=config.pipeline.micro_batch_size_per_gpu,
        num_micro_batches=config.pipeline.gradient_accumulation_steps,
        gradient_clipping=config.optimizer.gradient_clipping,
        dtype=config.model.torch_dtype,
        num_optimizer_sums=num_sums(config.optimizer),
        is_separable=is_separable(config.optimizer),
        master=experiment.master,
        step_in_backward=config.optimizer.step_in_backward,
        seed=config.seed,
    )
    pipeline = Pipeline(
        experiment.stage_plan,
        settings,
        loss=loss,
        prepare=trainable.prepare,
        groups=trainable.groups,
        make_optimizer=partial(make_optimizer, config.optimizer),
    )
    # The optimizer's float32 weights were made from the layers' rounded ones.
    pipeline.write_states(
        {
            layer.trainable()[name]: {MASTER: value}
            for layer in pipeline.local_layers()
            for name, value in trainable.initial_values(layer.layer, layer.module).items()
        }
    )
    return pipeline


def fit_recompute(experiment: Experiment, pipeline: Pipeline) -> None:
    """For `recompute = "auto"`: chooses for each rank what fits into the memory of its device, and prints the choices."""
    config, plan = experiment.config.experiment, experiment.stage_plan
    state = state_bytes(config.optimizer) + (4 if config.ema is not None else 0)
    free = int(FREE_FRACTION * (group.free_bytes() - 4 * pipeline.num_trained - state * pipeline.num_owned))
    chosen = pipeline.fit_recompute(_largest_sample(experiment), free)
    group.free_memory()
    found = sorted(group.gather((pipeline.stage, pipeline.replica, chosen, free)), key=lambda one: one[:2])
    for stage, replica, recompute, room in found:
        place = f"stage {stage + 1} of {plan.num_stages}" + (f", replica {replica + 1}" if replica else "")
        text = "no activations recomputed"
        if recompute is None:
            text = "all activations recomputed, and still more than the memory"
        elif recompute.num_blocks:
            text = recompute.describe(plan.num_blocks(stage))
        print_line(f"{place}: {text} ({format_bytes(max(room, 0))} for activations)", is_main=world().is_main)


def _largest_sample(experiment: Experiment) -> Sample:
    """A micro-batch in the size of the largest bucket."""
    config, family = experiment.config.experiment, experiment.family
    bucket = max(experiment.dataset.examples.buckets, key=lambda bucket: bucket.width * bucket.height)
    height, width = bucket.height // family.latent.downscale, bucket.width // family.latent.downscale
    shape = family.sample_shape(config.pipeline.micro_batch_size_per_gpu, height, width)
    return random_sample(family, shape, config.model.torch_dtype)


def build_feed(experiment: Experiment, pipeline: Pipeline, data: EncodedData, objective: Objective) -> Feed:
    """The micro-batches of this rank's place in the layout."""
    config = experiment.config.experiment
    layout = Layout(
        micro_batch_size=config.pipeline.micro_batch_size_per_gpu,
        num_micro_batches=config.pipeline.gradient_accumulation_steps,
        num_replicas=experiment.num_replicas,
        replica=pipeline.replica,
        is_first_stage=pipeline.stage == 0,
        is_last_stage=pipeline.stage == pipeline.num_stages - 1,
    )
    return Feed(
        experiment.family,
        data,
        experiment.batch_order(),
        objective,
        seed=config.seed,
        layout=layout,
        dtype=config.model.torch_dtype,
    )
