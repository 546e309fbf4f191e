"""Tensors of an ExportFile: which ones a rank contributes, their shapes and dtypes in the file, their rounding."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from utils.files.safetensors_writer import Entry
from utils.pipeline.engine import Pipeline
from utils.pipeline.stage import LocalLayer
from utils.trainable.base import ExportFile, ExportTensor


@dataclass(frozen=True)
class WeightReader:
    """Reads the weights of this rank's layers: float32 weights of the optimizer where they are trained."""

    pipeline: Pipeline
    ema: bool
    """Whether the average of the weights is read in place of the weights."""

    def tensors(self, file: ExportFile) -> Iterator[ExportTensor]:
        """The file's tensors of this rank's layers, one in memory at a time. All replicas together."""
        for layer in self.pipeline.local_layers():
            yield from file.tensors(layer.layer, layer.module, partial(self._read, layer))

    def _read(self, layer: LocalLayer, name: str) -> Tensor:
        trained = layer.trainable()
        if name in trained:
            return self.pipeline.read_weights(trained[name], ema=self.ema)
        return layer.module.state_dict()[name].cpu()

    def entries(self, file: ExportFile, dtype: torch.dtype) -> list[Entry]:
        """Key, dtype and shape of each tensor that `tensors` returns; reads no weights."""
        return [
            Entry(tensor.key, torch.float32 if tensor.exact else dtype, tuple(tensor.value.shape))
            for layer in self.pipeline.local_layers()
            for tensor in file.tensors(layer.layer, layer.module, partial(_shape_of, layer))
        ]


def _shape_of(layer: LocalLayer, name: str) -> Tensor:
    return torch.empty(layer.module.state_dict()[name].shape, dtype=torch.float32, device="meta")


def rounded(tensors: Iterator[ExportTensor], dtype: torch.dtype) -> Iterator[tuple[str, Tensor]]:
    """Each tensor in the precision of the file; warns about tensors with non-finite values in that precision."""
    for tensor in tensors:
        value = tensor.value.to(torch.float32 if tensor.exact else dtype)
        if not all(bound.isfinite() for bound in torch.aminmax(value)):  # value.isfinite() takes twice its memory
            print(f"warning: exported tensor {tensor.key} has non-finite values", file=sys.stderr, flush=True)
        yield tensor.key, value
