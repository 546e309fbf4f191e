"""An image file to the RGB pixels of its bucket, a mask to the weights of its latent pixels. Only here are they opened.

What is done to every image, in order: EXIF rotation, 16 bits to 8, transparency over white, conversion to RGB, scaling,
cropping. Of an animation, the first frame is used. Whatever cannot be read raises `BadFile` with the reason. What a file is,
its content says: a wrong suffix does no harm. Refused are also images of more than MAX_PIXELS, and those more than
MAX_SIDE_RATIO times as long as wide: no bucket is near their shape.

A mask goes the same way up to RGB, then to grey. It may have another size than its image: scaling stretches it over what
the image is scaled to. Scaling, cropping and shrinking to latent pixels are one step, the exact mean of the area that a
latent pixel covers. Pillow's filters are not used: LANCZOS overshoots at edges, and BOX counts whole pixels only, so that
edges move when the scale is no integer.

This file is read by processes that must start fast: it imports no torch, and pixels are NumPy arrays.
"""

from __future__ import annotations

import hashlib
import math
import os
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from io import BytesIO
from itertools import pairwise
from pathlib import Path
from typing import BinaryIO

import numpy as np
from PIL import Image, ImageOps

from utils.data.buckets import CropBox
from utils.data.sources.image_files import ImageFile

