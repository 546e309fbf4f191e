"""One pipeline stage as a module: this rank's layers, with streams packed into one tensor at both borders.

Layers take and return named tensors (models/streams.py); a stage unpacks what it receives and packs what it sends. The
sizes of a micro-batch are not sent: every rank computes them from (seed, step).
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from models.family import BlockLayer, PipelineLayer
from models.streams import Sample, SampleShape, Streams, StreamSpec, pack, passed_on, unpack

PrepareLayer = Callable[[PipelineLayer, nn.Module], None]


class MicroBatch(NamedTuple):
    """What the two ends of the pipeline need of one micro-batch."""

    sample: Sample | None
    """None off the first stage."""
    target: tuple[Tensor, ...]
    """The target of the loss; not read off the last stage."""


@dataclass(frozen=True)
class StagePlan:
    """The network's layers and where they are cut into stages."""

    layers: Sequence[PipelineLayer]
    input_names: tuple[str, ...]
    """Names of the tensors the first layer takes."""
    stream_width: int
    """Width of every stream."""
    bounds: Sequence[int]
    """Stage i has the layers bounds[i] to bounds[i + 1] - 1."""
    recomputed_blocks: int = 0
    """The first so many blocks of each stage keep no activations for their backward pass."""

    @property
    def num_stages(self) -> int:
        return len(self.bounds) - 1

    def recomputed(self, stage: int) -> frozenset[int]:
        """Indices of a stage's layers that are computed again in the backward pass."""
        layers = range(self.bounds[stage], self.bounds[stage + 1])
        blocks = [index for index in layers if self.layers[index].block is not None]
        return frozenset(blocks[: self.recomputed_blocks])

    def received(self, stage: int) -> tuple[StreamSpec, ...]:
        """The streams a stage receives; none for the first."""
        return self.layers[self.bounds[stage] - 1].outputs if stage > 0 else ()


@dataclass(frozen=True)
class LocalLayer:
    """A layer of this rank's stage."""

    index: int
    """Its index in the list of all layers."""
    layer: PipelineLayer
    module: nn.Module

    def trainable(self) -> dict[str, nn.Parameter]:
        """Parameter name within the layer -> parameter, of the trainable parameters."""
        return {name: parameter for name, parameter in self.module.named_parameters() if parameter.requires_grad}


class Stage(nn.Module):
    """The layers of one stage, from what it receives to what it sends on."""

    def __init__(self, plan: StagePlan, index: int, prepare: PrepareLayer, dtype: torch.dtype) -> None:
        """Builds the layers of stage `index`; `prepare` may freeze and change each layer once it is built.

        Parameters are then converted to `dtype`, which is also that of the tensors between stages. Buffers stay as they are.
        """
        super().__init__()
        self._input_names, self._received, self._width = plan.input_names, plan.received(index), plan.stream_width
        self.dtype = dtype
        self._recomputed = plan.recomputed(index)
        self.layers: list[LocalLayer] = []
        for number in range(plan.bounds[index], plan.bounds[index + 1]):
            module = plan.layers[number].build()
            prepare(plan.layers[number], module)
            for parameter in module.parameters():
                parameter.data = parameter.data.to(dtype)
            self.layers.append(LocalLayer(number, plan.layers[number], module))
        self._modules_in_order = nn.ModuleList(layer.module for layer in self.layers)

    def named_trainable(self) -> dict[str, nn.Parameter]:
        """Native parameter name -> parameter, of the trainable parameters."""
        return {
            layer.layer.prefix + name: parameter for layer in self.layers for name, parameter in layer.trainable().items()
        }

    # --- forward -----------------------------------------------------------------------------------------------------

    def forward(self, inputs: Streams | Tensor, shape: SampleShape) -> Tensor:
        """Inputs of the first layer, or packed streams of the stage before -> packed streams, or the network's output."""
        value: Streams | Tensor = unpack(inputs, self._received, shape) if isinstance(inputs, Tensor) else inputs
        outputs: tuple[StreamSpec, ...] = ()
        for local in self.layers:
            value, outputs = self._run(local, value), local.layer.outputs
            if outputs:
                assert not isinstance(value, Tensor)
                value = passed_on(value, outputs)
        return value if isinstance(value, Tensor) else pack(value, outputs)

    def _run(self, local: LocalLayer, value: Streams | Tensor) -> Streams | Tensor:
        if local.index not in self._recomputed or not torch.is_grad_enabled():
            output: Streams | Tensor = local.module(value)
        else:  # nothing in the network draws random numbers
            output = checkpoint(
                local.module, value, use_reentrant=False, preserve_rng_state=False, determinism_check="none"
            )
        return output

    def received_size(self, shape: SampleShape) -> tuple[int, int, int]:
        """The size of the packed tensor that this stage receives for a micro-batch of that shape."""
        return shape.batch, sum(spec.length(shape) for spec in self._received), self._width

    def check_sample(self, sample: Sample, shape: SampleShape) -> None:
        """Asserts that the sample has the announced shape and the tensors that the first layer takes."""
        assert sample.shape == shape, f"a sample of {sample.shape} was announced as {shape}"
        assert sample.tensors.keys() == set(self._input_names), f"{sorted(sample.tensors)} are not {self._input_names}"

    @contextlib.contextmanager
    def skipping(self, blocks: frozenset[int]) -> Iterator[None]:
        """Skips those of the repeated blocks that this stage holds."""
        chosen = [layer.module for layer in self.layers if layer.layer.block in blocks]
        skipped = [module for module in chosen if isinstance(module, BlockLayer)]
        assert len(skipped) == len(chosen)
        try:
            for module in skipped:
                module.skipped = True
            yield
        finally:
            for module in skipped:
                module.skipped = False
