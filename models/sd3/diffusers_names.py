"""Translation between native names, which this program uses, and those of diffusers' SD3Transformer2DModel.

diffusers splits each fused qkv into three modules, and stores (scale, shift) instead of (shift, scale) in two places: the
modulation of the final layer and that of the text stream in the last block. All other tensors differ in name only.
Source: diffusers, loaders/single_file_utils.py; tests/models/sd3/test_diffusers_names.py compares the values.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from models.sd3.variants import HEAD_WIDTH, MMDiTConfig

Shape = tuple[int, ...]

_TOP_LEVEL = {
    "x_embedder.proj": "pos_embed.proj",
    "context_embedder": "context_embedder",
    "t_embedder.mlp.0": "time_text_embed.timestep_embedder.linear_1",
    "t_embedder.mlp.2": "time_text_embed.timestep_embedder.linear_2",
    "y_embedder.mlp.0": "time_text_embed.text_embedder.linear_1",
    "y_embedder.mlp.2": "time_text_embed.text_embedder.linear_2",
    "final_layer.linear": "proj_out",
    "final_layer.adaLN_modulation.1": "norm_out.linear",
}
_IN_BLOCK = {
    "x_block.attn.qkv": ("attn.to_q", "attn.to_k", "attn.to_v"),
    "context_block.attn.qkv": ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
    "x_block.attn.proj": ("attn.to_out.0",),
    "context_block.attn.proj": ("attn.to_add_out",),
    "x_block.attn.ln_q": ("attn.norm_q",),
    "x_block.attn.ln_k": ("attn.norm_k",),
    "context_block.attn.ln_q": ("attn.norm_added_q",),
    "context_block.attn.ln_k": ("attn.norm_added_k",),
    "x_block.attn2.qkv": ("attn2.to_q", "attn2.to_k", "attn2.to_v"),
    "x_block.attn2.proj": ("attn2.to_out.0",),
    "x_block.attn2.ln_q": ("attn2.norm_q",),
    "x_block.attn2.ln_k": ("attn2.norm_k",),
    "x_block.mlp.fc1": ("ff.net.0.proj",),
    "x_block.mlp.fc2": ("ff.net.2",),
    "context_block.mlp.fc1": ("ff_context.net.0.proj",),
    "context_block.mlp.fc2": ("ff_context.net.2",),
    "x_block.adaLN_modulation.1": ("norm1.linear",),
    "context_block.adaLN_modulation.1": ("norm1_context.linear",),
}
_NATIVE_TOP_LEVEL = {diffusers: native for native, diffusers in _TOP_LEVEL.items()}
_NATIVE_IN_BLOCK = {
    diffusers: (native, part, len(names)) for native, names in _IN_BLOCK.items() for part, diffusers in enumerate(names)
}
_POSITION_TABLE = ("pos_embed", "pos_embed.pos_embed")
"""The native name and diffusers'."""


def diffusers_modules(module: str) -> tuple[str, ...]:
    """Returns diffusers' names of a native module: one, or three for a fused qkv. Raises KeyError for other names."""
    match = re.fullmatch(r"joint_blocks\.(\d+)\.(.+)", module)
    if match is None:
        return (_TOP_LEVEL[module],)
    return tuple(f"transformer_blocks.{match.group(1)}.{name}" for name in _IN_BLOCK[match.group(2)])


def native_module(module: str) -> tuple[str, int, int]:
    """Returns (native name, index of the part, number of parts) of a diffusers module. Raises KeyError for other names."""
    match = re.fullmatch(r"transformer_blocks\.(\d+)\.(.+)", module)
    if match is None:
        return _NATIVE_TOP_LEVEL[module], 0, 1
    name, part, num_parts = _NATIVE_IN_BLOCK[match.group(2)]
    return f"joint_blocks.{match.group(1)}.{name}", part, num_parts


def swaps_halves(module: str, depth: int) -> bool:
    """Returns whether diffusers stores (scale, shift) for the native (shift, scale) of this module."""
    last_context = f"joint_blocks.{depth - 1}.context_block.adaLN_modulation.1"
    return module in ("final_layer.adaLN_modulation.1", last_context)


def swap_halves(tensor: Tensor) -> Tensor:
    """Swaps the first and second half of the rows."""
    return torch.cat(tensor.chunk(2)[::-1])


# --- whole tensors -----------------------------------------------------------------------------------------------------


def diffusers_names(name: str) -> tuple[str, ...]:
    """Returns diffusers' names of a native tensor, in the order of its rows. Raises KeyError for other names."""
    if name == _POSITION_TABLE[0]:
        return (_POSITION_TABLE[1],)
    module, _, leaf = name.rpartition(".")
    return tuple(f"{diffusers}.{leaf}" for diffusers in diffusers_modules(module))


def to_diffusers(name: str, tensor: Tensor, depth: int) -> dict[str, Tensor]:
    """Splits a native tensor into diffusers' tensors, by name."""
    names = diffusers_names(name)
    if swaps_halves(name.rpartition(".")[0], depth):
        tensor = swap_halves(tensor)
    return dict(zip(names, tensor.chunk(len(names)), strict=True))


def to_native(name: str, tensors: list[Tensor], depth: int) -> Tensor:
    """Joins diffusers' tensors, in the order of `diffusers_names`, into the native tensor of that name."""
    tensor = tensors[0] if len(tensors) == 1 else torch.cat(tensors)
    return swap_halves(tensor) if swaps_halves(name.rpartition(".")[0], depth) else tensor


def native_shapes(shapes: Mapping[str, Shape]) -> dict[str, Shape]:
    """Converts diffusers' name -> shape to native name -> shape.

    Tensors without a native name, and native tensors of which a part is missing, are skipped.
    """
    parts: dict[str, dict[int, Shape]] = {}
    num_parts: dict[str, int] = {}
    for diffusers_name, shape in shapes.items():
        if diffusers_name == _POSITION_TABLE[1]:
            parts[_POSITION_TABLE[0]], num_parts[_POSITION_TABLE[0]] = {0: shape}, 1
            continue
        module, _, leaf = diffusers_name.rpartition(".")
        try:
            native, part, count = native_module(module)
        except KeyError:
            continue
        parts.setdefault(f"{native}.{leaf}", {})[part] = shape
        num_parts[f"{native}.{leaf}"] = count
    return {
        name: (sum(shape[0] for shape in found.values()), *found[0][1:])
        for name, found in parts.items()
        if len(found) == num_parts[name] and all(found.values())
    }


def transformer_config(config: MMDiTConfig) -> dict[str, Any]:
    """Returns config.json of an SD3Transformer2DModel of this shape."""
    return {
        "_class_name": "SD3Transformer2DModel",
        "_diffusers_version": "0.31.0",  # the first version that has all of these keys
        "attention_head_dim": HEAD_WIDTH,
        "caption_projection_dim": config.hidden_size,
        "dual_attention_layers": list(config.dual_attention_layers),
        "in_channels": config.in_channels,
        "joint_attention_dim": config.context_dim,
        "num_attention_heads": config.num_heads,
        "num_layers": config.depth,
        "out_channels": config.in_channels,
        "patch_size": config.patch_size,
        "pooled_projection_dim": config.pooled_dim,
        "pos_embed_max_size": config.pos_embed_max_size,
        "qk_norm": "rms_norm" if config.qk_norm else None,
        "sample_size": 128,
    }
