"""Times the layers of a network on the ranks' own devices, for `pipeline.partition = "measured"`.

Layers that compute the same are one kind, and each kind is timed once: the ranks share the kinds and exchange the times, so
that all have the same numbers. A layer is built without its weights, filled with random numbers, and run forward and
backward on random inputs, as it is in training. Its memory is freed before the next one.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from models.family import PipelineLayer
from models.streams import Sample, Streams
from utils import randomness
from utils.distributed import group
from utils.distributed.world import world
from utils.pipeline.cost import PassCost, is_trained_before
from utils.pipeline.stage import PrepareLayer

NUM_RUNS = 12
"""Timed runs of a kind, of which the fastest passes count: whatever else the machine does makes others slower."""
NUM_WARMUP_RUNS = 2
MAX_SECONDS = 4.0
"""No further run of a kind begins after this time; a kind runs at least once."""


@dataclass(frozen=True)
class Measured:
    """What is timed."""

    layers: Sequence[PipelineLayer]
    trained: Sequence[Mapping[str, int]]
    """For each layer, the native names of its trained parameters and their numbers of elements."""
    prepare: PrepareLayer
    """Freezes and changes a layer after it is built, as in training."""
    sample: Sample
    """Inputs of the first layer, on the CPU."""
    stream_width: int
    dtype: torch.dtype


def layer_kinds(measured: Measured) -> list[int]:
    """For each layer, the index of the first layer that computes the same."""
    first: dict[str, int] = {}
    kinds = []
    for index, (layer, before) in enumerate(zip(measured.layers, is_trained_before(measured.trained), strict=True)):
        names = {name.removeprefix(layer.prefix): size for name, size in measured.trained[index].items()}
        received = [spec.name for spec in measured.layers[index - 1].outputs] if index else ["inputs"]
        cost = layer.cost(measured.sample.shape)
        parts = (sorted(layer.shapes.items()), sorted(cost.rows.items()), cost.attention_flops, sorted(names.items()))
        kinds.append(first.setdefault(repr((*parts, before, received)), index))
    return kinds


def measure_layers(measured: Measured, device: torch.device) -> list[PassCost]:
    """Seconds of the passes of each layer for the sample, the same on all ranks. Called by all ranks together."""
    kinds = layer_kinds(measured)
    here = world()
    own = {kind: time_layer(measured, kind, device) for kind in sorted(set(kinds))[here.rank :: here.size]}
    group.free_memory()
    times: dict[int, PassCost] = {}
    for found in group.gather(own):
        times |= found
    return [times[kind] for kind in kinds]


def time_layer(measured: Measured, index: int, device: torch.device) -> PassCost:
    """Seconds of the fastest forward and the fastest backward pass of a layer."""
    module = _build(measured, index, device)
    needs_gradient = is_trained_before(measured.trained)[index]
    has_backward = needs_gradient or bool(measured.trained[index])
    inputs = _inputs(measured, index, device, needs_gradient)
    passes: list[PassCost] = []
    began = time.perf_counter()
    while len(passes) < NUM_WARMUP_RUNS + NUM_RUNS and (not passes or time.perf_counter() - began < MAX_SECONDS):
        passes.append(_run(module, inputs, device, has_backward))
    timed = passes[NUM_WARMUP_RUNS:] or passes[-1:]
    return PassCost(min(run.forward for run in timed), min(run.backward for run in timed))


def _build(measured: Measured, index: int, device: torch.device) -> nn.Module:
    """The layer with random weights, prepared as in training."""
    layer = measured.layers[index]
    assert layer.build_empty is not None, f"{layer.name} cannot be built without its weights"
    module = layer.build_empty().to_empty(device="cpu")
    for tensor in (*module.parameters(), *module.buffers()):
        tensor.data.copy_(0.02 * randomness.normal(0, "timed weights", shape=tuple(tensor.shape)))
    measured.prepare(layer, module)
    for parameter in module.parameters():
        parameter.data = parameter.data.to(measured.dtype)
    return module.to(device)


def _inputs(measured: Measured, index: int, device: torch.device, needs_gradient: bool) -> Streams:
    """Random streams of the layer before, or the sample."""
    if index == 0:
        return {name: tensor.to(device) for name, tensor in measured.sample.tensors.items()}
    shape, streams = measured.sample.shape, {}
    for spec in measured.layers[index - 1].outputs:
        size = (shape.batch, spec.length(shape), measured.stream_width)
        values = randomness.normal(0, "timed stream", spec.name, shape=size).to(device, measured.dtype)
        streams[spec.name] = values.requires_grad_(needs_gradient and spec.carries_gradient)
    return streams


def _run(module: nn.Module, inputs: Streams, device: torch.device, has_backward: bool) -> PassCost:
    """Seconds of one forward and one backward pass."""
    for tensor in (*inputs.values(), *module.parameters()):
        tensor.grad = None
    began = synchronized_time(device)
    with torch.set_grad_enabled(has_backward):
        outputs = module(dict(inputs))
    between = synchronized_time(device)
    values = list(outputs.values()) if isinstance(outputs, dict) else [outputs]
    differentiable = [value for value in values if value.requires_grad]
    if differentiable:
        torch.autograd.backward(differentiable, [torch.ones_like(value) for value in differentiable])
    return PassCost(between - began, synchronized_time(device) - between if has_backward else 0.0)


def synchronized_time(device: torch.device) -> float:
    """The time in seconds, once the device has computed everything so far."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
    return time.perf_counter()
