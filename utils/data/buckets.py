"""Aspect-ratio buckets: which sizes a run trains on, and how an image is cut to one. Pure arithmetic on pixels.

An image is scaled until it just covers its bucket, then cropped along the side that is too long, in the centre or where
the caller says; the bucket is the one that loses the least of it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, order=True)
class Bucket:
    """Width and height in pixels, both multiples of the model's."""

    width: int
    height: int

    def __str__(self) -> str:
        return f"{self.width}x{self.height}"


@dataclass(frozen=True)
class CropBox:
    """Scale to (resized_width, resized_height), then cut the bucket out at (left, top); pixels."""

    scale: float
    """Above 1: the image is enlarged."""
    resized_width: int
    resized_height: int
    left: int
    top: int
    bucket: Bucket

    def key(self) -> str:
        """Identifies the geometry in the cache."""
        return f"{self.resized_width}x{self.resized_height}+{self.left}+{self.top}:{self.bucket}"


def bucket_of_ratio(resolution: int, ratio: float, multiple: int) -> Bucket:
    """The bucket of about resolution**2 pixels and width / height = ratio, with sides that are multiples of `multiple`."""
    width = resolution * math.sqrt(ratio)
    height = resolution / math.sqrt(ratio)
    return Bucket(*(max(multiple, round(side / multiple) * multiple) for side in (width, height)))


def make_buckets(resolution: int, min_ar: float, max_ar: float, num_ar_buckets: int, multiple: int) -> list[Bucket]:
    """Buckets with ratios evenly spaced in log(width / height), the square among them, without repeats, sorted."""
    ratios = [1.0]
    if num_ar_buckets > 1:
        step = (math.log(max_ar) - math.log(min_ar)) / (num_ar_buckets - 1)
        ratios += [math.exp(math.log(min_ar) + index * step) for index in range(num_ar_buckets)]
    return sorted({bucket_of_ratio(resolution, ratio, multiple) for ratio in ratios})


def nearest_buckets(sizes: np.ndarray, buckets: Sequence[Bucket]) -> np.ndarray:
    """Of images (n, 2), width and height in pixels, the places (n,) in the list of the buckets of nearest aspect ratio.

    Nearest in the logarithm; ties go to the smaller in order.
    """
    order = sorted(range(len(buckets)), key=lambda place: buckets[place])
    ratios = np.array([math.log(buckets[place].width / buckets[place].height) for place in order])
    wanted = np.log(sizes[:, 0] / sizes[:, 1])
    return np.array(order, dtype=np.int32)[np.abs(wanted[:, None] - ratios).argmin(axis=1)]


def crop_box(width: int, height: int, bucket: Bucket, place: float | None = None) -> CropBox:
    """How an image of width x height covers the bucket: scaled in proportion, then cropped.

    place: where along the side that is too long, in [0, 1); None: in the middle.
    """
    scale = max(bucket.width / width, bucket.height / height)
    resized_width = max(bucket.width, round(width * scale))
    resized_height = max(bucket.height, round(height * scale))
    spare = resized_width - bucket.width, resized_height - bucket.height
    left, top = (side // 2 if place is None else int(place * (side + 1)) for side in spare)
    return CropBox(scale, resized_width, resized_height, left, top, bucket)
