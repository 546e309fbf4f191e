"""A picture file to the RGB pixels of its bucket, a mask to the weights of its latent pixels. Only here are they opened.

What is done to every picture, in order: EXIF rotation, 16 bits to 8, transparency over white, conversion to RGB, scaling,
cropping. Of an animation, the first frame is used. Whatever cannot be read raises `BadFile` with the reason.

A mask goes the same way up to RGB, then to grey. It may have another size than its picture: scaling stretches it over what
the picture is scaled to. Scaling, cropping and shrinking to latent pixels are one step, the exact mean of the area that a
latent pixel covers. Pillow's filters are not used: LANCZOS overshoots at edges, and BOX counts whole pixels only, so that
edges move when the scale is no integer.
"""

from __future__ import annotations

import math
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from utils.data.buckets import CropBox

IMAGE_SUFFIXES = frozenset((".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".gif", ".avif"))
_EXIF_ORIENTATION = 274
_SIDEWAYS = (5, 6, 7, 8)
_ROTATION_KEYS = ("exif", "XML:com.adobe.xmp", "Raw profile type exif")
_LATE_ROTATION = (b"eXIf", b"XML:com.adobe.xmp", b"Raw profile type exif")
_TAIL_BYTES = 128 * 2**10  # EXIF data is at most 64 KiB in the JPEG file it mostly comes from
PIXELS_VERSION = 1
"""Part of every cached picture's key: raise it when `read_pixels` makes other pixels of the same file."""
MASK_VERSION = 1
"""The same of `read_mask`."""


class BadFile(Exception):
    """A file of the user's that cannot be used, and why."""

    def __init__(self, path: Path, reason: str) -> None:
        super().__init__(path, reason)
        self.path = path
        self.reason = reason

    def __str__(self) -> str:
        return f"{self.path}: {self.reason}"


def read_size(path: Path) -> tuple[int, int]:
    """Width and height (pixels) as the picture is to be looked at; reads the header, and decodes only if the file's end
    looks cut off. Raises BadFile."""
    try:
        with Image.open(path) as image:
            width, height = image.size
            tail = _tail(path)
            if not _ends_as_it_should(tail, image.format) or any(mark in tail for mark in _LATE_ROTATION):
                image.load()
            # Asked for EXIF data, a PNG file decodes its pixels to look behind them; it was loaded above if there is any.
            rotated = image.format != "PNG" or any(key in image.info for key in _ROTATION_KEYS)
            exif = image.getexif() if rotated else {}
            sideways = exif.get(_EXIF_ORIENTATION) in _SIDEWAYS
    except MemoryError:
        raise
    except Exception as error:  # damaged files make Pillow's decoders raise whatever they like
        raise BadFile(path, _reason(error)) from error
    return (height, width) if sideways else (width, height)


def _reason(error: Exception) -> str:
    text = str(error)
    return "is not a picture Pillow can read" if text.startswith("cannot identify") else f"cannot be decoded: {text}"


def _tail(path: Path) -> bytes:
    """The file's last bytes: its end mark, and in a PNG file what was put behind the pixels."""
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - _TAIL_BYTES))
        return file.read()


def _ends_as_it_should(tail: bytes, image_format: str | None) -> bool:
    """Whether a file ends with its format's end mark. False also where there is none to look for: decode to know."""
    marks = {"PNG": b"IEND\xaeB`\x82", "JPEG": b"\xff\xd9", "GIF": b";"}
    return image_format in marks and tail.endswith(marks[image_format])


def read_pixels(path: Path, box: CropBox, *, mirrored: bool = False) -> Tensor:
    """The picture scaled and cropped, then mirrored along its width if asked to: uint8 (3, height, width) of the box's
    bucket. Raises BadFile."""
    picture = _open_rgb(path)
    if picture.size != (box.resized_width, box.resized_height):
        picture = picture.resize((box.resized_width, box.resized_height), Image.Resampling.LANCZOS)
    right, bottom = box.left + box.bucket.width, box.top + box.bucket.height
    picture = picture.crop((box.left, box.top, right, bottom))
    pixels = torch.from_numpy(np.asarray(picture).copy()).permute(2, 0, 1)
    return (pixels.flip(-1) if mirrored else pixels).contiguous()


def read_mask(path: Path, box: CropBox, downscale: int) -> Tensor:
    """How much each latent pixel counts: float32 (1, height / downscale, width / downscale) of the box's bucket, in [0, 1].

    It is the mean of grey value / 255 over the pixels of the picture that it stands for. Raises BadFile, also for a mask of
    which nothing but black is left.
    """
    grey = np.asarray(_open_rgb(path).convert("L"))  # (height, width), uint8
    height, width = grey.shape
    rows = _edges(height, box.resized_height, range(box.top, box.top + box.bucket.height + 1, downscale))
    columns = _edges(width, box.resized_width, range(box.left, box.left + box.bucket.width + 1, downscale))
    means = _means_between(_means_between(grey, rows).T, columns).T
    if not means.any():
        where = f"inside the crop to {box.bucket}" if grey.any() else "everywhere"
        raise BadFile(path, f"is black {where}: nothing of the picture would count")
    return torch.from_numpy(means / 255).float().contiguous()[None]


def _edges(side: int, resized_side: int, places: range) -> list[float]:
    """Places on a side that was scaled, in pixels of the file; exact where they are between two pixels."""
    return [place * side / resized_side for place in places]


def _means_between(values: np.ndarray, edges: list[float]) -> np.ndarray:
    """Means of the rows between two edges each, a cut row counting by its share: (rows, n) to float64 (edges - 1, n)."""
    means = []
    for start, stop in pairwise(edges):
        rows = np.arange(math.floor(start), min(math.ceil(stop), len(values)))
        shares = np.minimum(rows + 1, stop) - np.maximum(rows, start)
        means.append(shares @ values[rows[0] : rows[-1] + 1] / (stop - start))
    return np.stack(means)


def _open_rgb(path: Path) -> Image.Image:
    """The picture as it is to be looked at. Raises BadFile."""
    try:
        with Image.open(path) as image:
            return to_rgb(ImageOps.exif_transpose(image))
    except MemoryError:
        raise
    except Exception as error:
        raise BadFile(path, _reason(error)) from error


def to_rgb(image: Image.Image) -> Image.Image:
    """Any picture as 8-bit RGB; what is transparent becomes white. Raises ValueError for floating-point pixels."""
    if image.mode == "F":
        raise ValueError("pixels are floating-point numbers, whose range nobody states")
    if image.mode.startswith("I"):
        return Image.fromarray(_eight_bits(np.asarray(image))).convert("RGB")
    if image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
        layer = image.convert("RGBA")
        white = Image.new("RGBA", layer.size, (255, 255, 255, 255))
        return Image.alpha_composite(white, layer).convert("RGB")
    return image.convert("RGB")


def _eight_bits(pixels: np.ndarray) -> np.ndarray:
    """16-bit grey values (also where Pillow widened them to 32) to 8 bits, rounded."""
    if pixels.max(initial=0) <= 255 and pixels.dtype.itemsize > 2:
        return pixels.astype(np.uint8)
    return np.clip(np.round(pixels.astype(np.float64) / 257), 0, 255).astype(np.uint8)
