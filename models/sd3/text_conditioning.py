"""Joins the outputs of the text encoders into the two inputs of the network.

Shapes: B batch, L text tokens.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from models.sd3.settings import TextTokens
from models.sd3.variants import MMDiTConfig


def join_text(text: Mapping[str, Tensor], num_tokens: TextTokens, config: MMDiTConfig) -> tuple[Tensor, Tensor]:
    """Returns context (B, L, context_dim) and pooled (B, pooled_dim).

    text: "clip_l.sequence" (B, tokens, width), "clip_l.pooled" (B, width) and so on, of the encoders that are on.
    Context: CLIP's tokens (features of CLIP-L and CLIP-G side by side, zeros up to the width), then T5's. Pooled: CLIP-L's
    features, then CLIP-G's. An encoder that is off contributes zeros, or no tokens where its length in `num_tokens` is 0.
    """
    some = next(iter(text.values()))
    clips = [text[f"{name}.sequence"] for name in ("clip_l", "clip_g") if f"{name}.sequence" in text]
    pooled = [text[f"{name}.pooled"] for name in ("clip_l", "clip_g") if f"{name}.pooled" in text]
    offset = 0
    if len(pooled) == 1:
        # CLIP-G alone keeps its place: it starts after the features of CLIP-L, whose width is the rest of the pooled width.
        offset = config.pooled_dim - pooled[0].shape[-1] if "clip_g.pooled" in text else 0
    clip = torch.cat(clips, dim=-1) if clips else some.new_zeros(some.shape[0], num_tokens.clip, 0)
    clip = F.pad(clip, (offset, config.context_dim - offset - clip.shape[-1]))
    t5 = text.get("t5xxl.sequence", some.new_zeros(some.shape[0], num_tokens.t5xxl, config.context_dim))
    both = torch.cat(pooled, dim=-1) if pooled else some.new_zeros(some.shape[0], 0)
    return torch.cat([clip, t5], dim=1), F.pad(both, (offset, config.pooled_dim - offset - both.shape[-1]))
