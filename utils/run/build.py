"""Builds what a run trains with: objective, pipeline, feed. Each is built here, once."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from torch import Tensor, nn

from models.family import PipelineLayer
from models.streams import SampleShape
from utils.checkpoint import save as checkpoint
from utils.data.batches import BatchOrder
from utils.data.encoding.encoded import EncodedData
from utils.objective.loss import LossTarget
from utils.objective.objective import Objective
from utils.optim.registry import make_optimizer
from utils.optim.schedules import LearningRateSchedule, schedule_of
from utils.pipeline.engine import EngineSettings, Pipeline
from utils.pipeline.feed import Feed, Layout
from utils.pipeline.optimizer_state import MASTER
from utils.pipeline.stage import StagePlan
from utils.run.experiment import Experiment
from utils.run.schedule import Clock
from utils.trainable import lora
from utils.trainable.base import ParameterGroup


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


def build_run(experiment: Experiment, folder: Path, data: EncodedData) -> Run:
    """Builds the pipeline and loads the checkpoint to resume from. All ranks together."""
    objective, order = Objective(experiment.config.experiment.objective, experiment.family.shift_at), experiment.batch_order()
    pipeline = build_pipeline(experiment, objective)
    if experiment.resume_from is not None:
        checkpoint.load(pipeline, experiment.resume_from)
    return Run(
        experiment=experiment,
        folder=folder,
        data=data,
        objective=objective,
        pipeline=pipeline,
        feed=build_feed(experiment, pipeline, data, objective),
        order=order,
        clock=Clock(experiment.start_step, experiment.num_steps(order), order.steps_per_epoch),
        schedules={"default": schedule_of(experiment.config.experiment.optimizer)},
    )


def build_pipeline(experiment: Experiment, objective: Objective) -> Pipeline:
    """The network over the processes, each with its own layers only, and what is trained of it."""
    config, plan, start = experiment.config.experiment, experiment.adapter_plan, experiment.adapter_start

    def prepare_layer(layer: PipelineLayer, module: nn.Module) -> None:
        if plan is not None:
            lora.inject(module, layer.prefix, plan, seed=config.seed)
        if start is not None:
            lora.load_start(module, layer.prefix, start)

    def groups(named: Mapping[str, nn.Parameter]) -> list[ParameterGroup]:
        return [ParameterGroup("default", named, schedule_of(config.optimizer), None)]

    def loss(output: Tensor, target: tuple[Tensor, ...], shape: SampleShape) -> Tensor:
        return objective.loss(experiment.family.velocity(output, shape), LossTarget(*target))

    settings = EngineSettings(
        micro_batch_size=config.pipeline.micro_batch_size_per_gpu,
        num_micro_batches=config.pipeline.gradient_accumulation_steps,
        gradient_clipping=config.optimizer.gradient_clipping,
        dtype=config.model.torch_dtype,
    )
    pipeline = Pipeline(
        StagePlan(experiment.family.layers, experiment.family.input_names, experiment.bounds),
        settings,
        loss=loss,
        prepare=prepare_layer,
        groups=groups,
        make_optimizer=partial(make_optimizer, config.optimizer),
    )
    if start is not None:
        # The optimizer's float32 weights were made from the layers' rounded ones.
        exact: dict[nn.Parameter, dict[str, Tensor]] = {}
        for layer in pipeline.local_layers():
            for name, value in lora.start_values(layer.module, layer.layer.prefix, start).items():
                exact[layer.trainable()[name]] = {MASTER: value}
        pipeline.write_states(exact)
    return pipeline


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
