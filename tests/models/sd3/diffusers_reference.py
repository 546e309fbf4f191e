"""The same network in diffusers, and an independent conversion of native tensors to diffusers' names.

It is written from the layout of the public files, and the program's own table is compared with it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from models.sd3.variants import MMDiTConfig


def convert_module(name: str, depth: int) -> tuple[list[str], bool]:
    """Returns a native module's names in diffusers, and whether the halves of its rows are swapped."""
    if not name.startswith("joint_blocks."):
        if name.startswith(("t_embedder.mlp.", "y_embedder.mlp.")):
            target = "timestep_embedder" if name.startswith("t_") else "text_embedder"
            return [f"time_text_embed.{target}.linear_{1 if name.endswith('0') else 2}"], False
        if name == "final_layer.adaLN_modulation.1":
            return ["norm_out.linear"], True
        return [{"x_embedder.proj": "pos_embed.proj", "final_layer.linear": "proj_out"}.get(name, name)], False
    _, index, stream, *rest = name.split(".")
    block, part, image = f"transformer_blocks.{index}", ".".join(rest), stream == "x_block"
    if part == "adaLN_modulation.1":
        return [f"{block}.norm1.linear" if image else f"{block}.norm1_context.linear"], not image and int(index) == depth - 1
    if part.startswith("mlp."):
        feed_forward = "ff" if image else "ff_context"
        return [f"{block}.{feed_forward}.{'net.0.proj' if part == 'mlp.fc1' else 'net.2'}"], False
    attention, weight = part.split(".")
    if weight == "qkv":
        names = ["to_q", "to_k", "to_v"] if image else ["add_q_proj", "add_k_proj", "add_v_proj"]
        return [f"{block}.{attention}.{name}" for name in names], False
    if weight == "proj":
        return [f"{block}.{attention}.{'to_out.0' if image else 'to_add_out'}"], False
    return [f"{block}.{attention}.{'norm_' if image else 'norm_added_'}{weight[-1]}"], False


def to_diffusers(native: Mapping[str, Tensor], depth: int) -> dict[str, Tensor]:
    """Converts native tensors, weights or gradients, to diffusers' names."""
    converted = {}
    for key, tensor in native.items():
        if key == "pos_embed":
            converted["pos_embed.pos_embed"] = tensor
            continue
        module, _, kind = key.rpartition(".")
        names, swapped = convert_module(module, depth)
        rows = tensor.chunk(len(names))
        if swapped:
            first, second = tensor.chunk(2)
            rows = (torch.cat([second, first]),)
        for name, part in zip(names, rows, strict=True):
            converted[f"{name}.{kind}"] = part.clone()
    return converted


def diffusers_network(config: MMDiTConfig, weights: Mapping[str, Tensor]) -> Any:
    """Returns diffusers' SD3Transformer2DModel of this shape with these native weights."""
    from diffusers import SD3Transformer2DModel

    network = SD3Transformer2DModel(
        sample_size=config.pos_embed_max_size * config.patch_size,
        patch_size=config.patch_size,
        in_channels=config.in_channels,
        out_channels=config.in_channels,
        num_layers=config.depth,
        attention_head_dim=64,
        num_attention_heads=config.hidden_size // 64,
        caption_projection_dim=config.hidden_size,
        joint_attention_dim=config.context_dim,
        pooled_projection_dim=config.pooled_dim,
        pos_embed_max_size=config.pos_embed_max_size,
        dual_attention_layers=config.dual_attention_layers,
        qk_norm="rms_norm" if config.qk_norm else None,
    )
    network.load_state_dict(to_diffusers(weights, config.depth))
    return network


def relative_error(value: Tensor, reference: Tensor) -> float:
    """Returns the norm of the difference divided by the norm of the reference; 0 if the difference is 0."""
    difference, size = (value - reference).detach().norm(), reference.detach().norm()
    return float(difference / size) if difference > 0 else 0.0
