"""The cost of layers in a training step: the FLOPs of their forward and backward passes. Pure.

A weight of n elements that is multiplied with r rows takes 2 r n FLOPs forward, as many for the gradient of its input, and
as many for its own gradient if it is trained. The backward pass of attention multiplies five matrices where the forward pass
multiplies two, because it computes the attention weights again. Norms, activation functions and sums are not counted; nor is
what DoRA and LoKr add to LoRA: the norms of rows, and the product of the factors.

A layer needs a backward pass only if it or a layer before it is trained.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from models.family import LayerCost, PipelineLayer
from models.streams import SampleShape

ATTENTION_BACKWARD = 2.5
"""FLOPs of the backward pass of attention, relative to its forward pass."""


@dataclass(frozen=True)
class PassCost:
    """The cost of one layer for one micro-batch: FLOPs, or seconds if it was measured."""

    forward: float
    backward: float
    """0 if nothing up to this layer is trained."""


def is_trained_before(trained: Sequence[Mapping[str, int]]) -> list[bool]:
    """For each layer, whether a layer before it is trained. `trained`: see `training_flops`."""
    return [any(trained[:index]) for index in range(len(trained))]


def training_flops(
    layers: Sequence[PipelineLayer], trained: Sequence[Mapping[str, int]], draws: Mapping[SampleShape, float]
) -> list[PassCost]:
    """FLOPs of each layer for a micro-batch, averaged over shapes with the weights `draws`; zeros without any.

    `trained`: for each layer, the native names of its trained parameters and their numbers of elements.
    """
    total = sum(draws.values())
    costs = []
    for layer, names, before in zip(layers, trained, is_trained_before(trained), strict=True):
        passes = [(layer_flops(layer, layer.cost(shape), names, before), weight / total) for shape, weight in draws.items()]
        forward = math.fsum(weight * cost.forward for cost, weight in passes)
        costs.append(PassCost(forward, math.fsum(weight * cost.backward for cost, weight in passes)))
    return costs


def layer_flops(layer: PipelineLayer, cost: LayerCost, trained: Mapping[str, int], trained_before: bool) -> PassCost:
    """FLOPs of one layer; `trained`: native name -> elements of its trained parameters.

    Where the first trained layer is not the network's first, the gradients of all its inputs are counted.
    """
    forward, input_gradient, weight_gradient = cost.attention_flops, ATTENTION_BACKWARD * cost.attention_flops, 0.0
    for module, rows in cost.rows.items():
        own = layer.prefix + module + "."
        adapter = [name for name in trained if name.startswith(own) and name.removeprefix(layer.prefix) not in layer.shapes]
        added = sum(trained[name] for name in adapter)
        flops = 2.0 * rows * math.prod(layer.shapes[module + ".weight"])
        forward += flops + 2.0 * rows * added
        input_gradient += 2.0 * rows * added + (0.0 if module in cost.constant_inputs else flops)
        weight_gradient += 2.0 * rows * added + (flops if own + "weight" in trained else 0.0)
    has_backward = trained_before or bool(trained)
    return PassCost(forward, input_gradient + weight_gradient if has_backward else 0.0)
