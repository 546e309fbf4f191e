"""Decodes image files to the RGB pixels of their bucket, and masks to loss weights of latent pixels.

All images are opened here. The steps, in order: EXIF rotation, 16 bits to 8, transparency over white, conversion to RGB,
scaling, cropping. Animations are read as their first frame. A file that cannot be read raises `BadFile` with the reason. The
format is detected from the content, so a wrong suffix does not matter. Images with more than MAX_PIXELS, or with a side
ratio above MAX_SIDE_RATIO, are rejected; the latter fit no bucket.

A mask is converted to RGB in the same way, then to grey. Its size may differ from its image: it is stretched to the size to
which the image is scaled. Scaling, cropping and reduction to latent resolution are one step: the exact mean over the area of
a latent pixel. Pillow's filters are not used: LANCZOS overshoots at edges, and BOX counts whole pixels only, which shifts
edges if the scale is not an integer.

Reader processes, which must start quickly, import this module: it does not import torch, and pixels are NumPy arrays.
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
"""Largest width times height that is read: 13,000 x 13,000, half a gigabyte when decoded. Pillow itself warns at half of
this and fails slightly above it; changing Pillow's limit would affect the whole process."""
MAX_SIDE_RATIO = 100
"""Largest ratio of the longer to the shorter side. Scaled to cover a square bucket, such an image covers 100."""
_EXIF_ORIENTATION = 274
_SIDEWAYS = (5, 6, 7, 8)  # EXIF orientations that swap width and height
_ROTATION_KEYS = ("exif", "XML:com.adobe.xmp", "Raw profile type exif")
_LATE_ROTATION = (b"eXIf", b"XML:com.adobe.xmp", b"Raw profile type exif")  # chunks that a PNG may have after its pixels
_TAIL_BYTES = 128 * 2**10  # EXIF data is at most 64 KiB in the JPEG file it mostly comes from
PIXELS_VERSION = 1
"""Part of every cached image's key: increase it whenever `read_pixels` returns different pixels for the same file."""
MASK_VERSION = 1
"""The same for `read_mask`."""
HASH_BYTES = 16
"""Size of the hash of a file's bytes."""


class BadFile(Exception):
    """A file of the dataset that cannot be used, with the reason."""

    def __init__(self, path: Path, reason: str) -> None:
        super().__init__(path, reason)
        self.path = path
        self.reason = reason

    def __str__(self) -> str:
        return f"{self.path}: {self.reason}"


class _Rejected(Exception):
    """An image that is rejected without being decoded; the text is the reason."""


def bad_image(file: ImageFile, reason: str) -> BadFile:
    """Returns the error for an image that may be inside an archive."""
    return BadFile(Path(str(file)), reason)


def read_size(file: ImageFile) -> tuple[int, int]:
    """Returns width and height in pixels, after EXIF rotation. Reads only the header, unless the end of the file looks
    truncated: then decodes the image. Raises BadFile."""
    with _bad_file_on_error(file), file.open() as stream, _opened_image(stream) as image:
        width, height = image.size
        tail = _tail(stream)
        if not _has_end_marker(tail, image.format) or any(key in tail for key in _LATE_ROTATION):
            image.load()
        # getexif of a PNG file decodes all pixels to find data after them; the image was loaded above if there is any.
        rotated = image.format != "PNG" or any(key in image.info for key in _ROTATION_KEYS)
        exif = image.getexif() if rotated else {}
        sideways = exif.get(_EXIF_ORIENTATION) in _SIDEWAYS
    return (height, width) if sideways else (width, height)


