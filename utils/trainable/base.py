"""The interface between the trainer and what is trained: the whole network, an adapter, or a network beside it.

The engine asks a `Trainable` to prepare each layer of its stage and to sort the parameters into groups; checkpoints, exports
and the start banner ask it for identity, files and a description. Nothing outside this package tests which kind it is.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from torch import Tensor, nn

from models.family import FileTensor, PipelineLayer
from utils.optim.schedules import LearningRateSchedule

ReadTensor = Callable[[str], Tensor]
"""Name of a parameter or buffer within a layer -> its tensor on the CPU, float32 where it is trained; on the meta device where
only shapes are needed. All replicas must read the same names in the same order."""


@dataclass(frozen=True)
class ParameterGroup:
    """Parameters that share a learning rate schedule and a weight decay."""

    name: str
    """Unique within a run; appears in logs."""
    parameters: Mapping[str, nn.Parameter]
    """Native parameter name -> parameter."""
    schedule: LearningRateSchedule
    weight_decay: float | None
    """None: the optimizer's own value."""


@dataclass(frozen=True)
class ExportTensor:
    """A tensor of an exported file."""

    key: str
    value: Tensor
    """On the CPU, or on the meta device where only its shape is needed."""
    exact: bool = False
    """Stored in float32 whatever the precision of the file."""


@dataclass(frozen=True)
class ExportFile:
    """A public file, or with `per_stage` one file for each stage and an index of them."""

    name: str
    tensors: Callable[[PipelineLayer, nn.Module, ReadTensor], Iterator[ExportTensor]]
    """The file's tensors of one layer: (layer, its module, reader of its tensors)."""
    metadata: Mapping[str, str] = field(default_factory=dict)
    """Header entries of this file, besides those of every file of the run."""
    extra_tensors: Sequence[FileTensor] = ()
    """Tensors that do not belong to the layers, such as those of frozen encoders; written by rank 0."""
    per_stage: bool = False
    config: Mapping[str, Any] | None = None
    """Content of config.json in a per-stage folder."""


class Trainable(Protocol):
    """What a run trains. Implementations: full.py, lora.py."""

    def prepare(self, layer: PipelineLayer, module: nn.Module) -> None:
        """Freezes and changes a layer that has just been built. Called once for each layer of this rank's stage."""

    def groups(self, named: Mapping[str, nn.Parameter]) -> list[ParameterGroup]:
        """The trainable parameters of this rank (native name -> parameter), each in exactly one group; no empty groups."""

    def initial_values(self, layer: PipelineLayer, module: nn.Module) -> dict[str, Tensor]:
        """Exact float32 initial weights, by parameter name within the layer, where the layer holds rounded ones; else {}."""

    def num_trained(self, layer: PipelineLayer) -> int:
        """Trainable parameters of a layer; needs no weights."""

    def export_files(self, formats: Sequence[str]) -> list[ExportFile]:
        """The public files of these formats, in their order."""

    def identity(self) -> dict[str, Any]:
        """What a checkpoint must share with the run that resumes from it."""

    def describe(self) -> str:
        """One line for the start banner, such as "LoRA of rank 16 on 187 modules"."""

    def notes(self) -> list[str]:
        """Remarks for the start banner, such as modules that are missing from the file training starts from."""
