"""From float32 weights to bfloat16 weights and what is needed to get the float32 ones back.

Bits: a bfloat16 number is the upper half of a float32 number. All functions work element by element.
"""

from __future__ import annotations

import torch
from torch import Tensor

NUM_RANDOM = 2**16
_HALF = 2**15
_UPPER = -(2**16)
"""Mask of the upper half of an int32."""


def split(weights: Tensor) -> tuple[Tensor, Tensor]:
    """float32 -> (bfloat16, int16): the nearest bfloat16 weights, and the remainder from which `join` is exact.

    Halfway cases are rounded away from zero, unlike in torch, because only then does every remainder fit 16 bits.
    """
    bits = weights.view(torch.int32)
    upper = (bits + _HALF) & _UPPER
    return upper.view(torch.float32).to(torch.bfloat16), (bits - upper).to(torch.int16)


def join(rounded: Tensor, remainder: Tensor) -> Tensor:
    """The inverse of `split`, bit for bit: (bfloat16, int16) -> float32."""
    return (rounded.float().view(torch.int32) + remainder).view(torch.float32)


def round_at_random(weights: Tensor, drawn: Tensor) -> Tensor:
    """float32 -> bfloat16: one of the two neighbours, each with the probability that makes the mean exact.

    drawn: uniformly distributed int32 in 0 to NUM_RANDOM - 1, one for each weight.
    """
    return ((weights.view(torch.int32) + drawn) & _UPPER).view(torch.float32).to(torch.bfloat16)
