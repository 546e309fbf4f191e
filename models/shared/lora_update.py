"""The change that a LoRA, DoRA or LoKr adapter makes to a weight."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from models.family import ModuleAdapter


def lora_update(adapter: ModuleAdapter, shape: tuple[int, ...]) -> Tensor:
    """Returns what a low-rank or Kronecker adapter adds to a weight of this shape, before any magnitude; float32."""
    tensors = {name: tensor.float() for name, tensor in adapter.tensors.items()}
    if "down" in tensors:
        delta = tensors["up"].flatten(1) @ tensors["down"].flatten(1)
    else:
        delta = torch.kron(_factor(tensors, "w1"), _factor(tensors, "w2"))
    return adapter.scale * delta.reshape(shape)


def _factor(tensors: Mapping[str, Tensor], name: str) -> Tensor:
    return tensors[name] if name in tensors else tensors[f"{name}_a"] @ tensors[f"{name}_b"]


def merge_lora(weight: Tensor, adapter: ModuleAdapter, strength: float) -> Tensor:
    """Returns weight + strength * (adapted weight - weight), float32."""
    adapted = weight + lora_update(adapter, tuple(weight.shape))
    if "magnitude" in adapter.tensors:
        norm = adapted.flatten(1).norm(dim=1)
        factor = adapter.tensors["magnitude"].float() / norm
        adapted = adapted * factor.reshape(-1, *[1] * (weight.dim() - 1))
    return weight + strength * (adapted - weight)
