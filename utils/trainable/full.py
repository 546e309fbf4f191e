"""Full training: every weight of the network."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor, nn

from models.family import ModelFamily, ModelFilesError, PipelineLayer
from utils.config.schema.optimizer import MasterKind, OptimizerConfig
from utils.config.schema.saving import ExportFormat
from utils.trainable.base import (
    ExportFile,
    ExportTensor,
    ParameterGroup,
    ReadTensor,
    ShardedFolder,
    millions,
    num_trained,
)
from utils.trainable.groups import group_identity, make_groups


@dataclass(frozen=True)
class FullTraining:
    """Trains every parameter of the family's layers. Implements Trainable; see its docstrings."""

    family: ModelFamily
    optimizer: OptimizerConfig

    def prepare(self, layer: PipelineLayer, module: nn.Module) -> None:
        """Nothing to do: a new layer's parameters are trainable."""

    def parameter_sizes(self, layer: PipelineLayer) -> Mapping[str, int]:
        return {layer.prefix + name: math.prod(shape) for name, shape in layer.shapes.items()}

    def groups(self, named: Mapping[str, nn.Parameter]) -> list[ParameterGroup]:
        return make_groups(named, self.optimizer)

    def initial_values(self, layer: PipelineLayer, module: nn.Module) -> dict[str, Tensor]:
        """Empty: the network's own weights are read in the training precision."""
        return {}

    def identity(self) -> dict[str, Any]:
        return {"adapter": "none", **group_identity(self.optimizer)}

    def describe(self) -> str:
        return f"every weight ({millions(num_trained(self, self.family.layers))} parameters)"

    def notes(self) -> list[str]:
        return []

    # --- export --------------------------------------------------------------------------------------------------------

    @property
    def default_master(self) -> MasterKind:
        return "split"

    @property
    def default_formats(self) -> Sequence[ExportFormat]:
        return ("native",)

    def format_errors(self, formats: Sequence[ExportFormat]) -> list[str]:
        if "complete" not in formats:
            return []
        try:
            self.family.frozen_tensors()
        except ModelFilesError as error:
            return [f"a complete file cannot be written: {text}" for _, text in error.errors]
        return []

    def export_files(self, formats: Sequence[ExportFormat]) -> list[ExportFile]:
        """Native: the network's own keys. Complete: prefixed, beside the frozen networks. diffusers: a folder of shards."""
        return [self._export_file(name) for name in formats]

    def _export_file(self, form: ExportFormat) -> ExportFile:
        names = self.family.export_names
        if form == "native":
            return ExportFile(names.network_file, _native_tensors)
        if form == "complete":
            return ExportFile(names.complete_file, self._prefixed_tensors, extra_tensors=self.family.frozen_tensors())
        shards = ShardedFolder(names.diffusers_stem, self.family.diffusers_config())
        return ExportFile(names.diffusers_folder, self._diffusers_tensors, shards=shards)

    def _prefixed_tensors(self, layer: PipelineLayer, module: nn.Module, read: ReadTensor) -> Iterator[ExportTensor]:
        for tensor in _native_tensors(layer, module, read):
            yield replace(tensor, key=self.family.native_prefix + tensor.key)

    def _diffusers_tensors(self, layer: PipelineLayer, module: nn.Module, read: ReadTensor) -> Iterator[ExportTensor]:
        for tensor in _native_tensors(layer, module, read):
            for key, value in self.family.diffusers_weights({tensor.key: tensor.value}).items():
                yield replace(tensor, key=key, value=value)


def _native_tensors(layer: PipelineLayer, module: nn.Module, read: ReadTensor) -> Iterator[ExportTensor]:
    """Parameters and buffers of a layer under native keys. Buffers are constants that low precision cannot represent."""
    buffers = [name for name, _ in module.named_buffers()]
    for name in (*layer.shapes, *buffers):
        yield ExportTensor(layer.prefix + name, read(name), exact=name in buffers)
