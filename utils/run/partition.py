"""The stages of a run: `pipeline.partition` checked, and applied to the run's network and image sizes.

Costs are averaged over the draws of an epoch: each bucket counts as often as its images are drawn. `measured` times one
bucket, the one whose cost is nearest to that average. Results do not depend on the bounds, so that a run may be resumed with
other ones.
"""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from models.family import ModelFamily
from models.streams import Sample, SampleShape
from utils import randomness
from utils.config.schema.pipeline import PipelineConfig
from utils.console import print_line
from utils.data.examples import ExampleTable
from utils.distributed import group
from utils.distributed.world import world
from utils.pipeline.cost import PassCost, training_flops
from utils.pipeline.measure import MAX_SECONDS, Measured, layer_kinds, measure_layers
from utils.pipeline.partition import (
    Partition,
    StageCost,
    balanced_bounds,
    block_bounds,
    counts_error,
    stage_costs,
    uniform_counts,
)
from utils.pipeline.recompute import Recompute
from utils.run.experiment import Experiment
from utils.trainable.base import Trainable


# --- checks --------------------------------------------------------------------------------------------------------------


def partition_errors(config: PipelineConfig, family: ModelFamily, num_stages: int) -> list[tuple[str, str]]:
    """Errors of the keys that divide this network into stages, as (key, message)."""
    errors = []
    if isinstance(config.recompute, int) and config.recompute > family.num_blocks:
        errors.append(("pipeline.recompute", f"= {config.recompute}: the network has {family.num_blocks} blocks"))
    if num_stages > len(family.layers):
        text = f"= {num_stages}: {len(family.layers)} layers cannot be divided into {num_stages} stages"
        return [*errors, ("pipeline.pipeline_stages", text)]
    counts = _configured_counts(config, family, num_stages)
    found = None if counts is None else counts_error(counts, family.num_blocks, num_stages)
    if found is not None:
        errors.append(("pipeline.partition", f"= {config.partition!r}: {found}"))
    return errors


def _configured_counts(config: PipelineConfig, family: ModelFamily, num_stages: int) -> list[int] | None:
    """The blocks of each stage as configured; None if they follow from costs."""
    if config.partition == "uniform":
        return uniform_counts(family.num_blocks, num_stages) if num_stages > 1 else [family.num_blocks]
    return config.partition if isinstance(config.partition, list) else None


# --- the stages ----------------------------------------------------------------------------------------------------------


def choose_partition(
    config: PipelineConfig, family: ModelFamily, trainable: Trainable, num_stages: int, examples: ExampleTable
) -> Partition:
    """The stages of a checked configuration; for `measured`, those of `cost` until they are measured.

    Without examples, as on all ranks but 0, costs are not known, and the stages are to be replaced by those of rank 0.
    """
    draws = _draws(family, examples, config.micro_batch_size_per_gpu)
    costs = training_flops(family.layers, _trained(family, trainable), draws)
    if config.partition == "measured":
        how = "by estimated cost; measured when training starts"
    elif config.partition == "cost":
        how = f"by estimated cost, {_sizes(family, draws)}"
    else:
        how = "uniform" if config.partition == "uniform" else "as configured"
    return _partition(config, family, num_stages, costs, how)


def _partition(
    config: PipelineConfig, family: ModelFamily, num_stages: int, costs: Sequence[PassCost], how: str
) -> Partition:
    is_block = [layer.block is not None for layer in family.layers]
    recompute = Recompute.from_key(config.recompute, family.num_blocks)
    stage_cost = StageCost(costs, is_block, recompute.num_whole_blocks)
    counts = _configured_counts(config, family, num_stages)
    if counts is None:
        bounds = balanced_bounds(len(family.layers), num_stages, stage_cost)
    else:
        bounds = block_bounds(is_block, counts)
    blocks = [sum(is_block[start:stop]) for start, stop in itertools.pairwise(bounds)]
    return Partition(bounds, stage_costs(bounds, stage_cost), f"{how}: {blocks} blocks")


