"""The content of the dataset page as data, before rendering. Texts are unescaped."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class BucketFacts:
    """One bucket: a size at which images are trained."""

    name: str
    """Such as "1024x1024"."""
    num_images: int
    shown_per_epoch: float
    """Draws of its examples per epoch, repeats and fillers included, as a mean over epochs."""
    num_fillers: float
    """Draws that only fill groups."""
    num_enlarged: int
    """Images that are smaller than the bucket and upscaled."""

    @property
    def num_repeats(self) -> int:
        """Draws, other than fillers, beyond the first of each image; 0 where an epoch does not use every image."""
        return max(0, round(self.shown_per_epoch - self.num_fillers) - self.num_images)


@dataclass(frozen=True)
class Thumbnail:
    """One image twice: as in its file, and decoded from its cached latents."""

    image: str
    """Path of the file."""
    caption: str
    bucket: str
    """Name of its bucket."""
    width: int
    """Width of the original in pixels, after its EXIF rotation."""
    height: int
    crop: tuple[float, float, float, float]
    """Left, top, right, bottom of the trained area as fractions of the original, from 0 to 1, before a flip."""
    original: bytes
    """A JPEG of the whole image."""
    encoded: bytes
    """A JPEG of the decoded latents, which cover the crop only."""
    flipped: bool


@dataclass(frozen=True)
class CutCaption:
    """A caption that exceeds the token limit of an encoder."""

    image: str
    """Path of the image."""
    kept: str
    cut: str
    num_tokens: int
    """Tokens of the whole caption."""


@dataclass(frozen=True)
class EncoderFacts:
    """Caption lengths for one text encoder."""

    name: str
    """Such as "t5xxl"."""
    max_tokens: int
    histogram: Sequence[tuple[int, int]]
    """(tokens, captions of that length), in order of length."""
    num_cut: int
    cut: Sequence[CutCaption]
    """The first of the `num_cut` truncated captions."""


@dataclass(frozen=True)
class DatasetFacts:
    """Everything on the page. A list with a `num_` counterpart may hold only the first entries."""

    title: str
    rows: Sequence[tuple[str, str]]
    """The summary: name and value."""
    buckets: Sequence[BucketFacts]
    thumbnails: Sequence[Thumbnail]
    encoders: Sequence[EncoderFacts]
    exposure: Sequence[tuple[float, int]]
    """(draws of an image per epoch, number of such images), in order of draws."""
    bad_files: Sequence[tuple[str, str]]
    """(path, reason)."""
    num_bad: int
    skipped: Sequence[tuple[str, str]]
    """(path, reason) of usable files that the configuration skips."""
    num_skipped: int
    duplicates: Sequence[Sequence[str]]
    """Groups of paths with equal content."""
    num_duplicates: int
    """The number of all groups."""
    warnings: Sequence[str]
