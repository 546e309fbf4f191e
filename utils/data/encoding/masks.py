"""Masks in the cache: an encoder without a network, so that masks are cached and distributed over ranks like latents.

utils/data/sources/decoding.py defines how a mask is computed from its image.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from models.family import EncodedItem, EncodeFunction, FrozenEncoder
from utils.data.sources.decoding import MASK_VERSION


class MaskEncoder(FrozenEncoder):
    """Stores the result of `read_mask` unchanged."""

    name = "mask"
    files = ()

    def __init__(self, downscale: int) -> None:
        self.settings = {"downscale": downscale, "version": MASK_VERSION}

    def load(self, device: torch.device) -> EncodeFunction:
        return _as_entries


def _as_entries(masks: Sequence[Tensor]) -> list[EncodedItem]:
    return [{"mask": mask} for mask in masks]
