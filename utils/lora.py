"""Low-rank adapters through peft: choose modules by native name, put adapters in, take their weights out.

Works on one pipeline layer at a time; a layer's module names with its prefix in front are the network's native names.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

from models.base import LoraWeights
from utils import randomness

ADAPTER_NAME = "default"
_DOWN = f".lora_A.{ADAPTER_NAME}.weight"
_UP = f".lora_B.{ADAPTER_NAME}.weight"


def match_targets(module_names: Iterable[str], patterns: Sequence[str]) -> list[str]:
    """The modules that any of the patterns (regular expressions, whole name) chooses, in the order given."""
    compiled = [re.compile(pattern) for pattern in patterns]
    return [name for name in module_names if any(pattern.fullmatch(name) for pattern in compiled)]


def inject(layer: nn.Module, prefix: str, targets: Sequence[str], *, rank: int, alpha: float, seed: int) -> None:
    """Freeze the layer and give those of its linear modules that are among `targets` (native names) an adapter.

    A starts as torch.nn.Linear's default, drawn by the module's name so that no layout changes it; B starts at zero.
    """
    layer.requires_grad_(False)
    local = [name for name, _ in layer.named_modules() if prefix + name in set(targets)]
    if not local:
        return
    from peft import LoraConfig, inject_adapter_in_model  # here: a run without adapter need not wait for the import

    chosen = "|".join(re.escape(name) for name in local)
    config = LoraConfig(r=rank, lora_alpha=alpha, target_modules=chosen, lora_dropout=0.0)  # type: ignore[arg-type]
    inject_adapter_in_model(config, layer, adapter_name=ADAPTER_NAME)
    for name in _adapted_modules(layer):
        down = layer.get_parameter(f"{name}{_DOWN}")
        drawn = randomness.kaiming_uniform(seed, "lora", prefix + name, shape=tuple(down.shape))
        with torch.no_grad():
            down.copy_(drawn)
            layer.get_parameter(f"{name}{_UP}").zero_()


def _adapted_modules(layer: nn.Module) -> list[str]:
    return [name.removesuffix(_DOWN) for name, _ in layer.named_parameters() if name.endswith(_DOWN)]


def collect(layer: nn.Module, prefix: str, values: dict[str, Tensor], alpha: float) -> LoraWeights:
    """The layer's adapters by native module name, with the tensors taken from `values` (parameter name -> tensor)."""
    pairs = {}
    for name in _adapted_modules(layer):
        pairs[prefix + name] = (values[name + _DOWN], values[name + _UP])
    return LoraWeights(pairs, alpha)