def read_pixels(file: ImageFile, box: CropBox, *, flipped: bool = False, expected_hash: bytes = b"") -> np.ndarray:
    """Reads an image, scales, crops and, if `flipped`, flips it horizontally; returns uint8 (3, height, width) of the box's
    bucket. expected_hash: of the file's bytes, not checked if empty. Raises BadFile, also if the hash differs."""
    image = _read_rgb(file, expected_hash)
    if image.size != (box.resized_width, box.resized_height):
        image = image.resize((box.resized_width, box.resized_height), Image.Resampling.LANCZOS)
    right, bottom = box.left + box.bucket.width, box.top + box.bucket.height
    pixels = np.asarray(image.crop((box.left, box.top, right, bottom)))  # (height, width, 3), not writable
    return np.array((pixels[:, ::-1] if flipped else pixels).transpose(2, 0, 1), order="C")


def read_thumbnail(file: ImageFile, max_side: int) -> tuple[Image.Image, tuple[int, int]]:
    """Returns the RGB image reduced to at most max_side pixels a side, and its original width and height. Raises BadFile."""
    image = _read_rgb(file)
    size = image.size
    image.thumbnail((max_side, max_side))
    return image, size


def read_mask(file: ImageFile, box: CropBox, downscale: int, *, expected_hash: bytes = b"") -> np.ndarray:
    """Reads a mask as loss weights of latent pixels: float32 (1, height / downscale, width / downscale), in [0, 1].

    A weight is the mean of grey value / 255 over the image pixels that the latent pixel covers. `expected_hash` is as
    in `read_pixels`. Raises BadFile, also for a mask that is completely black after cropping.
    """
    grey = np.asarray(_read_rgb(file, expected_hash).convert("L"))  # (height, width), uint8
    height, width = grey.shape
    rows = _edges(height, box.resized_height, range(box.top, box.top + box.bucket.height + 1, downscale))
    columns = _edges(width, box.resized_width, range(box.left, box.left + box.bucket.width + 1, downscale))
    means = _means_between(_means_between(grey, rows).T, columns).T
    if not means.any():
        where = f"inside the crop to {box.bucket}" if grey.any() else "everywhere"
        raise bad_image(file, f"is black {where}: no pixel of the image would be trained on")
    return np.array(means[None] / 255, dtype=np.float32, order="C")


def _edges(side: int, resized_side: int, positions: range) -> list[float]:
    """Converts positions on the scaled side to pixels of the file; exact at pixel boundaries."""
    return [position * side / resized_side for position in positions]


def _means_between(values: np.ndarray, edges: list[float]) -> np.ndarray:
    """Averages the rows between consecutive edges, weighting partial rows: (rows, n) to float64 (edges - 1, n)."""
    means = []
    for start, stop in pairwise(edges):
        rows = np.arange(math.floor(start), min(math.ceil(stop), len(values)))
        weights = np.minimum(rows + 1, stop) - np.maximum(rows, start)
        means.append(weights @ values[rows[0] : rows[-1] + 1] / (stop - start))
    return np.stack(means)


def _read_rgb(file: ImageFile, expected_hash: bytes = b"") -> Image.Image:
    """Reads an image as RGB, after EXIF rotation. Raises BadFile."""
    with _bad_file_on_error(file), _open_verified(file, expected_hash) as stream, _opened_image(stream) as image:
        return to_rgb(ImageOps.exif_transpose(image))


def _open_verified(file: ImageFile, expected_hash: bytes) -> BinaryIO:
    """Opens the image's bytes and checks their hash, unless `expected_hash` is empty: results are cached under that hash."""
    if not expected_hash:
        return file.open()
    data = file.read()
    if content_hash(data) != expected_hash:
        raise _Rejected("has changed since the run started; start the run again")
    return BytesIO(data)


def content_hash(data: bytes) -> bytes:
    """Returns the hash by which the cache identifies an image's bytes: blake2b, 16 bytes."""
    return hashlib.blake2b(data, digest_size=HASH_BYTES).digest()


@contextmanager
def _bad_file_on_error(file: ImageFile) -> Iterator[None]:
    """Converts any exception except MemoryError to a BadFile of the image."""
    try:
        yield
    except MemoryError:
        raise
    except Exception as error:  # damaged files make Pillow's decoders raise arbitrary exceptions
        raise bad_image(file, _reason(error)) from error


