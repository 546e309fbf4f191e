"""The feed-forward network of a transformer block.

Shapes: B batch, S tokens, D width.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn


class Mlp(nn.Module):
    """Linear, GELU (tanh approximation), Linear; the hidden width is 4 D. (B, S, D) -> (B, S, D)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, 4 * width)
        self.fc2 = nn.Linear(4 * width, width)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.finish(self.fc1(tokens))

    def finish(self, hidden: Tensor) -> Tensor:
        """What follows the first linear layer: (B, S, 4 D) -> (B, S, D)."""
        return self.fc2(F.gelu(hidden, approximate="tanh"))
