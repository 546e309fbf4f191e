"""The interface between the trainer and what it trains: the whole network or an adapter.

The engine prepares each layer of its stage with a `Trainable` and sorts the stage's parameters into groups; checkpoints,
exports and the start banner ask it for identity, files and a description. Only choose.py tests which kind a run has.

A `Trainable` sees pipeline layers, the unit in which a stage holds modules, and assumes nothing about the network that a
layer belongs to. Further kinds plug in as follows:
* A ControlNet branch adds its modules to the layers it runs beside, in `prepare`, under native names of its own
  ("control.blocks.3."). Its streams are declared by the family (models/streams.py); `export_files` selects its names.
* Trained text encoders are pipeline layers before the network's first, with prefixes of their own.
* Several at once are one `Trainable` over a tuple of others: each prepares the layers and owns the parameters it names in
  `parameter_sizes`; groups, export files and notes are concatenated, identities merged.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from torch import Tensor, nn

from models.family import FileTensor, PipelineLayer
from utils.config.schema.optimizer import MasterKind
from utils.config.schema.saving import ExportFormat
from utils.optim.schedules import LearningRateSchedule

ErrorList = list[tuple[str, str]]
"""(key of the experiment file, message) of each error."""
ReadTensor = Callable[[str], Tensor]
"""Name of a parameter or buffer within a layer -> its tensor on the CPU, float32 if it is trained; on the meta device where
only shapes are needed. All replicas must read the same names in the same order."""


# --- optimization ------------------------------------------------------------------------------------------------------


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


# --- export ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ExportTensor:
    """A tensor of an exported file."""

    key: str
    value: Tensor
    """On the CPU, or on the meta device where only its shape is needed."""
    exact: bool = False
    """Stored in float32 whatever the precision of the file."""


@dataclass(frozen=True)
class ShardedFolder:
    """A folder in diffusers' layout: one file per pipeline stage, an index of them, and config.json."""

    stem: str
    """Beginning of the names of the files and the index."""
    config: Mapping[str, Any]
    """Content of config.json."""


@dataclass(frozen=True)
class ExportFile:
    """A public file, or a folder of shards."""

    name: str
    """Name of the file or folder."""
    tensors: Callable[[PipelineLayer, nn.Module, ReadTensor], Iterator[ExportTensor]]
    """(layer, its module, reader of its tensors) -> the file's tensors of that layer."""
    metadata: Mapping[str, str] = field(default_factory=dict)
    """Header entries of this file besides those that all files of the run have; replaces entries of the same name."""
    extra_tensors: Sequence[FileTensor] = ()
    """Tensors outside of the layers, such as those of frozen encoders; rank 0 writes them. Not in a folder of shards."""
    shards: ShardedFolder | None = None
    """None: one file that all stages write into."""


# --- the interface -----------------------------------------------------------------------------------------------------


class Trainable(Protocol):
    """What a run trains. Implementations: full.py, lora.py."""

    def prepare(self, layer: PipelineLayer, module: nn.Module) -> None:
        """Freezes and changes a layer that has just been built. Called once for each layer of this rank's stage."""

    def parameter_sizes(self, layer: PipelineLayer) -> Mapping[str, int]:
        """Native name -> number of elements of each parameter of the layer that is trained; needs no weights."""

    def groups(self, named: Mapping[str, nn.Parameter]) -> list[ParameterGroup]:
        """Sorts the trained parameters of this rank (native name -> parameter) into groups, each into exactly one."""

    def initial_values(self, layer: PipelineLayer, module: nn.Module) -> dict[str, Tensor]:
        """Exact float32 initial weights by parameter name within the layer, where the layer holds rounded ones; else {}."""

    @property
    def default_master(self) -> MasterKind:
        """How float32 weights are kept beside bfloat16 weights when `optimizer.master` is not set."""

    @property
    def default_formats(self) -> Sequence[ExportFormat]:
        """The formats of exports when `save.formats` is not set."""

    def format_errors(self, formats: Sequence[ExportFormat]) -> list[str]:
        """Why files of these formats cannot hold what is trained; empty if they can."""

    def export_files(self, formats: Sequence[ExportFormat]) -> list[ExportFile]:
        """The public files of these formats, in their order."""

    def identity(self) -> dict[str, Any]:
        """What a checkpoint must share with the run that resumes from it, as JSON by name."""

    def describe(self) -> str:
        """One line for the start banner, such as "LoRA of rank 16 on 187 modules (12.40 M parameters)"."""

    def notes(self) -> list[str]:
        """Remarks for the start banner, such as modules that the file with the initial weights does not have."""


def num_trained(trainable: Trainable, layers: Sequence[PipelineLayer]) -> int:
    """Trained parameters of these layers, counted in elements."""
    return sum(sum(trainable.parameter_sizes(layer).values()) for layer in layers)


def millions(count: int) -> str:
    """A count in millions, such as "12.40 M"."""
    return f"{count / 1e6:,.2f} M"
