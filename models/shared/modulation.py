"""Adaptive layer normalization (adaLN): a per-sample shift and scale instead of learned ones (DiT, arXiv 2212.09748).

Shapes: B batch, S tokens, D width.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

LAYER_NORM_EPS = 1e-6


def normalise(tokens: Tensor) -> Tensor:
    """LayerNorm over the width, without learned scale or offset: (B, S, D) -> (B, S, D)."""
    return F.layer_norm(tokens, tokens.shape[-1:], eps=LAYER_NORM_EPS)


def modulate(tokens: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """tokens * (1 + scale) + shift: tokens (B, S, D), shift and scale (B, D) -> (B, S, D)."""
    return tokens * (1 + scale[:, None]) + shift[:, None]
