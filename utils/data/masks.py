"""Masks: which file is whose, and their place in the cache. What a mask is, images.py says: `read_mask`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from models.base import EncodedItem, EncodeFunction, FrozenEncoder
from utils.data.images import IMAGE_SUFFIXES, MASK_VERSION, BadFile, read_size


class MaskEncoder(FrozenEncoder):
    """What `read_mask` returns, as it is: masks are kept and shared out among ranks as if a network had made them."""

    name = "mask"
    files = ()

    def __init__(self, downscale: int) -> None:
        self.settings = {"downscale": downscale, "version": MASK_VERSION}

    def load(self, device: torch.device) -> EncodeFunction:
        return _as_entries


def _as_entries(masks: Sequence[Tensor]) -> list[EncodedItem]:
    return [{"mask": mask} for mask in masks]


def masks_by_stem(files: Iterable[Path]) -> dict[str, list[Path]]:
    """The pictures among the files, by their names without suffix."""
    masks: dict[str, list[Path]] = {}
    for path in files:
        if path.suffix.lower() in IMAGE_SUFFIXES:
            masks.setdefault(path.stem, []).append(path)
    return masks


def mask_of(image: Path, size: tuple[int, int], masks: Mapping[str, Sequence[Path]]) -> Path:
    """The mask of a picture of that width and height (pixels), which it must have the shape of. Raises BadFile."""
    found = masks.get(image.stem, ())
    if not found:
        raise BadFile(image, "has no mask: none in mask_path has its name (a white picture is a mask of everything)")
    if len(found) > 1:
        raise BadFile(image, f"has several masks: {', '.join(str(path) for path in found)}; keep one")
    (mask,) = found
    mask_size = read_size(mask)
    if not same_shape(mask_size, size):
        sizes = [f"{width}x{height}" for width, height in (mask_size, size)]
        raise BadFile(mask, f"is {sizes[0]} pixels, its picture {image.name} {sizes[1]}: not the same shape")
    return mask


def same_shape(size: tuple[int, int], other: tuple[int, int]) -> bool:
    """Whether the smaller (width, height) is the larger one scaled in proportion, to within a pixel of the smaller."""
    (width, height), (larger_width, larger_height) = sorted((size, other))
    return abs(width / larger_width - height / larger_height) <= 1 / larger_width + 1 / larger_height
