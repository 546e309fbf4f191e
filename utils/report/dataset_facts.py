"""What the page on a dataset shows, gathered before any of it is put into HTML. Texts are as the user wrote them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class BucketFacts:
    """One size that images are trained at. A showing is one place of an image in an epoch."""

    name: str
    """As "1024x1024"."""
    num_images: int
    shown_per_epoch: int
    """Showings, repeats and fillers included."""
    num_fillers: int
    """Of these, showings that only fill the last batch."""
    num_enlarged: int
    """Images that are smaller than the bucket."""

    @property
    def num_repeats(self) -> int:
        """Showings, other than fillers, of images that the epoch has shown before; 0 where some are not shown at all."""
        return max(0, self.shown_per_epoch - self.num_fillers - self.num_images)


@dataclass(frozen=True)
class Thumbnail:
    """One image, small: as it is in its file, and as its latents have it."""

    image: str
    """Its path."""
    caption: str
    bucket: str
    """Name of a bucket."""
    width: int
    """Of the original in pixels, as it is looked at."""
    height: int
    crop: tuple[float, float, float, float]
    """Left, top, right, bottom of what is trained on, as shares of the original from 0 to 1, before mirroring."""
    original: bytes
    """A JPEG of the whole image."""
    encoded: bytes
    """A JPEG of the decoded latents: of the crop only."""
    flipped: bool


@dataclass(frozen=True)
class CutCaption:
    """A caption that is longer than an encoder reads."""

    image: str
    """Path of the image."""
    kept: str
    cut: str
    num_tokens: int
    """Of the whole caption."""


@dataclass(frozen=True)
class EncoderFacts:
    """How long the captions are for one text encoder."""

    name: str
    """As "t5xxl"."""
    max_tokens: int
    histogram: Sequence[tuple[int, int]]
    """(number of tokens, number of captions of that length), in order of length."""
    num_cut: int
    cut: Sequence[CutCaption]
    """Some of the `num_cut`."""


@dataclass(frozen=True)
class DatasetFacts:
    """All that the page says. A list beside a `num_` of it may hold only some of them."""

    title: str
    rows: Sequence[tuple[str, str]]
    """The summary: what, and how much or which."""
    buckets: Sequence[BucketFacts]
    thumbnails: Sequence[Thumbnail]
    encoders: Sequence[EncoderFacts]
    exposure: Sequence[tuple[float, int]]
    """(showings of an image in an epoch, number of images), in order of showings."""
    bad_files: Sequence[tuple[str, str]]
    """(path, reason)."""
    num_bad: int
    left_out: Sequence[tuple[str, str]]
    """(path, why) of usable files that are left out on purpose."""
    num_left_out: int
    duplicates: Sequence[Sequence[str]]
    """Groups of paths of equal content."""
    num_duplicates: int
    """Groups in all."""
    warnings: Sequence[str]