def _trained(family: ModelFamily, trainable: Trainable) -> list[Mapping[str, int]]:
    return [trainable.parameter_sizes(layer) for layer in family.layers]


def _draws(family: ModelFamily, examples: ExampleTable, micro_batch_size: int) -> dict[SampleShape, float]:
    """The shapes of micro-batches -> how many images of that shape an epoch draws, without those that fill batches."""
    counts = np.bincount(examples.rows[:, 2], weights=examples.repeats, minlength=len(examples.buckets))
    downscale = family.latent.downscale
    draws: dict[SampleShape, float] = {}
    for bucket, count in sorted(zip(examples.buckets, counts.tolist(), strict=True)):
        if count:
            shape = family.sample_shape(micro_batch_size, bucket.height // downscale, bucket.width // downscale)
            draws[shape] = draws.get(shape, 0.0) + count
    return draws


def _sizes(family: ModelFamily, draws: Mapping[SampleShape, float]) -> str:
    if len(draws) > 1:
        return f"mean over {len(draws)} buckets"
    return "".join(f"at {_pixels(family, shape)}" for shape in draws)


def _pixels(family: ModelFamily, shape: SampleShape) -> str:
    return f"{shape.width * family.latent.downscale}x{shape.height * family.latent.downscale} pixels"


# --- measuring -----------------------------------------------------------------------------------------------------------


def measure_partition(experiment: Experiment, device: torch.device) -> Experiment:
    """The experiment with measured stages, if it is so configured and has several. All ranks together, after `agree`."""
    config = experiment.config.experiment
    if config.pipeline.partition != "measured" or experiment.num_stages == 1:
        return experiment
    family, is_main = experiment.family, world().is_main
    shape = group.broadcast(_typical_shape(experiment) if is_main else None)
    assert shape is not None
    measured = Measured(
        family.layers,
        _trained(family, experiment.trainable),
        experiment.trainable.prepare,
        random_sample(family, shape, config.model.torch_dtype),
        family.stream_width,
        config.model.torch_dtype,
    )
    num_kinds = len(set(layer_kinds(measured)))
    at = f"at {_pixels(family, shape)}"
    limit = MAX_SECONDS * math.ceil(num_kinds / world().size)
    print_line(f"partition: timing {num_kinds} kinds of layers {at}, for about {limit:.0f} s at most", is_main=is_main)
    began = time.monotonic()
    costs = measure_layers(measured, device)
    how = f"by the times of {num_kinds} kinds of layers {at}, measured in {time.monotonic() - began:.1f} s"
    partition = _partition(config.pipeline, family, experiment.num_stages, costs, how)
    return replace(experiment, partition=group.broadcast(partition))


def _typical_shape(experiment: Experiment) -> SampleShape:
    """The shape whose cost is nearest to the mean over the draws of an epoch."""
    family = experiment.family
    size = experiment.config.experiment.pipeline.micro_batch_size_per_gpu
    draws = _draws(family, experiment.dataset.examples, size)

    def flops(shapes: Mapping[SampleShape, float]) -> float:
        costs = training_flops(family.layers, _trained(family, experiment.trainable), shapes)
        return math.fsum(cost.forward + cost.backward for cost in costs)

    mean = flops(draws)
    return min(draws, key=lambda shape: abs(flops({shape: 1.0}) - mean))


def random_sample(family: ModelFamily, shape: SampleShape, dtype: torch.dtype) -> Sample:
    """Inputs of the network as random numbers."""

    def draw(name: str, *size: int) -> Tensor:
        return randomness.normal(0, "timed sample", name, shape=(shape.batch, *size))

    text = {
        f"{encoder.name}.{name}": draw(f"{encoder.name}.{name}", *size)
        for encoder in family.text_encoders
        for name, size in encoder.shapes.items()
    }
    latents = draw("latents", family.latent.channels, shape.height, shape.width)
    return family.sample(latents.to(dtype), torch.full((shape.batch,), 0.5), text)
