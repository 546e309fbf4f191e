"""Every random draw of a run, as a function of what the draw is for.

No generator lives through a run. Each draw gets a fresh one, seeded by a hash of (seed, purpose, key); the key names the
example and the draw, never a rank, a worker or a count of draws so far. So any number of processes draws the same
samples, the two ends of a pipeline draw the same noise without talking, and resuming needs no saved state. Nothing else
in this program draws random numbers that reach the result.

Draws happen on the CPU: the same numbers on every device.
"""

from __future__ import annotations

import hashlib
import math

import numpy as np
import torch
from torch import Tensor


def _number(seed: int, purpose: str, *key: str | int) -> int:
    """64 bits."""
    return int.from_bytes(hashlib.blake2b(repr((seed, purpose, *key)).encode(), digest_size=8).digest(), "little")


def _generator(seed: int, purpose: str, *key: str | int) -> torch.Generator:
    return torch.Generator().manual_seed(_number(seed, purpose, *key) & (2**63 - 1))


def fraction(seed: int, purpose: str, *key: str | int) -> float:
    """One number in [0, 1), the hash itself on a grid of 2**-53: four times as fast as `uniform`, for millions of draws."""
    return (_number(seed, purpose, *key) >> 11) / 2**53


def normal(seed: int, purpose: str, *key: str | int, shape: tuple[int, ...]) -> Tensor:
    """Standard normal numbers, float32."""
    return torch.randn(shape, generator=_generator(seed, purpose, *key))


def uniform(seed: int, purpose: str, *key: str | int) -> float:
    """One number in (0, 1), both ends excluded, on a grid of 2**-53."""
    integer = int(torch.randint(2**53 - 1, (1,), generator=_generator(seed, purpose, *key)))
    return (integer + 1) / 2**53


def integers(seed: int, purpose: str, *key: str | int, high: int, shape: tuple[int, ...]) -> Tensor:
    """Numbers 0 to high - 1, each as likely and drawn with replacement; int64."""
    return torch.randint(high, shape, generator=_generator(seed, purpose, *key))


def permutation(seed: int, purpose: str, *key: str | int, length: int) -> np.ndarray:
    """The numbers 0 to length - 1 in random order; int64."""
    return torch.randperm(length, generator=_generator(seed, purpose, *key)).numpy()


def kaiming_uniform(seed: int, purpose: str, *key: str | int, shape: tuple[int, ...]) -> Tensor:
    """torch.nn.Linear's and Conv2d's default weights (out, in, ...): uniform in +-1/sqrt(fan-in), float32."""
    bound = 1 / math.sqrt(math.prod(shape[1:]))
    return (torch.rand(shape, generator=_generator(seed, purpose, *key)) * 2 - 1) * bound
