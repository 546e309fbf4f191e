"""A picture file to the RGB pixels of its bucket. The one place that opens picture files.

What is done to every picture, in order: EXIF rotation, 16 bits to 8, transparency over white, conversion to RGB, scaling,
cropping. Of an animation, the first frame is used. Whatever cannot be read raises `BadFile` with the reason.
"""

from __future__ import annotations

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


def read_pixels(path: Path, box: CropBox) -> Tensor:
    """The picture scaled and cropped: uint8 (3, height, width) of the box's bucket. Raises BadFile."""
    try:
        with Image.open(path) as image:
            picture = to_rgb(ImageOps.exif_transpose(image))
    except MemoryError:
        raise
    except Exception as error:
        raise BadFile(path, _reason(error)) from error
    if picture.size != (box.resized_width, box.resized_height):
        picture = picture.resize((box.resized_width, box.resized_height), Image.Resampling.LANCZOS)
    right, bottom = box.left + box.bucket.width, box.top + box.bucket.height
    picture = picture.crop((box.left, box.top, right, bottom))
    return torch.from_numpy(np.asarray(picture).copy()).permute(2, 0, 1).contiguous()


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
