"""Storage of text embeddings in bfloat16 or float8: text embeddings take most of a cache's disk space.

`bfloat16` keeps 8 bits of precision. `float8_e4m3fn` keeps 4, with a range of 2^-9 to 448; each token (row of a sequence) is
scaled so that its largest magnitude is 448, and the scale is stored in float32. The scale is per token because the tokens of
T5 differ by orders of magnitude, and one large value would quantise the rest of the sequence to the coarsest steps. Pooled
vectors are small and are stored in bfloat16.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor

TextCacheDtype = Literal["bfloat16", "float8_e4m3fn"]
_SCALE = "_scale"
_LARGEST = torch.finfo(torch.float8_e4m3fn).max


def pack(tensors: Mapping[str, Tensor], dtype: TextCacheDtype | None) -> dict[str, Tensor]:
    """Converts an encoder's tensors for storage; dtype None keeps them. Integer tensors are always kept."""
    packed: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        if dtype is None or not tensor.is_floating_point():
            packed[name] = tensor
        elif dtype == "float8_e4m3fn" and tensor.dim() > 1:
            packed[name], packed[name + _SCALE] = _to_float8(tensor)
        else:
            packed[name] = tensor.to(torch.bfloat16)
    return packed


def unpack(entry: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Inverts `pack` up to rounding; float8 becomes float32, bfloat16 stays."""
    return {
        name: tensor.float() * entry[name + _SCALE] if name + _SCALE in entry else tensor
        for name, tensor in entry.items()
        if not name.endswith(_SCALE)
    }


def _to_float8(sequence: Tensor) -> tuple[Tensor, Tensor]:
    """Converts (tokens, width) to float8 of the same shape and float32 scales (tokens, 1)."""
    values = sequence.float()
    largest = values.abs().amax(dim=-1, keepdim=True)
    scale = (largest / _LARGEST).clamp(min=torch.finfo(torch.float32).tiny)  # not zero, because values are divided by it
    return (values / scale).to(torch.float8_e4m3fn), scale


def packed_bytes(shapes: Mapping[str, tuple[int, ...]], dtype: TextCacheDtype | None, own: torch.dtype) -> int:
    """Returns the packed size of float tensors of these shapes whose dtype is `own`."""
    empty = {name: torch.empty(shape, dtype=own, device="meta") for name, shape in shapes.items()}
    return sum(tensor.nbytes for tensor in pack(empty, dtype).values())
