"""The MMDiT of Stable Diffusion 3 and 3.5 as plain single-device code, with the parameter names of the public files.

Two streams of tokens, image and text, each with weights of its own, meet in one attention per block. A conditioning row
c (timestep + pooled text) modulates every normalised input (adaLN): shift and scale before a sub-layer, a gate after it.
SD3.5 adds RMS norms on queries and keys, and SD3.5-medium a second attention (`attn2`) over the image tokens alone in its
first blocks. Source: SD3 paper, arXiv 2403.03206, sect. 4, and the layout of the released checkpoints.

Shapes: B batch, C latent channels, H W latent height and width, p patch size, S image tokens (H/p * W/p), L text tokens,
D width, N heads, K head width (64 in every released model).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

HEAD_WIDTH = 64
NORM_EPS = 1e-6
TIMESTEP_FREQUENCIES = 256


@dataclass(frozen=True)
class MMDiTConfig:
    """The shape of a network; everything here can be read from the shapes in a checkpoint (weights.detect_config)."""

    patch_size: int
    in_channels: int
    depth: int
    hidden_size: int
    context_dim: int
    pooled_dim: int
    pos_embed_max_size: int
    qk_norm: bool
    dual_attention_layers: tuple[int, ...]

    @property
    def num_heads(self) -> int:
        return self.hidden_size // HEAD_WIDTH


# --- conditioning and patches ------------------------------------------------------------------------------------------


def sinusoidal_embedding(timestep: Tensor, width: int = TIMESTEP_FREQUENCIES, max_period: float = 10_000.0) -> Tensor:
    """Cosines, then sines, of timestep at geometrically spaced frequencies.

    timestep (B,) in [0, 1000], any float dtype; the angles are computed in float32 because bfloat16 cannot tell 999 from
    1000. Returns (B, width) float32.
    """
    half = width // 2
    frequencies = torch.exp(-math.log(max_period) / half * torch.arange(half, dtype=torch.float32, device=timestep.device))
    angles = timestep.float()[:, None] * frequencies[None]
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


class ConditionEmbedder(nn.Module):
    """Linear, SiLU, Linear: a feature vector to the width of the network. (B, in_features) -> (B, D)."""

    def __init__(self, in_features: int, hidden_size: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(in_features, hidden_size), nn.SiLU(), nn.Linear(hidden_size, hidden_size))

    def forward(self, features: Tensor) -> Tensor:
        return self.mlp(features.to(next(self.parameters()).dtype))


class PatchEmbedder(nn.Module):
    """Non-overlapping p x p patches to tokens. (B, C, H, W) -> (B, S, D), rows first."""

    def __init__(self, patch_size: int, in_channels: int, hidden_size: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(in_channels, hidden_size, kernel_size=patch_size, stride=patch_size)

    def forward(self, latents: Tensor) -> Tensor:
        return self.proj(latents).flatten(2).transpose(1, 2)


def crop_position_table(table: Tensor, rows: int, columns: int) -> Tensor:
    """The centre rows x columns of a square position table: (1, P*P, D) -> (1, rows*columns, D).

    Raises ValueError when the image has more patches per side than the table.
    """
    size = math.isqrt(table.shape[1])
    if rows > size or columns > size:
        raise ValueError(f"{rows} x {columns} patches do not fit the position table of {size} x {size}")
    top, left = (size - rows) // 2, (size - columns) // 2
    grid = table.view(1, size, size, -1)[:, top : top + rows, left : left + columns]
    return grid.reshape(1, rows * columns, -1)


def unpatchify(tokens: Tensor, height: int, width: int, patch_size: int) -> Tensor:
    """Tokens laid out (p, p, C) back to an image: (B, S, p*p*C) -> (B, C, height, width), sizes in latent pixels."""
    rows, columns, p = height // patch_size, width // patch_size, patch_size
    grid = tokens.reshape(tokens.shape[0], rows, columns, p, p, -1)
    return torch.einsum("nhwpqc->nchpwq", grid).reshape(tokens.shape[0], -1, height, width)


class Embedders(nn.Module):
    """Everything before the first block: image, text and conditioning to the width of the network."""

    pos_embed: Tensor

    def __init__(self, config: MMDiTConfig) -> None:
        super().__init__()
        width = config.hidden_size
        self.config = config
        self.x_embedder = PatchEmbedder(config.patch_size, config.in_channels, width)
        self.t_embedder = ConditionEmbedder(TIMESTEP_FREQUENCIES, width)
        self.y_embedder = ConditionEmbedder(config.pooled_dim, width)
        self.context_embedder = nn.Linear(config.context_dim, width)
        self.register_buffer("pos_embed", torch.zeros(1, config.pos_embed_max_size**2, width))

    def embed(self, latents: Tensor, timestep: Tensor, context: Tensor, pooled: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """latents (B, C, H, W), timestep (B,) in [0, 1000] float32, context (B, L, context_dim), pooled (B, pooled_dim).

        Returns image tokens (B, S, D), text tokens (B, L, D), conditioning (B, D).
        """
        rows, columns = latents.shape[-2] // self.config.patch_size, latents.shape[-1] // self.config.patch_size
        tokens = self.x_embedder(latents)  # (B, S, D)
        tokens = tokens + crop_position_table(self.pos_embed, rows, columns).to(tokens.dtype)
        conditioning = self.t_embedder(sinusoidal_embedding(timestep)) + self.y_embedder(pooled)  # (B, D)
        return tokens, self.context_embedder(context), conditioning


# --- blocks ------------------------------------------------------------------------------------------------------------


def normalise(tokens: Tensor) -> Tensor:
    """LayerNorm over the width, without learned scale or offset."""
    return F.layer_norm(tokens, tokens.shape[-1:], eps=NORM_EPS)


def modulate(tokens: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """tokens (B, S, D) scaled and shifted by per-sample rows (B, D)."""
    return tokens * (1 + scale[:, None]) + shift[:, None]


class Attention(nn.Module):
    """Weights of one stream's attention: a fused qkv in three contiguous thirds, optional RMS norms, an output projection.

    `proj` is left out where the stream's output is not used (the text stream of the last block).
    """

    def __init__(self, config: MMDiTConfig, has_proj: bool = True) -> None:
        super().__init__()
        width = config.hidden_size
        self.num_heads = config.num_heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width) if has_proj else None
        self.ln_q = nn.RMSNorm(HEAD_WIDTH, eps=NORM_EPS) if config.qk_norm else None
        self.ln_k = nn.RMSNorm(HEAD_WIDTH, eps=NORM_EPS) if config.qk_norm else None

    def heads(self, tokens: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values: (B, S, D) -> three of (B, N, S, K)."""
        batch, length, _ = tokens.shape
        qkv = self.qkv(tokens).view(batch, length, 3, self.num_heads, HEAD_WIDTH)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        if self.ln_q is not None and self.ln_k is not None:
            q, k = self.ln_q(q), self.ln_k(k)
        return q, k, v


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Unmasked attention: three of (B, N, S, K) -> (B, S, D)."""
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


class Mlp(nn.Module):
    """Linear, GELU (tanh form), Linear, four times as wide inside."""

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(hidden_size, 4 * hidden_size)
        self.fc2 = nn.Linear(4 * hidden_size, hidden_size)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(tokens), approximate="tanh"))


class StreamBlock(nn.Module):
    """One stream's weights in one block. `pre_only`: gives queries, keys and values and ends there."""

    def __init__(self, config: MMDiTConfig, pre_only: bool = False, dual_attention: bool = False) -> None:
        super().__init__()
        width = config.hidden_size
        self.attn = Attention(config, has_proj=not pre_only)
        self.attn2 = Attention(config) if dual_attention else None
        self.mlp = None if pre_only else Mlp(width)
        num_rows = 2 if pre_only else 9 if dual_attention else 6
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, num_rows * width))
        self.num_rows = num_rows

    def modulation(self, conditioning: Tensor) -> tuple[Tensor, ...]:
        """(B, D) -> `num_rows` rows of (B, D)."""
        return self.adaLN_modulation(conditioning).chunk(self.num_rows, dim=-1)

    def finish(self, tokens: Tensor, attended: Tensor, rows: tuple[Tensor, ...]) -> Tensor:
        """All that follows the joint attention: gated residual, second attention, gated MLP. (B, S, D) -> (B, S, D)."""
        assert self.attn.proj is not None
        assert self.mlp is not None
        gate_msa, shift_mlp, scale_mlp, gate_mlp = rows[2:6]
        result = tokens + gate_msa[:, None] * self.attn.proj(attended)
        if self.attn2 is not None and self.attn2.proj is not None:
            shift_msa2, scale_msa2, gate_msa2 = rows[6:9]
            # The second attention reads the block's input, not the sum so far.
            second = attend(*self.attn2.heads(modulate(normalise(tokens), shift_msa2, scale_msa2)))
            result = result + gate_msa2[:, None] * self.attn2.proj(second)
        return result + gate_mlp[:, None] * self.mlp(modulate(normalise(result), shift_mlp, scale_mlp))


