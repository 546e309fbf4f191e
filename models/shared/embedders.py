"""Embeddings of timesteps, feature vectors and image patches, and the inverse of the patch layout.

Shapes: B batch, C latent channels, H W latent height and width, p patch size, S image tokens (H/p * W/p), D width.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn


def sinusoidal_embedding(timestep: Tensor, width: int, max_period: float = 10_000.0) -> Tensor:
    """Cosines, then sines, of the timestep at geometrically spaced frequencies: (B,) -> (B, width) float32.

    timestep is in [0, 1000], any float dtype. The angles are computed in float32: bfloat16 rounds 999 to 1000.
    """
    half = width // 2
    frequencies = torch.exp(-math.log(max_period) / half * torch.arange(half, dtype=torch.float32, device=timestep.device))
    angles = timestep.float()[:, None] * frequencies[None]
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


class ConditionEmbedder(nn.Module):
    """Linear, SiLU, Linear: a feature vector to the width of the network. (B, in_features) -> (B, D)."""

    def __init__(self, in_features: int, width: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(in_features, width), nn.SiLU(), nn.Linear(width, width))

    def forward(self, features: Tensor) -> Tensor:
        return self.mlp(features.to(next(self.parameters()).dtype))


class PatchEmbedder(nn.Module):
    """Non-overlapping p x p patches to tokens in row-major order. (B, C, H, W) -> (B, S, D)."""

    def __init__(self, patch_size: int, in_channels: int, width: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(in_channels, width, kernel_size=patch_size, stride=patch_size)

    def forward(self, latents: Tensor) -> Tensor:
        return self.proj(latents).flatten(2).transpose(1, 2)


def unpatchify(tokens: Tensor, height: int, width: int, patch_size: int) -> Tensor:
    """Puts tokens of layout (p, p, C) back in place: (B, S, p*p*C) -> (B, C, height, width), sizes in latent pixels."""
    rows, columns, p = height // patch_size, width // patch_size, patch_size
    grid = tokens.reshape(tokens.shape[0], rows, columns, p, p, -1)
    return torch.einsum("nhwpqc->nchpwq", grid).reshape(tokens.shape[0], -1, height, width)
