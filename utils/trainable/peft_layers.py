"""LoRA, DoRA and LoKr in a pipeline layer, through peft: their injection, and their tensors by native module name.

Low rank (LoRA): W + scale * up @ down, with scale = alpha / rank, or alpha / sqrt(rank) when rank-stabilized (rsLoRA,
arXiv 2312.03732). DoRA (arXiv 2402.09353): the same, then each row is scaled to a trained norm, its magnitude.
LoKr (arXiv 2309.14859): W + alpha / rank * kron(w1, w2). Each side of W is split into two factors as close to each other as
possible; the smaller ones are the sides of w1. w1 is a full matrix; w2 is w2_a @ w2_b of the given rank, or a full matrix
where a product would not be smaller.

Everything works on one layer at a time. The layer's prefix and a module's name within the layer make its native name.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from models.family import ModuleAdapter
from utils import randomness
from utils.trainable.targets import LoraTarget, LoraTargets

ADAPTER_NAME = "default"
PARAMETER_SUFFIXES = {
    "down": f".lora_A.{ADAPTER_NAME}.weight",
    "up": f".lora_B.{ADAPTER_NAME}.weight",
    "magnitude": f".lora_magnitude_vector.{ADAPTER_NAME}.weight",
    **{part: f".lokr_{part}.{ADAPTER_NAME}" for part in ("w1", "w2", "w2_a", "w2_b")},
}
"""Tensor name of ModuleAdapter -> what follows a module's name in the name of peft's parameter."""
_RANDOM = ("down", "w2", "w2_a", "w2_b")
"""Tensors with random initial values. The others are zero at first, except magnitudes: they are the norms of W's rows."""


def inject(layer: nn.Module, prefix: str, targets: LoraTargets, *, seed: int) -> None:
    """Freezes the layer and gives its target modules an adapter that does not change their output yet.

    Random initial values depend on the seed and the module's native name only, so they are equal in every layout.
    """
    layer.requires_grad_(False)
    names = [name for name, _ in layer.named_modules() if prefix + name in targets.modules]
    if not names:
        return
    from peft import inject_adapter_in_model  # imported here: it is slow, and only runs with an adapter need it

    config = _peft_config(targets, {name: targets.modules[prefix + name] for name in names})
    with torch.random.fork_rng(devices=[]):  # peft draws random numbers too; the global generator must not depend on it
        inject_adapter_in_model(config, layer, adapter_name=ADAPTER_NAME)
    for name, parts in adapter_parameters(layer).items():
        for part in _RANDOM:
            if part in parts:
                # The key of `down` is the module's name alone, as in versions that had only LoRA.
                key = (prefix + name,) if part == "down" else (prefix + name, part)
                drawn = randomness.kaiming_uniform(seed, "lora", *key, shape=tuple(parts[part].shape))
                with torch.no_grad():
                    parts[part].copy_(drawn)


def _peft_config(targets: LoraTargets, modules: Mapping[str, LoraTarget]) -> Any:
    """peft's configuration for these modules of a layer (name within the layer -> target)."""
    from peft import LoKrConfig, LoraConfig

    first = next(iter(modules.values()))
    # peft matches the end of a module's name unless a pattern is anchored; the first pattern that matches applies.
    ranks = {f"^{re.escape(name)}": module.rank for name, module in modules.items()}
    alphas = {f"^{re.escape(name)}": module.alpha for name, module in modules.items()}
    expression = "|".join(re.escape(name) for name in modules)
    if targets.kind == "lokr":
        # NOTE peft 0.21 skips a module whenever a number drawn from [0, 1) is not above module_dropout, even if that is 0.0.
        return LoKrConfig(
            r=first.rank,
            alpha=first.alpha,  # type: ignore[arg-type]
            rank_pattern=ranks,
            alpha_pattern=alphas,
            target_modules=expression,
            module_dropout=-1.0,
        )
    return LoraConfig(
        r=first.rank,
        lora_alpha=first.alpha,  # type: ignore[arg-type]
        rank_pattern=ranks,
        alpha_pattern=alphas,
        target_modules=expression,
        lora_dropout=0.0,
        use_rslora=targets.rank_stabilized,
        use_dora=targets.dora,
    )


def adapter_parameters(layer: nn.Module) -> dict[str, dict[str, nn.Parameter]]:
    """Returns name of a module within the layer -> tensor name of ModuleAdapter -> parameter."""
    found: dict[str, dict[str, nn.Parameter]] = {}
    for part, suffix in PARAMETER_SUFFIXES.items():
        for name, parameter in layer.named_parameters():
            if name.endswith(suffix):
                found.setdefault(name.removesuffix(suffix), {})[part] = parameter
    return found


def adapter_scale(layer: nn.Module, name: str) -> float:
    """Returns the factor of the update of a module (name within the layer), computed from rank and alpha."""
    module: Any = layer.get_submodule(name)
    return float(module.scaling[ADAPTER_NAME])


def row_norms(layer: nn.Module, name: str) -> Tensor:
    """Returns the row norms of a DoRA module's weight and update, bit for bit those that its forward pass divides by."""
    module: Any = layer.get_submodule(name)
    dora, weight = module.lora_magnitude_vector[ADAPTER_NAME], module.get_base_layer().weight
    update = dora.get_lora_weight(module.lora_A[ADAPTER_NAME], module.lora_B[ADAPTER_NAME])
    norms: Tensor = dora.get_weight_norm(weight, update.reshape(weight.shape), module.scaling[ADAPTER_NAME])
    return norms


def collect(layer: nn.Module, prefix: str, values: Mapping[str, Tensor]) -> dict[str, ModuleAdapter]:
    """Returns native module name -> adapter of the layer, with tensors from `values` (parameter name -> tensor)."""
    adapters = {}
    for name, parts in adapter_parameters(layer).items():
        tensors = {part: values[name + PARAMETER_SUFFIXES[part]] for part in parts}
        if "magnitude" in tensors:
            tensors["magnitude"] = tensors["magnitude"].flatten()  # (out,), of a convolution from (1, out, 1, 1)
        adapters[prefix + name] = ModuleAdapter(tensors, adapter_scale(layer, name))
    return adapters
