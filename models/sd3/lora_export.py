"""Tensors of adapters in public formats: the native one of sd-scripts and ComfyUI, and diffusers'."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from models.family import ModuleAdapter
from models.sd3.diffusers_names import diffusers_modules, swap_halves, swaps_halves
from models.sd3.lora_keys import DIFFUSERS_PREFIX, KRONECKER, NATIVE_PREFIX


def native_adapter(modules: Mapping[str, ModuleAdapter]) -> dict[str, Tensor]:
    """Returns the tensors of adapters (native module name -> adapter) under native keys; `alpha` is float32."""
    tensors: dict[str, Tensor] = {}
    for module, adapter in modules.items():
        key = NATIVE_PREFIX + module.replace(".", "_")
        write = _native_low_rank if "down" in adapter.tensors else _native_kronecker
        tensors.update({f"{key}.{name}": tensor for name, tensor in write(adapter).items()})
    return tensors


def _native_low_rank(adapter: ModuleAdapter) -> dict[str, Tensor]:
    down, up = adapter.tensors["down"], adapter.tensors["up"]
    named = {"lora_down.weight": down, "lora_up.weight": up, "alpha": _scalar(adapter.scale * down.shape[0], down)}
    if "magnitude" in adapter.tensors:
        named["dora_scale"] = adapter.tensors["magnitude"].reshape(-1, *[1] * (down.dim() - 1))
    return named


def _native_kronecker(adapter: ModuleAdapter) -> dict[str, Tensor]:
    """Multiplies the scale into w1 where no factor is a product: readers apply alpha / rank to products only."""
    tensors = dict(adapter.tensors)
    ranks = [tensor.shape[0] for name, tensor in tensors.items() if name.endswith("_b")]
    if ranks:
        alpha = adapter.scale * ranks[0]
    else:
        alpha = 1.0
        tensors["w1"] = (tensors["w1"].float() * adapter.scale).to(tensors["w1"].dtype)
    named = {KRONECKER[name]: tensor for name, tensor in tensors.items()}
    return {**named, "alpha": _scalar(alpha, next(iter(tensors.values())))}


def _scalar(value: float, like: Tensor) -> Tensor:
    return torch.tensor(value, dtype=torch.float32, device=like.device)


def diffusers_adapter(modules: Mapping[str, ModuleAdapter], depth: int) -> dict[str, Tensor]:
    """Returns the tensors of low-rank adapters (native module name -> adapter) under diffusers' keys.

    The scale is multiplied into B. A fused qkv becomes three modules that share A and have a third of B's rows each. Where
    diffusers stores (scale, shift) instead of (shift, scale), the halves of the rows are swapped.
    """
    tensors: dict[str, Tensor] = {}
    for module, adapter in modules.items():
        down, up = adapter.tensors["down"], adapter.tensors["up"]
        rows = {"lora_B.weight": (up.float() * adapter.scale).to(up.dtype)}
        if "magnitude" in adapter.tensors:
            rows["lora_magnitude_vector.weight"] = adapter.tensors["magnitude"]
        if swaps_halves(module, depth):
            rows = {suffix: swap_halves(tensor) for suffix, tensor in rows.items()}
        names = diffusers_modules(module)
        for index, name in enumerate(names):
            key = DIFFUSERS_PREFIX + name
            tensors[f"{key}.lora_A.weight"] = down.clone()
            for suffix, tensor in rows.items():
                part = tensor.chunk(len(names))[index].contiguous()
                is_convolution = suffix.startswith("lora_magnitude") and down.dim() == 4
                tensors[f"{key}.{suffix}"] = part.reshape(1, -1, 1, 1) if is_convolution else part
    return tensors
