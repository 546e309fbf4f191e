"""Masks in the cache: kept, and shared out among ranks, as if a network had made them. What a mask is, images.py says."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from models.family import EncodedItem, EncodeFunction, FrozenEncoder
from utils.data.sources.decoding import MASK_VERSION


class MaskEncoder(FrozenEncoder):
    """What `read_mask` returns, as it is."""

    name = "mask"
    files = ()

    def __init__(self, downscale: int) -> None:
        self.settings = {"downscale": downscale, "version": MASK_VERSION}

    def load(self, device: torch.device) -> EncodeFunction:
        return _as_entries


def _as_entries(masks: Sequence[Tensor]) -> list[EncodedItem]:
    return [{"mask": mask} for mask in masks]
