"""Images for tests, made of coloured quarters, so that any rotation, flip or crop is visible."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from utils.data.buckets import Bucket, CropBox, crop_box
from utils.data.sources import decoding
from utils.data.sources.image_files import ImageFile

RED, GREEN, BLUE, WHITE = (255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255)
QUARTERS = (RED, GREEN, BLUE, WHITE)
"""Top left, top right, bottom left, bottom right."""
TURNS: dict[int, Image.Transpose | None] = {
    1: None,
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_90,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_270,
}
"""EXIF orientation -> transformation by which a camera stores the image (the inverse of what a viewer applies)."""


def quarters(width: int = 48, height: int = 32) -> Image.Image:
    pixels = np.zeros((height, width, 3), dtype=np.uint8)
    half_height, half_width = height // 2, width // 2
    pixels[:half_height, :half_width], pixels[:half_height, half_width:] = RED, GREEN
    pixels[half_height:, :half_width], pixels[half_height:, half_width:] = BLUE, WHITE
    return Image.fromarray(pixels)


def noise(width: int = 200, height: int = 150) -> Image.Image:
    """Random pixels: the file is large in every format, and damage anywhere in it is detected."""
    return Image.fromarray(np.random.default_rng(0).integers(256, size=(height, width, 3), dtype=np.uint8))


def left_half(width: int = 48, height: int = 32) -> Image.Image:
    """A mask whose left half is white and whose right half is black."""
    pixels = np.zeros((height, width), dtype=np.uint8)
    pixels[:, : width // 2] = 255
    return Image.fromarray(pixels)


def save(image: Image.Image, path: Path, **options: Any) -> Path:
    image.save(path, **options)
    return path


def save_turned(image: Image.Image, path: Path, orientation: int, **options: Any) -> Path:
    """Saves the image as a camera held in this orientation does; viewers show it upright."""
    turn, exif = TURNS[orientation], Image.Exif()
    exif[274] = orientation
    return save(image if turn is None else image.transpose(turn), path, exif=exif, **options)


def read_size(path: Path) -> tuple[int, int]:
    """Reads the size of an image file."""
    return decoding.read_size(ImageFile(path))


def read_pixels(path: Path, box: CropBox, *, flipped: bool = False) -> Tensor:
    """Reads the pixels of an image file as a tensor."""
    return torch.from_numpy(decoding.read_pixels(ImageFile(path), box, flipped=flipped))


def read_mask(path: Path, box: CropBox, downscale: int) -> Tensor:
    """Reads the weights of a mask file as a tensor."""
    return torch.from_numpy(decoding.read_mask(ImageFile(path), box, downscale))


def uncropped(width: int, height: int) -> CropBox:
    """Returns the crop box that neither scales nor crops."""
    return crop_box(width, height, Bucket(width, height))


def corners(pixels: Tensor) -> list[tuple[int, ...]]:
    """Returns the colours at the centers of the four quarters, in the order of QUARTERS; pixels: (3, H, W)."""
    _, height, width = pixels.shape
    rows, columns = (height // 4, height - height // 4 - 1), (width // 4, width - width // 4 - 1)
    return [tuple(pixels[:, row, column].tolist()) for row in rows for column in columns]
