"""Layers and tensor shapes of a network of a given config, on the meta device: nothing here allocates memory."""

from __future__ import annotations

import torch
from torch import nn

from models.sd3.layers import make_layer
from models.sd3.mmdit import MMDiT
from models.sd3.variants import MMDiTConfig, Shape


def network_shapes(config: MMDiTConfig) -> dict[str, Shape]:
    """Returns native tensor name -> shape of a whole network, parameters and buffers."""
    with torch.device("meta"):
        return {name: tuple(tensor.shape) for name, tensor in MMDiT(config).state_dict().items()}


def adaptable_modules(config: MMDiTConfig) -> dict[str, Shape]:
    """Returns native module name -> shape of its weight for every linear layer and convolution."""
    with torch.device("meta"):
        modules = MMDiT(config).named_modules()
        return {name: tuple(m.weight.shape) for name, m in modules if isinstance(m, nn.Linear | nn.Conv2d)}


def layer_shapes(config: MMDiTConfig, index: int) -> dict[str, Shape]:
    """Returns parameter name within pipeline layer `index` -> shape."""
    layer = empty_layer(config, index, torch.float32)
    return {name: tuple(parameter.shape) for name, parameter in layer.named_parameters()}


def empty_layer(config: MMDiTConfig, index: int, dtype: torch.dtype) -> nn.Module:
    """Builds pipeline layer `index` on the meta device: parameters in `dtype`, buffers in float32.

    The only buffer is the position table: a constant whose neighbouring rows bfloat16 cannot separate.
    `layer.to_empty(device=...)` allocates the tensors, uninitialised.
    """
    with torch.device("meta"):
        layer = make_layer(config, index)
    for parameter in layer.parameters():
        parameter.data = parameter.data.to(dtype)
    return layer
