"""LoRA, DoRA and LoKr training: adapters on chosen modules; the network's own weights stay as they are."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from models.family import LoraFile, ModelFamily, ModuleAdapter, PipelineLayer
from utils.config.schema.adapter import AdapterConfig
from utils.config.schema.optimizer import MasterKind, OptimizerConfig
from utils.config.schema.saving import ExportFormat
from utils.trainable.base import ExportFile, ExportTensor, ParameterGroup, ReadTensor, millions, num_trained
from utils.trainable.groups import group_identity, make_groups
from utils.trainable.initial_weights import initial_values, load_initial_values
from utils.trainable.name_lists import shortened
from utils.trainable.peft_layers import PARAMETER_SUFFIXES, collect, inject
from utils.trainable.targets import LoraTargets

ARCHITECTURE = "modelspec.architecture"
"""Header entry that names the network; for an adapter with "/lora" at its end."""
Convert = Callable[[Mapping[str, ModuleAdapter]], dict[str, Tensor]]
"""Native module name -> adapter, to the tensors of a file by key."""


@dataclass(frozen=True)
class LoraTraining:
    """Trains an adapter on each target. Implements Trainable; see its docstrings."""

    settings: AdapterConfig
    targets: LoraTargets
    initial_file: LoraFile | None
    """The file with the initial weights; None for an adapter that does not change the network's output at first."""
    family: ModelFamily
    optimizer: OptimizerConfig
    seed: int
    """Seed of the random initial weights."""

    def prepare(self, layer: PipelineLayer, module: nn.Module) -> None:
        inject(module, layer.prefix, self.targets, seed=self.seed)
        if self.initial_file is not None:
            load_initial_values(module, layer.prefix, self.initial_file)

    def parameter_sizes(self, layer: PipelineLayer) -> Mapping[str, int]:
        modules = [layer.prefix + name.removesuffix(".weight") for name in layer.shapes if name.endswith(".weight")]
        return {
            module + PARAMETER_SUFFIXES[part]: math.prod(shape)
            for module in modules
            if module in self.targets.modules
            for part, shape in self.targets.shapes(module).items()
        }

    def groups(self, named: Mapping[str, nn.Parameter]) -> list[ParameterGroup]:
        return make_groups(named, self.optimizer)

    def initial_values(self, layer: PipelineLayer, module: nn.Module) -> dict[str, Tensor]:
        """The file's values: the optimizer's float32 weights are otherwise copied from the layer's rounded ones."""
        return {} if self.initial_file is None else initial_values(module, layer.prefix, self.initial_file)

    def identity(self) -> dict[str, Any]:
        """The settings without `init_from`: a checkpoint has weights of its own, and the file may have been moved."""
        return {"adapter": self.settings.model_dump(mode="json", exclude={"init_from"}), **group_identity(self.optimizer)}

    def describe(self) -> str:
        count = millions(num_trained(self, self.family.layers))
        origin = f", initial weights from {self.initial_file.path}" if self.initial_file is not None else ""
        return f"{self.targets.describe()} ({count} parameters){origin}"

    def notes(self) -> list[str]:
        file = self.initial_file
        if file is None:
            return []
        notes = []
        missing = [name for name in self.targets.modules if name not in file.shapes]
        if missing:
            num_modules = len(self.targets.modules)
            notes.append(
                f"{len(missing)} of the {num_modules} modules are not in {file.path} and have new initial weights: "
                f"{shortened(missing)}"
            )
        if file.skipped_keys:
            notes.append(f"skipped tensors of other networks in {file.path}: {shortened(file.skipped_keys)}")
        return notes

    # --- export --------------------------------------------------------------------------------------------------------

    @property
    def default_master(self) -> MasterKind:
        return "float32"

    @property
    def default_formats(self) -> Sequence[ExportFormat]:
        return ("native",) if self.settings.type == "lokr" else ("native", "diffusers")

    def format_errors(self, formats: Sequence[ExportFormat]) -> list[str]:
        errors = []
        if "complete" in formats:
            errors.append("a complete file holds a whole network; use native and diffusers for an adapter")
        if self.settings.type == "lokr" and "diffusers" in formats:
            errors.append("diffusers cannot load a LoKr; remove diffusers, or train a LoRA")
        return errors

    def export_files(self, formats: Sequence[ExportFormat]) -> list[ExportFile]:
        """Native: the keys that ComfyUI and sd-scripts read. diffusers: its own keys, without alpha."""
        name = self.settings.type
        architecture = {ARCHITECTURE: f"{self.family.export_metadata()[ARCHITECTURE]}/lora"}
        native = functools.partial(_tensors, self.family.native_adapter)
        diffusers = functools.partial(_tensors, self.family.diffusers_adapter)
        files = {
            "native": ExportFile(f"{name}.safetensors", native, {**architecture, **self._native_metadata()}),
            "diffusers": ExportFile(f"{name}_diffusers.safetensors", diffusers, architecture),
        }
        return [files[form] for form in formats]

    def _native_metadata(self) -> dict[str, str]:
        """The header entries of sd-scripts, by which programs sort and load native files."""
        settings = self.settings
        has_one_rank = all(target.rank is None for target in settings.targets or [])
        return {
            **self.family.adapter_metadata(is_plain_lora=settings.type == "lora" and not settings.dora),
            "ss_network_dim": str(settings.rank) if has_one_rank else "Dynamic",
            "ss_network_alpha": str(native_alpha(settings)),
        }


def native_alpha(settings: AdapterConfig) -> float:
    """Returns alpha as native files define it: their scale is always alpha / rank."""
    alpha = float(settings.alpha if settings.alpha is not None else settings.rank)
    return alpha * math.sqrt(settings.rank) if settings.rank_stabilized else alpha


def _tensors(convert: Convert, layer: PipelineLayer, module: nn.Module, read: ReadTensor) -> Iterator[ExportTensor]:
    values = {name: read(name) for name, parameter in module.named_parameters() if parameter.requires_grad}
    for key, value in convert(collect(module, layer.prefix, values)).items():
        yield ExportTensor(key, value, exact=value.dim() == 0)  # alpha: bfloat16 would round it
