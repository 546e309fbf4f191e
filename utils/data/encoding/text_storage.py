"""Text embeddings in fewer bytes: the most of a cache's room is theirs.

`bfloat16` rounds each number to 8 bits of precision. `float8_e4m3fn` has 4, and a range of 2^-9 to 448; each token, a row of
a sequence, is scaled so that its largest number is 448, and the scale is kept in float32. A scale for each token, because
T5's tokens differ in size by orders of magnitude, and one large number would push all others of a sequence into the
coarsest steps. Pooled vectors are small and are not put into float8.
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
    """An encoder's tensors as they are cached; None: as they are. Whole numbers stay as they are."""
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
    """What was packed, as near as it was kept; float8 becomes float32."""
    return {
        name: tensor.float() * entry[name + _SCALE] if name + _SCALE in entry else tensor
        for name, tensor in entry.items()
        if not name.endswith(_SCALE)
    }


def _to_float8(sequence: Tensor) -> tuple[Tensor, Tensor]:
    """(tokens, width) to float8 of that shape and float32 scales (tokens, 1)."""
    values = sequence.float()
    largest = values.abs().amax(dim=-1, keepdim=True)
    scale = (largest / _LARGEST).clamp(min=torch.finfo(torch.float32).tiny)  # never zero, by which nothing can be divided
    return (values / scale).to(torch.float8_e4m3fn), scale


def packed_bytes(shapes: Mapping[str, tuple[int, ...]], dtype: TextCacheDtype | None, own: torch.dtype) -> int:
    """Bytes that float tensors of these shapes and of dtype `own` take once packed."""
    empty = {name: torch.empty(shape, dtype=own, device="meta") for name, shape in shapes.items()}
    return sum(tensor.nbytes for tensor in pack(empty, dtype).values())
