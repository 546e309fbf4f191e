"""The shape of an SD3 network: of the released variants by name, or of a file from the shapes of its tensors."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass

Shape = tuple[int, ...]

HEAD_WIDTH = 64
"""Width of an attention head in every released network."""


@dataclass(frozen=True)
class MMDiTConfig:
    """The shape of a network; every field can be read from the shapes of its tensors (`detect_config`)."""

    patch_size: int
    in_channels: int
    depth: int
    hidden_size: int
    context_dim: int
    pooled_dim: int
    pos_embed_max_size: int
    """Patches per side of the position table."""
    qk_norm: bool
    dual_attention_layers: tuple[int, ...]
    """Indices of the blocks with a second attention over the image tokens alone."""

    @property
    def num_heads(self) -> int:
        return self.hidden_size // HEAD_WIDTH


# --- released variants -------------------------------------------------------------------------------------------------


def _released(depth: int, pos_embed_max_size: int, qk_norm: bool, num_dual_blocks: int = 0) -> MMDiTConfig:
    """Every released network has as many heads as blocks, and the same latents and text encoders."""
    return MMDiTConfig(
        patch_size=2,
        in_channels=16,
        depth=depth,
        hidden_size=depth * HEAD_WIDTH,
        context_dim=4096,
        pooled_dim=2048,
        pos_embed_max_size=pos_embed_max_size,
        qk_norm=qk_norm,
        dual_attention_layers=tuple(range(num_dual_blocks)),
    )


VARIANTS: Mapping[str, MMDiTConfig] = {
    "SD3-medium": _released(depth=24, pos_embed_max_size=192, qk_norm=False),
    "SD3.5-medium": _released(depth=24, pos_embed_max_size=384, qk_norm=True, num_dual_blocks=13),
    "SD3.5-large": _released(depth=38, pos_embed_max_size=192, qk_norm=True),
    "SD3.5-large-turbo": _released(depth=38, pos_embed_max_size=192, qk_norm=True),
}


def variant_config(name: str) -> MMDiTConfig:
    """Returns the shape of a released variant. Raises ValueError, listing the known names, for any other name."""
    if name not in VARIANTS:
        raise ValueError(f"unknown variant {name!r}; known are {', '.join(VARIANTS)}")
    return VARIANTS[name]


def variant_name(config: MMDiTConfig) -> str:
    """Returns the name of the released network of this shape, or a description of the shape."""
    if config.hidden_size == 2432 and config.depth == 38 and config.qk_norm:
        return "SD3.5-large (or large-turbo, which has the same shapes)"
    if config.hidden_size == 1536 and config.depth == 24:
        return "SD3.5-medium" if config.dual_attention_layers else "SD3-medium"
    kind = "SD3.5-medium-like" if config.dual_attention_layers else "SD3.5-large-like" if config.qk_norm else "SD3-like"
    return f"{kind} (width {config.hidden_size}, depth {config.depth})"


def architecture_id(config: MMDiTConfig) -> str:
    """Returns `modelspec.architecture` of the released variant with the same kind of blocks."""
    if config.dual_attention_layers:
        return "stable-diffusion-3-5-medium"
    return "stable-diffusion-3-5-large" if config.qk_norm else "stable-diffusion-3-medium"


# --- detection ---------------------------------------------------------------------------------------------------------

_DEFINING_TENSORS = {
    "x_embedder.proj.weight": 4,
    "pos_embed": 3,
    "context_embedder.weight": 2,
    "y_embedder.mlp.0.weight": 2,
}
"""Tensors the shape of the network is read from -> number of axes."""


def detect_config(shapes: Mapping[str, Shape], name_in_file: Callable[[str], str] = str) -> MMDiTConfig:
    """Reads the shape of the network from the shapes of its tensors (native name -> shape).

    name_in_file: native name -> name of the tensor in error messages.
    Raises ValueError when a defining tensor is missing or has the wrong number of axes.
    """
    _check_defining_tensors(shapes, name_in_file)
    hidden_size, in_channels, patch_size = shapes["x_embedder.proj.weight"][:3]
    if hidden_size % HEAD_WIDTH:
        raise ValueError(f"has width {hidden_size}, which is not a multiple of the head width, {HEAD_WIDTH}")
    depth = 1 + max(_block_indices(shapes))
    return MMDiTConfig(
        patch_size=patch_size,
        in_channels=in_channels,
        depth=depth,
        hidden_size=hidden_size,
        context_dim=shapes["context_embedder.weight"][1],
        pooled_dim=shapes["y_embedder.mlp.0.weight"][1],
        pos_embed_max_size=math.isqrt(shapes["pos_embed"][1]),
        qk_norm=any(".attn.ln_" in name for name in shapes),
        dual_attention_layers=tuple(
            index for index in range(depth) if any(f"joint_blocks.{index}.x_block.attn2." in name for name in shapes)
        ),
    )


def _check_defining_tensors(shapes: Mapping[str, Shape], name_in_file: Callable[[str], str]) -> None:
    missing = [name_in_file(name) for name in _DEFINING_TENSORS if name not in shapes]
    if missing or not _block_indices(shapes):
        raise ValueError(f"has no {', '.join(missing) or 'joint_blocks.*'}")
    wrong = [name for name, num_axes in _DEFINING_TENSORS.items() if len(shapes[name]) != num_axes]
    if wrong:
        raise ValueError(
            "; ".join(
                f"has tensor {name_in_file(name)} of shape {shapes[name]}, expected {_DEFINING_TENSORS[name]} axes"
                for name in wrong
            )
        )


def _block_indices(shapes: Mapping[str, Shape]) -> set[int]:
    return {int(match.group(1)) for name in shapes if (match := re.match(r"joint_blocks\.(\d+)\.", name))}
