"""Tables of examples made of arguments, without files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from utils.data.buckets import Bucket
from utils.data.columns import Texts
from utils.data.examples import ExampleTable
from utils.data.image_table import Directory, Pictures, joined_pictures
from utils.data.sources.decoding import CONTENT_BYTES
from utils.data.sources.rows import NONE, Companions, firsts

DIRECTORY = Directory(
    place="0",
    path="pictures",
    resolutions=(32,),
    repeats=1,
    loss_weight=1.0,
    may_flip=False,
    random_crop=False,
    skip_bad=False,
    shuffle=None,
)
"""One with nothing special; tests replace what they are about."""


@dataclass(frozen=True)
class Shown:
    """A picture, and everything an example of it has."""

    name: str = "fox.png"
    captions: tuple[str, ...] = ("a fox",)
    bucket: Bucket = Bucket(32, 32)
    """At each of its directory's resolutions."""
    size: tuple[int, int] = (40, 40)
    mask: str | None = None
    """Path of the file."""
    control: str | None = None
    directory: Directory = DIRECTORY


def table_of(pictures: Sequence[Shown]) -> ExampleTable:
    """The examples of these pictures, in their order. No hash is known."""
    directories = list(dict.fromkeys(picture.directory for picture in pictures))
    buckets = list(dict.fromkeys(picture.bucket for picture in pictures))
    rows = [
        (number, resolution, buckets.index(picture.bucket))
        for number, picture in enumerate(pictures)
        for resolution in range(len(picture.directory.resolutions))
    ]
    masks, mask_rows = _companions([picture.mask for picture in pictures])
    controls, control_rows = _companions([picture.control for picture in pictures])
    columns = Pictures(
        directory=np.array([directories.index(picture.directory) for picture in pictures], np.int32),
        names=Texts.of(picture.name for picture in pictures),
        sizes=np.array([picture.size for picture in pictures], np.int32).reshape(-1, 2),
        same=np.arange(len(pictures), dtype=np.int64),
        content=np.zeros((len(pictures), CONTENT_BYTES), np.uint8),
        captions=Texts.of(caption for picture in pictures for caption in picture.captions),
        first_caption=firsts(np.array([len(picture.captions) for picture in pictures], np.int64)),
        container=np.full(len(pictures), NONE, np.int32),
        start=np.zeros(len(pictures), np.int64),
        length=np.zeros(len(pictures), np.int64),
        mask=mask_rows,
        control=control_rows,
    )
    table_rows = np.array(rows, np.int32).reshape(-1, 3)
    return ExampleTable(directories, [], buckets, joined_pictures([columns]), masks, controls, table_rows)


def _companions(paths: Sequence[str | None]) -> tuple[Companions, np.ndarray]:
    """A row for each that is no None, and of each path its row."""
    there = [path for path in paths if path is not None]
    rows = np.full(len(paths), NONE, np.int32)
    rows[[path is not None for path in paths]] = np.arange(len(there))
    return Companions(Texts.of(there), np.zeros((len(there), CONTENT_BYTES), np.uint8)), rows


def pictures_of(counts: Mapping[Bucket, int], directory: Directory = DIRECTORY) -> list[Shown]:
    """So many pictures of each bucket."""
    return [
        Shown(f"{bucket}-{index}.png", bucket=bucket, directory=directory)
        for bucket, count in counts.items()
        for index in range(count)
    ]
