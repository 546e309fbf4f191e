"""What a network takes and what its layers pass on: named tensors, and one packed tensor between pipeline stages.

A family names the inputs of its first layer once (`ModelFamily.input_names`) and declares for each layer which streams it
outputs (`PipelineLayer.outputs`). Layers take and return `Streams`, dictionaries by name. Between stages all streams travel
as one float tensor, one after the other along the token axis, because DeepSpeed 0.19.8 runs a stage's backward pass once
for each float tensor it received. A further stream, such as that of a ControlNet branch, is one more declaration.

Shapes: B batch, D width of the network, common to all streams.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

Streams = dict[str, Tensor]
"""Stream name -> (B, tokens, D). For the first layer: input name -> tensor of any shape and dtype."""


@dataclass(frozen=True)
class SampleShape:
    """The sizes of one micro-batch that the lengths of streams depend on. Every rank knows them from (seed, step)."""

    batch: int
    height: int
    """Latent pixels, as the width."""
    width: int
    num_text_tokens: int


@dataclass(frozen=True)
class Sample:
    """The inputs of the network's first layer for one micro-batch."""

    tensors: Mapping[str, Tensor]
    """Input name -> tensor; the names are the family's `input_names`."""
    shape: SampleShape


@dataclass(frozen=True)
class StreamSpec:
    """A stream that a layer outputs."""

    name: str
    length: Callable[[SampleShape], int]
    """Number of tokens."""
    carries_gradient: bool = True
    """False: a constant for the layers after it, whatever it was computed from."""
    sources: tuple[str, ...] | None = None
    """Prefixes of the native names of the parameters it is computed from; None: it may be all of the layers before."""

    def where_trained(self, names: Collection[str]) -> StreamSpec:
        """The stream behind stages in which these parameters (native names) are trained: constant if none is a source."""
        is_trained = bool(names) if self.sources is None else any(name.startswith(self.sources) for name in names)
        return replace(self, carries_gradient=self.carries_gradient and is_trained)


class _Contiguous(torch.autograd.Function):
    """The identity, contiguous in both directions. Its node sums the gradients of all later uses before passing them on."""

    @staticmethod
    def forward(_context: Any, tensor: Tensor) -> Tensor:
        return tensor.view_as(tensor) if tensor.is_contiguous() else tensor.contiguous()

    @staticmethod
    def backward(_context: Any, *gradients: Tensor) -> Tensor:
        return gradients[0].contiguous()


def passed_on(streams: Streams, specs: Sequence[StreamSpec]) -> Streams:
    """What a layer returned, as the layers after it receive it. It must be exactly the declared streams.

    Applied after every layer, whether or not a stage ends there: memory layout and order of summation, and so the last
    bits of outputs and gradients, must not depend on where the network is cut.
    """
    names = {spec.name for spec in specs}
    assert streams.keys() == names, f"a layer declares the streams {sorted(names)} and returns {sorted(streams)}"
    return {
        spec.name: _Contiguous.apply(streams[spec.name])
        if spec.carries_gradient
        else streams[spec.name].detach().contiguous()
        for spec in specs
    }


def pack(streams: Streams, specs: Sequence[StreamSpec]) -> Tensor:
    """All streams as one contiguous tensor (B, sum of lengths, D), in the order of `specs`. They must share a dtype."""
    parts = list(passed_on(streams, specs).values())
    assert len({part.dtype for part in parts}) == 1, "streams of several dtypes cannot be packed"
    return torch.cat(parts, dim=1)


def unpack(packed: Tensor, specs: Sequence[StreamSpec], shape: SampleShape) -> Streams:
    """The inverse of `pack` for a micro-batch of this shape; every stream is contiguous.

    Raises ValueError when the declared lengths do not add up to the tensor's.
    """
    lengths = [spec.length(shape) for spec in specs]
    if packed.shape[:2] != (shape.batch, sum(lengths)):
        raise ValueError(
            f"a packed tensor of shape {tuple(packed.shape)} does not hold streams of {lengths} tokens of {shape}"
        )
    parts = packed.split(lengths, dim=1)
    return passed_on({spec.name: part for spec, part in zip(specs, parts, strict=True)}, specs)
