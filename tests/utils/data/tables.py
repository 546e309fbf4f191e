"""Builds tables of examples from arguments, without files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from utils.data.buckets import Bucket
from utils.data.examples import ExampleTable
from utils.data.image_table import Directory, ImageTable, concatenate_images
from utils.data.sources.decoding import HASH_BYTES
from utils.data.sources.image_rows import NO_ROW, PairedImages, group_offsets
from utils.files.columns import Texts

DIRECTORY = Directory(
    key_prefix="0",
    path="images",
    resolutions=(32,),
    repeats=1,
    loss_weight=1.0,
    may_flip=False,
    random_crop=False,
    skip_bad=False,
    shuffle=None,
)
"""A directory with default settings; tests replace the fields they test."""


@dataclass(frozen=True)
class ImageSpec:
    """An image with all properties of its examples."""

    name: str = "fox.png"
    captions: tuple[str, ...] = ("a fox",)
    bucket: Bucket = Bucket(32, 32)
    """The bucket at every resolution of its directory."""
    size: tuple[int, int] = (40, 40)
    mask: str | None = None
    """Path of the file."""
    control: str | None = None
    directory: Directory = DIRECTORY


def table_of(images: Sequence[ImageSpec]) -> ExampleTable:
    """Returns the table of the examples of these images, in order. No hash is known."""
    directories = list(dict.fromkeys(image.directory for image in images))
    buckets = list(dict.fromkeys(image.bucket for image in images))
    rows = [
        (number, resolution, buckets.index(image.bucket))
        for number, image in enumerate(images)
        for resolution in range(len(image.directory.resolutions))
    ]
    masks, mask_rows = _paired_images([image.mask for image in images])
    controls, control_rows = _paired_images([image.control for image in images])
    columns = ImageTable(
        directory=np.array([directories.index(image.directory) for image in images], np.int32),
        names=Texts.of(image.name for image in images),
        sizes=np.array([image.size for image in images], np.int32).reshape(-1, 2),
        file_ids=np.arange(len(images), dtype=np.int64),
        hashes=np.zeros((len(images), HASH_BYTES), np.uint8),
        captions=Texts.of(caption for image in images for caption in image.captions),
        first_caption=group_offsets(np.array([len(image.captions) for image in images], np.int64)),
        container=np.full(len(images), NO_ROW, np.int32),
        start=np.zeros(len(images), np.int64),
        length=np.zeros(len(images), np.int64),
        mask=mask_rows,
        control=control_rows,
    )
    table_rows = np.array(rows, np.int32).reshape(-1, 3)
    return ExampleTable(directories, [], buckets, concatenate_images([columns]), masks, controls, table_rows)


def _paired_images(paths: Sequence[str | None]) -> tuple[PairedImages, np.ndarray]:
    """Returns a table with the paths that are not None, and the row of each path in it, NO_ROW for None."""
    existing = [path for path in paths if path is not None]
    rows = np.full(len(paths), NO_ROW, np.int32)
    rows[[path is not None for path in paths]] = np.arange(len(existing))
    return PairedImages(Texts.of(existing), np.zeros((len(existing), HASH_BYTES), np.uint8)), rows


def images_of(counts: Mapping[Bucket, int], directory: Directory = DIRECTORY) -> list[ImageSpec]:
    """Returns the given number of images for each bucket."""
    return [
        ImageSpec(f"{bucket}-{index}.png", bucket=bucket, directory=directory)
        for bucket, count in counts.items()
        for index in range(count)
    ]
