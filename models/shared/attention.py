"""Multi-head attention with a fused qkv projection, split so that several streams can share one attention.

Shapes: B batch, S tokens, D width, N heads, K head width (D = N * K).
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

RMS_NORM_EPS = 1e-6


class Attention(nn.Module):
    """The projections of one stream: fused qkv (three contiguous thirds), optional RMS norms of q and k, output.

    `has_proj=False` omits the output projection, for a stream whose output is not used.
    """

    def __init__(self, width: int, head_width: int, qk_norm: bool, has_proj: bool) -> None:
        super().__init__()
        self.head_width = head_width
        self.num_heads = width // head_width
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width) if has_proj else None
        self.ln_q = nn.RMSNorm(head_width, eps=RMS_NORM_EPS) if qk_norm else None
        self.ln_k = nn.RMSNorm(head_width, eps=RMS_NORM_EPS) if qk_norm else None

    def heads(self, projected: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Returns queries, keys and values from the output of `qkv`: (B, S, 3 D) -> three of (B, N, S, K)."""
        batch, length, _ = projected.shape
        q, k, v = projected.view(batch, length, 3, self.num_heads, self.head_width).permute(2, 0, 3, 1, 4)
        if self.ln_q is not None and self.ln_k is not None:
            q, k = self.ln_q(q), self.ln_k(k)
        return q, k, v


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Unmasked attention: three of (B, N, S, K) -> (B, S, D)."""
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
