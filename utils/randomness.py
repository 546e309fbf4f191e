"""All random numbers of a run, as pure functions of the seed, their purpose and a key.

Each draw has its own generator, seeded by a hash of (seed, purpose, key). The key names the example and the draw; it never
contains a rank, a worker or a number of draws so far. Any number of processes therefore draws the same samples, the first
and the last stage of a pipeline draw the same noise without communication, and resuming requires no saved generator. No
other module draws random numbers that influence the result.

Numbers are drawn on the CPU, so that they are the same for every device, except by `device_integers`.
"""

from __future__ import annotations

import hashlib
import math

import numpy as np
import torch
from torch import Tensor


def _number(seed: int, purpose: str, *key: str | int) -> int:
    """Returns 64 bits of the hash of (seed, purpose, key)."""
    return int.from_bytes(hashlib.blake2b(repr((seed, purpose, *key)).encode(), digest_size=8).digest(), "little")


def _generator(seed: int, purpose: str, *key: str | int) -> torch.Generator:
    return torch.Generator().manual_seed(_number(seed, purpose, *key) & (2**63 - 1))


def device_integers(seed: int, purpose: str, *key: str | int, high: int, like: Tensor) -> Tensor:
    """Returns integers in 0 to high - 1, int32, in the shape and on the device of a tensor. Kinds of devices draw others."""
    generator = torch.Generator(like.device).manual_seed(_number(seed, purpose, *key) & (2**63 - 1))
    return torch.empty_like(like, dtype=torch.int32).random_(0, high, generator=generator)


def fraction(seed: int, purpose: str, *key: str | int) -> float:
    """Returns a number in [0, 1), a multiple of 2**-53. It is the hash itself and four times as fast as `uniform`."""
    return (_number(seed, purpose, *key) >> 11) / 2**53


def normal(seed: int, purpose: str, *key: str | int, shape: tuple[int, ...]) -> Tensor:
    """Returns standard normal numbers, float32."""
    return torch.randn(shape, generator=_generator(seed, purpose, *key))


def uniform(seed: int, purpose: str, *key: str | int) -> float:
    """Returns a number in (0, 1), a multiple of 2**-53; never 0 or 1."""
    integer = int(torch.randint(2**53 - 1, (1,), generator=_generator(seed, purpose, *key)))
    return (integer + 1) / 2**53


def integers(seed: int, purpose: str, *key: str | int, high: int, shape: tuple[int, ...]) -> Tensor:
    """Returns independent, uniformly distributed integers in 0 to high - 1; int64."""
    return torch.randint(high, shape, generator=_generator(seed, purpose, *key))


def permutation(seed: int, purpose: str, *key: str | int, length: int) -> np.ndarray:
    """Returns the numbers 0 to length - 1 in random order; int64."""
    return torch.randperm(length, generator=_generator(seed, purpose, *key)).numpy()


def kaiming_uniform(seed: int, purpose: str, *key: str | int, shape: tuple[int, ...]) -> Tensor:
    """Returns initial weights (out, in, ...) like torch.nn.Linear and Conv2d: uniform in +-1/sqrt(fan-in), float32."""
    bound = 1 / math.sqrt(math.prod(shape[1:]))
    return (torch.rand(shape, generator=_generator(seed, purpose, *key)) * 2 - 1) * bound
