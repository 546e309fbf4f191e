"""Aspect-ratio buckets: the image sizes of a run, and the crop of an image to its bucket. Pure arithmetic on pixels.

An image belongs to the bucket with the nearest aspect ratio, which crops the least of it. It is scaled to cover the bucket
and cropped along the longer side, in the centre or at a given position.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, order=True)
class Bucket:
    """Width and height in pixels, both multiples of `LatentSpec.pixel_multiple`."""

    width: int
    height: int

    def __str__(self) -> str:
        return f"{self.width}x{self.height}"


@dataclass(frozen=True)
class CropBox:
    """Resize to (resized_width, resized_height), then crop the bucket at (left, top); in pixels."""

    scale: float
    """Above 1, the image is enlarged."""
    resized_width: int
    resized_height: int
    left: int
    top: int
    bucket: Bucket

    def key(self) -> str:
        """Returns the geometry as a string, which is part of cache keys."""
        return f"{self.resized_width}x{self.resized_height}+{self.left}+{self.top}:{self.bucket}"


def bucket_of_ratio(resolution: int, ratio: float, multiple: int) -> Bucket:
    """Returns a bucket of about resolution**2 pixels and width / height = ratio; its sides are multiples of `multiple`."""
    width = resolution * math.sqrt(ratio)
    height = resolution / math.sqrt(ratio)
    return Bucket(*(max(multiple, round(side / multiple) * multiple) for side in (width, height)))


def make_buckets(resolution: int, min_ar: float, max_ar: float, num_ar_buckets: int, multiple: int) -> list[Bucket]:
    """Returns distinct buckets, sorted: a square, and aspect ratios evenly spaced in log(width / height)."""
    ratios = [1.0]
    if num_ar_buckets > 1:
        step = (math.log(max_ar) - math.log(min_ar)) / (num_ar_buckets - 1)
        ratios += [math.exp(math.log(min_ar) + index * step) for index in range(num_ar_buckets)]
    return sorted({bucket_of_ratio(resolution, ratio, multiple) for ratio in ratios})


def nearest_buckets(sizes: np.ndarray, buckets: Sequence[Bucket]) -> np.ndarray:
    """Returns the index of each image's bucket, the one nearest in log aspect ratio: (n, 2) width and height -> (n,) int32.

    Of two equally near buckets, it returns the smaller.
    """
    order = sorted(range(len(buckets)), key=lambda index: buckets[index])
    bucket_ratios = np.array([math.log(buckets[index].width / buckets[index].height) for index in order])
    ratios = np.log(sizes[:, 0] / sizes[:, 1])
    return np.array(order, dtype=np.int32)[np.abs(ratios[:, None] - bucket_ratios).argmin(axis=1)]


def crop_box(width: int, height: int, bucket: Bucket, place: float | None = None) -> CropBox:
    """Returns the crop of an image of width x height to the bucket; resizing keeps the aspect ratio.

    place: position of the crop along the longer side, in [0, 1); None for the centre.
    """
    scale = max(bucket.width / width, bucket.height / height)
    resized_width = max(bucket.width, round(width * scale))
    resized_height = max(bucket.height, round(height * scale))
    margins = resized_width - bucket.width, resized_height - bucket.height
    left, top = (side // 2 if place is None else int(place * (side + 1)) for side in margins)
    return CropBox(scale, resized_width, resized_height, left, top, bucket)
