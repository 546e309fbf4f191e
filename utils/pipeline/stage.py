"""One pipeline stage as a module: this rank's layers, with streams packed into one tensor at both borders.

DeepSpeed's engine passes a tuple of tensors into the first stage and one tensor between stages. Only this file knows that:
layers take and return named tensors (models/streams.py), a stage unpacks what it receives and packs what it sends. The
sizes of a micro-batch are not sent. Every rank computes them from (seed, step) and gives them to its stage before a pass,
one `SampleShape` for each forward.
"""

from __future__ import annotations

import contextlib
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

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
    bounds: Sequence[int]
    """Stage i has the layers bounds[i] to bounds[i + 1] - 1."""

    @property
    def num_stages(self) -> int:
        return len(self.bounds) - 1

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
    """The layers of one stage, from what DeepSpeed passes in to what it sends on."""

    anchor: nn.Parameter | None

    def __init__(self, plan: StagePlan, index: int, prepare: PrepareLayer) -> None:
        """Builds the layers of stage `index`; `prepare` may freeze and change each layer once it is built."""
        super().__init__()
        self._input_names, self._received = plan.input_names, plan.received(index)
        self.layers: list[LocalLayer] = []
        for number in range(plan.bounds[index], plan.bounds[index + 1]):
            module = plan.layers[number].build()
            prepare(plan.layers[number], module)
            self.layers.append(LocalLayer(number, plan.layers[number], module))
        self._modules_in_order = nn.ModuleList(layer.module for layer in self.layers)
        self.register_parameter("anchor", None)
        self._shapes: deque[SampleShape] = deque()
        self._current: SampleShape | None = None

    def add_anchor(self) -> nn.Parameter:
        """Gives a stage without trainable weights a parameter that is multiplied by zero; returns it.

        DeepSpeed's engine needs an output to run backward through, and its optimizer a parameter to hold.
        """
        self.anchor = nn.Parameter(torch.zeros(1, device=next(self.parameters()).device))
        return self.anchor

    def named_trainable(self) -> dict[str, nn.Parameter]:
        """Native parameter name -> parameter, of the trainable parameters; without the anchor."""
        return {
            layer.layer.prefix + name: parameter for layer in self.layers for name, parameter in layer.trainable().items()
        }

    # --- the shapes of a pass ----------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def expecting(self, shapes: Sequence[SampleShape]) -> Iterator[None]:
        """Announces the shapes of the next forwards, one for each, in their order."""
        assert not self._shapes
        self._shapes.extend(shapes)
        yield
        assert not self._shapes, f"{len(self._shapes)} of {len(shapes)} micro-batches were not forwarded"

    @property
    def current_shape(self) -> SampleShape:
        """The shape of the micro-batch that was forwarded last."""
        assert self._current is not None
        return self._current

    # --- forward -----------------------------------------------------------------------------------------------------

    def forward(self, inputs: Tensor | tuple[Tensor, ...]) -> Tensor:
        """The input tuple or the packed streams of the stage before -> packed streams or the network's output."""
        self._current = self._shapes.popleft()
        value: Streams | Tensor = self._open(inputs, self._current)
        outputs: tuple[StreamSpec, ...] = ()
        for local in self.layers:
            value, outputs = local.module(value), local.layer.outputs
            if outputs:
                assert not isinstance(value, Tensor)
                value = passed_on(value, outputs)
        output = value if isinstance(value, Tensor) else pack(value, outputs)
        return output if self.anchor is None else output + self.anchor.to(output.dtype) * 0

    def _open(self, inputs: Tensor | tuple[Tensor, ...], shape: SampleShape) -> Streams:
        if isinstance(inputs, Tensor):
            return unpack(inputs, self._received, shape)
        return dict(zip(self._input_names, inputs, strict=True))

    def input_tuple(self, sample: Sample | None, shape: SampleShape) -> tuple[Tensor, ...]:
        """A sample of the announced shape as the tuple that `forward` takes in the first stage; empty for None."""
        if sample is None:
            return ()
        assert sample.shape == shape, f"a sample of {sample.shape} was announced as {shape}"
        assert sample.tensors.keys() == set(self._input_names), f"{sorted(sample.tensors)} are not {self._input_names}"
        return tuple(sample.tensors[name] for name in self._input_names)

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
