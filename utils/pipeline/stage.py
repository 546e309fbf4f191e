"""One pipeline stage as a module: this rank's layers, with streams packed into one tensor at both borders.

Layers take and return named tensors (models/streams.py); a stage unpacks what it receives and packs what it sends. The
sizes of a micro-batch are not sent: every rank computes them from (seed, step).
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from models.family import BlockLayer, PipelineLayer
from models.streams import Sample, SampleShape, Streams, StreamSpec, pack, passed_on, unpack
from utils.pipeline.recompute import KeptBytes, Mode, Recompute, measure_block, run_block

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
    recompute: Recompute = Recompute()
    """What the first blocks of each stage compute again in the backward pass."""

    @property
    def num_stages(self) -> int:
        return len(self.bounds) - 1

    def num_blocks(self, stage: int) -> int:
        """Number of the repeated blocks that a stage has."""
        return sum(layer.block is not None for layer in self.layers[self.bounds[stage] : self.bounds[stage + 1]])

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
        self.layers: list[LocalLayer] = []
        for number in range(plan.bounds[index], plan.bounds[index + 1]):
            module = plan.layers[number].build()
            prepare(plan.layers[number], module)
            for parameter in module.parameters():
                parameter.data = parameter.data.to(dtype)
            self.layers.append(LocalLayer(number, plan.layers[number], module))
        self._modules_in_order = nn.ModuleList(layer.module for layer in self.layers)
        self._modes: dict[int, Mode] = {}
        """Layer index -> what it computes again in the backward pass."""
        self.set_recompute(plan.recompute)

    def set_trained_before(self, names: Collection[str]) -> None:
        """Tells the native names of the parameters that are trained in the stages before this one.

        A received stream that none of them influences needs no gradient. Its requiring one, because it arrives in one tensor
        with others, would make every layer keep activations for it.
        """
        self._received = tuple(spec.where_trained(names) for spec in self._received)

    def named_trainable(self) -> dict[str, nn.Parameter]:
        """Native parameter name -> parameter, of the trainable parameters."""
        return {
            layer.layer.prefix + name: parameter for layer in self.layers for name, parameter in layer.trainable().items()
        }

    def set_recompute(self, recompute: Recompute) -> None:
        """Chooses what the first blocks compute again in the backward pass; the others keep all activations."""
        blocks = [local for local in self.layers if local.layer.block is not None]
        self._modes = {local.index: recompute.mode for local in blocks[: recompute.num_blocks]}
        for local in blocks:
            _block(local).recompute_norms(self._modes.get(local.index) == "norms")

    @torch.enable_grad()
    def measure_blocks(self, inputs: Streams | Tensor, shape: SampleShape) -> list[KeptBytes]:
        """Runs the stage forward and returns what each of its blocks keeps of a micro-batch of that shape, in each mode.

        `inputs` as for `forward`, of any values. Blocks with the same shapes are measured once. Nothing is computed again
        until `set_recompute` is called.
        """
        self.set_recompute(Recompute())
        value: Streams | Tensor = unpack(inputs, self._received, shape) if isinstance(inputs, Tensor) else inputs
        found: dict[Any, KeptBytes] = {}
        kept: list[KeptBytes] = []
        for local in self.layers:
            if local.layer.block is not None:
                assert not isinstance(value, Tensor)
                kind = _kind(local.module, value)
                if kind not in found:
                    found[kind] = measure_block(partial(_run_in, _block(local), value))
                kept.append(found[kind])
            value = local.module(value)
            if not isinstance(value, Tensor):  # without the graph behind it, but requiring the same gradients
                value = {name: one.detach().requires_grad_(one.requires_grad) for name, one in value.items()}
        return kept

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
        if local.index in self._modes:
            assert not isinstance(value, Tensor)
            return run_block(_block(local), value, self._modes[local.index])
        output: Streams | Tensor = local.module(value)
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
        skipped = [_block(layer) for layer in self.layers if layer.layer.block in blocks]
        try:
            for module in skipped:
                module.skipped = True
            yield
        finally:
            for module in skipped:
                module.skipped = False


def _block(local: LocalLayer) -> BlockLayer:
    assert isinstance(local.module, BlockLayer)
    return local.module


def _run_in(block: BlockLayer, streams: Streams, mode: Mode | None) -> Streams:
    block.recompute_norms(mode == "norms")
    try:
        return run_block(block, streams, mode)
    finally:
        block.recompute_norms(False)


def _kind(module: nn.Module, streams: Streams) -> Any:
    """What the memory of a block's activations depends on."""
    parameters = tuple((name, one.shape, one.requires_grad) for name, one in module.named_parameters())
    return parameters, tuple((name, one.requires_grad) for name, one in streams.items())
