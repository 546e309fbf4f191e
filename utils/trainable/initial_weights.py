"""Initial weights of an adapter from a file (`adapter.init_from`): whether the file fits, and how its values are used.

The scale of an update is that of this run's rank and alpha; where the file's differs, the factor `up` or `w1` makes up for
it. A file may have a lower rank than configured (for LoRA and DoRA), no magnitudes for a DoRA, and only some of the modules.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from models.family import LoraFile, ModelFamily
from utils.config.schema.adapter import AdapterConfig
from utils.trainable.name_lists import shortened
from utils.trainable.peft_layers import PARAMETER_SUFFIXES, adapter_parameters, adapter_scale, row_norms
from utils.trainable.targets import LoraTargets, Shape, modules_within_blocks

# --- values ------------------------------------------------------------------------------------------------------------


def initial_values(layer: nn.Module, prefix: str, file: LoraFile) -> dict[str, Tensor]:
    """Returns parameter name within the layer -> float32 values with which its adapters compute what the file's compute.

    Parts of a rank that the file does not have keep the layer's own initial values.
    """
    values: dict[str, Tensor] = {}
    for name, parts in adapter_parameters(layer).items():
        if prefix + name not in file.shapes:
            continue
        adapter = file.read(prefix + name)
        scaled = "up" if "up" in adapter.tensors else "w1"
        for part in parts.keys() & adapter.tensors.keys():
            tensor = adapter.tensors[part]
            if part == scaled:
                tensor = tensor * (adapter.scale / adapter_scale(layer, name))
            if part == "magnitude":
                tensor = tensor.reshape(parts[part].shape)
            value = parts[part].detach().float().clone()
            value[tuple(slice(size) for size in tensor.shape)] = tensor.to(value.device)
            values[name + PARAMETER_SUFFIXES[part]] = value
    return values


@torch.no_grad()
def load_initial_values(layer: nn.Module, prefix: str, file: LoraFile) -> None:
    """Writes `initial_values` into the layer, rounded to its precision; magnitudes that a DoRA's file lacks are computed."""
    for name, value in initial_values(layer, prefix, file).items():
        layer.get_parameter(name).copy_(value)
    for name, parts in adapter_parameters(layer).items():
        if "magnitude" in parts and "magnitude" not in file.shapes.get(prefix + name, {"magnitude": ()}):
            parts["magnitude"].copy_(row_norms(layer, name).reshape(parts["magnitude"].shape))


# --- whether a file fits -----------------------------------------------------------------------------------------------


def initial_file_errors(file: LoraFile, targets: LoraTargets, settings: AdapterConfig, family: ModelFamily) -> list[str]:
    """Returns why these targets cannot have the file's weights as initial ones; each message continues "<file> "."""
    errors = _kind_errors(file, targets)
    untrained = [name for name in file.shapes if name not in targets.modules]
    if untrained:
        advice = _how_to_add(untrained, settings, family)
        errors.append(f"has modules that are not among the targets: {shortened(untrained)}; {advice}")
    if not errors:
        shared = [name for name in file.shapes if name in targets.modules]
        find_errors = _factor_errors if targets.kind == "lokr" else _rank_errors
        errors += find_errors(shared, file, targets)
    return errors


def _kind_errors(file: LoraFile, targets: LoraTargets) -> list[str]:
    kinds: dict[str, list[str]] = {}
    for name, shapes in file.shapes.items():
        kind = "LoKr" if "down" not in shapes else "DoRA" if "magnitude" in shapes else "LoRA"
        kinds.setdefault(kind, []).append(name)
    allowed = ("LoKr",) if targets.kind == "lokr" else ("LoRA", "DoRA") if targets.dora else ("LoRA",)
    needed = {"LoKr": 'type = "lokr"', "LoRA": 'type = "lora"', "DoRA": 'type = "lora" and dora = true'}
    return [
        f"has a {kind} adapter for {shortened(names)}; to train it further, set {needed[kind]}"
        for kind, names in kinds.items()
        if kind not in allowed
    ]


def _how_to_add(modules: Iterable[str], settings: AdapterConfig, family: ModelFamily) -> str:
    """Returns how to make modules targets: the groups or names to add to `targets`, and `blocks` if it is too narrow."""
    missing = []
    for name in modules:
        groups = [group for group, pattern in family.lora_target_groups.items() if re.fullmatch(pattern, name)]
        missing.append(groups[0] if groups else name)
    configured = [target.pattern for target in settings.targets or ()] or list(family.default_lora_targets)
    new = [name for name in dict.fromkeys(missing) if name not in configured]
    advice = [f"add {shortened(new)} to targets"] if new else []
    within = modules_within_blocks(settings, family, [])
    if not within.issuperset(modules):
        advice.append(f"add their blocks to blocks = {settings.blocks!r}")
    return " and ".join(advice)


def _rank_errors(modules: Iterable[str], file: LoraFile, targets: LoraTargets) -> list[str]:
    higher = [
        f"{name} ({file.shapes[name]['down'][0]}, configured {targets.modules[name].rank})"
        for name in modules
        if file.shapes[name]["down"][0] > targets.modules[name].rank
    ]
    return [f"has a higher rank than configured: {shortened(higher)}; raise rank"] if higher else []


def _factor_errors(modules: Iterable[str], file: LoraFile, targets: LoraTargets) -> list[str]:
    different = [
        f"{name} ({_sizes(file.shapes[name])}; configured {_sizes(targets.shapes(name))})"
        for name in modules
        if {part: tuple(shape) for part, shape in file.shapes[name].items()} != targets.shapes(name)
    ]
    return [f"has factors of other shapes than configured: {shortened(different)}; change rank"] if different else []


def _sizes(shapes: Mapping[str, Shape]) -> str:
    return ", ".join(f"{part} {' x '.join(str(size) for size in shape)}" for part, shape in shapes.items())