class JointBlock(nn.Module):
    """Text and image stream with one attention over both, text tokens first."""

    def __init__(self, config: MMDiTConfig, index: int) -> None:
        super().__init__()
        self.context_block = StreamBlock(config, pre_only=index == config.depth - 1)
        self.x_block = StreamBlock(config, dual_attention=index in config.dual_attention_layers)

    def mix(self, tokens: Tensor, context: Tensor, conditioning: Tensor) -> tuple[Tensor, Tensor | None]:
        """tokens (B, S, D), context (B, L, D), conditioning (B, D) -> new tokens, and new context or, in the last
        block, None."""
        x_rows = self.x_block.modulation(conditioning)
        context_rows = self.context_block.modulation(conditioning)
        streams = (
            self.context_block.attn.heads(modulate(normalise(context), context_rows[0], context_rows[1])),
            self.x_block.attn.heads(modulate(normalise(tokens), x_rows[0], x_rows[1])),
        )
        q, k, v = (torch.cat(pair, dim=2) for pair in zip(*streams, strict=True))
        length = context.shape[1]
        attended = attend(q, k, v)  # (B, L + S, D)
        new_tokens = self.x_block.finish(tokens, attended[:, length:], x_rows)
        if self.context_block.mlp is None:
            return new_tokens, None
        return new_tokens, self.context_block.finish(context, attended[:, :length], context_rows)