IMAGE_SUFFIXES = frozenset((".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".gif", ".avif"))
MAX_PIXELS = 178_000_000
"""Width times height of the largest image that is read: 13,000 x 13,000, half a gigabyte when decoded. Pillow itself warns
at half of it and refuses a little above; setting its own limit would change it for the whole process."""
MAX_SIDE_RATIO = 100
"""Longest side to shortest. Scaled to cover a square of 1024 pixels, such an image has 100 of them."""
_EXIF_ORIENTATION = 274
_SIDEWAYS = (5, 6, 7, 8)
_ROTATION_KEYS = ("exif", "XML:com.adobe.xmp", "Raw profile type exif")
_LATE_ROTATION = (b"eXIf", b"XML:com.adobe.xmp", b"Raw profile type exif")
_TAIL_BYTES = 128 * 2**10  # EXIF data is at most 64 KiB in the JPEG file it mostly comes from
PIXELS_VERSION = 1
"""Part of every cached image's key: raise it when `read_pixels` makes other pixels of the same file."""
MASK_VERSION = 1
"""The same of `read_mask`."""


CONTENT_BYTES = 16
"""Of the hash of a file's bytes."""


class BadFile(Exception):
    """A file of the user's that cannot be used, and why."""

    def __init__(self, path: Path, reason: str) -> None:
        super().__init__(path, reason)
        self.path = path
        self.reason = reason

    def __str__(self) -> str:
        return f"{self.path}: {self.reason}"


class _Refused(Exception):
    """An image that is not even decoded; its text is the reason."""


def bad_image(file: ImageFile, reason: str) -> BadFile:
    """The error that names an image which may lie inside another file."""
    return BadFile(Path(str(file)), reason)


def read_size(file: ImageFile) -> tuple[int, int]:
    """Width and height (pixels) as the image is to be looked at; reads the header, and decodes only if the file's end
    looks cut off. Raises BadFile."""
    with _named(file), file.open() as content, _opened(content) as image:
        width, height = image.size
        tail = _tail(content)
        if not _ends_as_it_should(tail, image.format) or any(mark in tail for mark in _LATE_ROTATION):
            image.load()
        # Asked for EXIF data, a PNG file decodes its pixels to look behind them; it was loaded above if there is any.
        rotated = image.format != "PNG" or any(key in image.info for key in _ROTATION_KEYS)
        exif = image.getexif() if rotated else {}
        sideways = exif.get(_EXIF_ORIENTATION) in _SIDEWAYS
    return (height, width) if sideways else (width, height)


def read_pixels(file: ImageFile, box: CropBox, *, flipped: bool = False, content: bytes = b"") -> np.ndarray:
    """The image scaled and cropped, then flipped along its width if asked to: uint8 (3, height, width) of the box's
    bucket. `content`: what its bytes must have as their hash. Raises BadFile, also when they have another."""
    image = _open_rgb(file, content)
    if image.size != (box.resized_width, box.resized_height):
        image = image.resize((box.resized_width, box.resized_height), Image.Resampling.LANCZOS)
    right, bottom = box.left + box.bucket.width, box.top + box.bucket.height
    pixels = np.asarray(image.crop((box.left, box.top, right, bottom)))  # (height, width, 3), not writable
    return np.array((pixels[:, ::-1] if flipped else pixels).transpose(2, 0, 1), order="C")


def read_thumbnail(file: ImageFile, max_side: int) -> tuple[Image.Image, tuple[int, int]]:
    """The whole image, RGB, no side longer than max_side; and its own width and height (pixels). Raises BadFile."""
    image = _open_rgb(file)
    size = image.size
    image.thumbnail((max_side, max_side))
    return image, size


def read_mask(file: ImageFile, box: CropBox, downscale: int, *, content: bytes = b"") -> np.ndarray:
    """How much each latent pixel counts: float32 (1, height / downscale, width / downscale) of the box's bucket, in [0, 1].

    It is the mean of grey value / 255 over the pixels of the image that it stands for. `content` is as in `read_pixels`.
    Raises BadFile, also for a mask of which nothing but black is left.
    """
    grey = np.asarray(_open_rgb(file, content).convert("L"))  # (height, width), uint8
    height, width = grey.shape
    rows = _edges(height, box.resized_height, range(box.top, box.top + box.bucket.height + 1, downscale))
    columns = _edges(width, box.resized_width, range(box.left, box.left + box.bucket.width + 1, downscale))
    means = _means_between(_means_between(grey, rows).T, columns).T
    if not means.any():
        where = f"inside the crop to {box.bucket}" if grey.any() else "everywhere"
        raise bad_image(file, f"is black {where}: nothing of the image would count")
    return np.array(means[None] / 255, dtype=np.float32, order="C")


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


def _open_rgb(file: ImageFile, content: bytes = b"") -> Image.Image:
    """The image as it is to be looked at. Raises BadFile."""
    with _named(file), _unchanged(file, content) as stream, _opened(stream) as image:
        return to_rgb(ImageOps.exif_transpose(image))


def _unchanged(file: ImageFile, content: bytes) -> BinaryIO:
    """The image's bytes, which must have this hash if there is one: what is cached under it must be made of them."""
    if not content:
        return file.open()
    data = file.read()
    if content_hash(data) != content:
        raise _Refused("has changed since the run began; start again")
    return BytesIO(data)


def content_hash(data: bytes) -> bytes:
    """What an image's bytes are called in the cache."""
    return hashlib.blake2b(data, digest_size=CONTENT_BYTES).digest()


@contextmanager
def _named(file: ImageFile) -> Iterator[None]:
    """Whatever fails inside is the image's fault: BadFile; but not that memory is short."""
    try:
        yield
    except MemoryError:
        raise
    except Exception as error:  # damaged files make Pillow's decoders raise whatever they like
        raise bad_image(file, _reason(error)) from error


def _reason(error: Exception) -> str:
    """Of an error while an image was opened or decoded, in one line."""
    text = " ".join(str(error).split()) or type(error).__name__
    if isinstance(error, _Refused):
        return text
    if isinstance(error, Image.DecompressionBombError):
        announced = re.search(r"\((\d+) pixels\)", text)
        return _too_large(int(announced[1]) if announced else None)
    if isinstance(error, OSError) and error.strerror:
        return f"cannot be read: {error.strerror}"
    if text.startswith("cannot identify"):
        return "is not an image Pillow can read"
    return "is cut off" if "truncated" in text.lower() else f"cannot be decoded: {text}"


@contextmanager
def _opened(content: BinaryIO) -> Iterator[Image.Image]:
    """The image, of which the header has been read, if it is one to decode. Raises _Refused, and what Pillow raises."""
    size_bytes = content.seek(0, os.SEEK_END)
    if not size_bytes:
        raise _Refused("is empty (0 bytes)")
    content.seek(0)
    start = content.read(12)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow's name no file; and the limit of pixels is ours
            with Image.open(content) as image:
                _check(image)
                yield image
    except Exception as error:
        if start[8:] == b"WEBP" and size_bytes < 8 + int.from_bytes(start[4:8], "little"):
            raise _Refused("is cut off") from error  # Pillow does not say so of this format
        raise


def _check(image: Image.Image) -> None:
    width, height = image.size
    if image.format == "EPS":
        raise _Refused("is PostScript: a program, and not run")
    if width * height > MAX_PIXELS:
        raise _Refused(_too_large(width * height))
    if max(width, height) > MAX_SIDE_RATIO * min(width, height):
        raise _Refused(f"is {width}x{height} pixels: no bucket is near its shape")


def _too_large(num_pixels: int | None) -> str:
    count = "too many" if num_pixels is None else f"{num_pixels:,}"
    return f"has {count} pixels; the limit is {MAX_PIXELS:,}"


def _tail(content: BinaryIO) -> bytes:
    """The last bytes: the end mark, and in a PNG file what was put behind the pixels. The place in the file is kept."""
    place = content.tell()
    content.seek(max(0, content.seek(0, os.SEEK_END) - _TAIL_BYTES))
    tail = content.read()
    content.seek(place)
    return tail


def _ends_as_it_should(tail: bytes, image_format: str | None) -> bool:
    """Whether a file ends with its format's end mark. False also where there is none to look for: decode to know."""
    marks = {"PNG": b"IEND\xaeB`\x82", "JPEG": b"\xff\xd9", "GIF": b";"}
    return image_format in marks and tail.endswith(marks[image_format])


def to_rgb(image: Image.Image) -> Image.Image:
    """Any image as 8-bit RGB; what is transparent becomes white. Raises ValueError for floating-point pixels."""
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