def _reason(error: Exception) -> str:
    """Describes an error from opening or decoding an image, in one line."""
    text = " ".join(str(error).split()) or type(error).__name__
    if isinstance(error, _Rejected):
        return text
    if isinstance(error, Image.DecompressionBombError):
        declared = re.search(r"\((\d+) pixels\)", text)
        return _too_large(int(declared[1]) if declared else None)
    if isinstance(error, OSError) and error.strerror:
        return f"cannot be read: {error.strerror}"
    if text.startswith("cannot identify"):
        return "is not an image Pillow can read"
    return "is truncated" if "truncated" in text.lower() else f"cannot be decoded: {text}"


@contextmanager
def _opened_image(stream: BinaryIO) -> Iterator[Image.Image]:
    """Opens an image, reads its header and checks its size and format. Raises _Rejected and the exceptions of Pillow."""
    size_bytes = stream.seek(0, os.SEEK_END)
    if not size_bytes:
        raise _Rejected("is empty (0 bytes)")
    stream.seek(0)
    start = stream.read(12)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow's warnings name no file, and the pixel limit is checked below
            with Image.open(stream) as image:
                _check(image)
                yield image
    except Exception as error:
        if start[8:] == b"WEBP" and size_bytes < 8 + int.from_bytes(start[4:8], "little"):
            raise _Rejected("is truncated") from error  # Pillow does not report this for WebP
        raise


def _check(image: Image.Image) -> None:
    width, height = image.size
    if image.format == "EPS":
        raise _Rejected("is PostScript, a program, which is not executed")
    if width * height > MAX_PIXELS:
        raise _Rejected(_too_large(width * height))
    if max(width, height) > MAX_SIDE_RATIO * min(width, height):
        raise _Rejected(f"is {width}x{height} pixels: no bucket has a similar aspect ratio")


def _too_large(num_pixels: int | None) -> str:
    count = "too many" if num_pixels is None else f"{num_pixels:,}"
    return f"has {count} pixels; the limit is {MAX_PIXELS:,}"


def _tail(stream: BinaryIO) -> bytes:
    """Reads the end of a file: the end marker and, for PNG, chunks after the pixels. Restores the file position."""
    position = stream.tell()
    stream.seek(max(0, stream.seek(0, os.SEEK_END) - _TAIL_BYTES))
    tail = stream.read()
    stream.seek(position)
    return tail


def _has_end_marker(tail: bytes, image_format: str | None) -> bool:
    """Returns whether a file ends with its format's end marker; False for formats without one, which must be decoded."""
    markers = {"PNG": b"IEND\xaeB`\x82", "JPEG": b"\xff\xd9", "GIF": b";"}
    return image_format in markers and tail.endswith(markers[image_format])


def to_rgb(image: Image.Image) -> Image.Image:
    """Converts an image to 8-bit RGB over a white background. Raises ValueError for floating-point pixels."""
    if image.mode == "F":
        raise ValueError("floating-point pixels have no defined value range")
    if image.mode.startswith("I"):
        return Image.fromarray(_eight_bits(np.asarray(image))).convert("RGB")
    if image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
        layer = image.convert("RGBA")
        white = Image.new("RGBA", layer.size, (255, 255, 255, 255))
        return Image.alpha_composite(white, layer).convert("RGB")
    return image.convert("RGB")


def _eight_bits(pixels: np.ndarray) -> np.ndarray:
    """Converts 16-bit grey values (which Pillow may store in 32 bits) to 8 bits, rounded."""
    if pixels.max(initial=0) <= 255 and pixels.dtype.itemsize > 2:
        return pixels.astype(np.uint8)
    return np.clip(np.round(pixels.astype(np.float64) / 257), 0, 255).astype(np.uint8)