class FinalLayer(nn.Module):
    """Modulated norm and projection to patches of velocity."""

    def __init__(self, config: MMDiTConfig) -> None:
        super().__init__()
        width = config.hidden_size
        self.linear = nn.Linear(width, config.patch_size**2 * config.in_channels)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 2 * width))

    def project(self, tokens: Tensor, conditioning: Tensor) -> Tensor:
        """tokens (B, S, D), conditioning (B, D) -> (B, S, p*p*C)."""
        shift, scale = self.adaLN_modulation(conditioning).chunk(2, dim=-1)
        return self.linear(modulate(normalise(tokens), shift, scale))


class MMDiT(Embedders):
    """The whole network on one device; its state dict is the native checkpoint. Training uses layers.py instead."""

    def __init__(self, config: MMDiTConfig) -> None:
        super().__init__(config)
        self.joint_blocks = nn.ModuleList(JointBlock(config, index) for index in range(config.depth))
        self.final_layer = FinalLayer(config)

    def forward(self, latents: Tensor, timestep: Tensor, context: Tensor, pooled: Tensor) -> Tensor:
        """Velocity (B, C, H, W) of latents (B, C, H, W) at timestep (B,) = 1000 sigma, float32.

        context (B, L, context_dim) and pooled (B, pooled_dim): encoded text. H and W must be multiples of the patch size.
        """
        height, width = latents.shape[-2:]
        tokens, text, conditioning = self.embed(latents, timestep, context, pooled)
        for block in self.joint_blocks:
            assert isinstance(block, JointBlock)
            tokens, new_text = block.mix(tokens, text, conditioning)
            text = text if new_text is None else new_text
        return unpatchify(self.final_layer.project(tokens, conditioning), height, width, self.config.patch_size)
