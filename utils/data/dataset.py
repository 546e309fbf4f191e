"""A dataset: its examples, and what else was found in its folders; what can be wrong with a dataset file; holding out."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from models.family import LatentSpec
from utils.config.schema.dataset import DatasetConfig, DirectoryConfig, ImageConfig
from utils.data.buckets import Bucket, make_buckets
from utils.data.examples import ExampleTable, empty_table
from utils.data.sources.decoding import BadFile
from utils.data.sources.directory_scan import ARCHIVE_SUFFIXES
from utils.data.sources.rows import Remembered
from utils.randomness import fraction


@dataclass(frozen=True)
class ContentMemory:
    """Hashes of a table's files, and where they are kept from run to run."""

    parts: tuple[tuple[np.ndarray, Remembered], ...] = ()
    """(Column of hashes of a table, where a part of it is kept)."""

    def save(self) -> None:
        """Remember what the columns have by now."""
        for content, remembered in self.parts:
            remembered.save_content(content)


@dataclass(frozen=True)
class Dataset:
    """What a look at the folders found."""

    examples: ExampleTable = field(default_factory=empty_table)
    bad_files: list[BadFile] = field(default_factory=list)
    fatal_files: list[BadFile] = field(default_factory=list)
    """Those of the bad files that are of directories with on_bad_file = "error"."""
    warnings: list[str] = field(default_factory=list)
    left_out: list[BadFile] = field(default_factory=list)
    """Images that could be used and, by keys of the dataset file, are not; and why."""
    refused: list[BadFile] = field(default_factory=list)
    """Images for which upscale = "error" refuses to start."""
    memory: ContentMemory = field(default_factory=ContentMemory)

    @property
    def num_images(self) -> int:
        return self.examples.num_images

    def bucket_counts(self) -> dict[Bucket, int]:
        return self.examples.bucket_counts()


# --- errors of the dataset file --------------------------------------------------------------------------------------


def resolution_errors(config: DatasetConfig, latent: LatentSpec) -> list[tuple[str, str]]:
    """Resolutions the model cannot be trained at, as (key, message)."""
    errors: list[tuple[str, str]] = []
    for index, directory in enumerate(config.directory):
        is_own = directory.resolutions != config.resolutions
        place = f"directory[{index}].resolutions" if is_own else "resolutions"
        for number, resolution in enumerate(directory.resolutions):
            message = _resolution_error(directory, resolution, latent)
            if message is not None and (f"{place}[{number}]", message) not in errors:
                errors.append((f"{place}[{number}]", message))
    return errors


def _resolution_error(directory: DirectoryConfig, resolution: int, latent: LatentSpec) -> str | None:
    multiple = latent.pixel_multiple
    if resolution % multiple:
        below = resolution // multiple * multiple
        nearest = f"{below} or {below + multiple}" if below else f"{multiple}"
        return f"= {resolution}: must be a multiple of {multiple}; use {nearest}"
    largest = max(max(bucket.width, bucket.height) for bucket in dataset_buckets(directory, resolution, multiple))
    if largest > latent.max_side_pixels:
        return f"= {resolution}: needs sides of {largest} pixels, the network reaches {latent.max_side_pixels}"
    return None


def directory_errors(config: DatasetConfig) -> list[tuple[str, str]]:
    """Folders that are not there, or have two uses at once, as (key, message)."""
    errors = []
    for index, entry in enumerate(config.directory):
        place = f"directory[{index}]"
        if not _is_source(entry.path):
            errors.append((f"{place}.path", f"{entry.path} is not a folder, and no .tar or .parquet file"))
        for key, folder in (("mask_path", entry.mask_path), ("control_path", entry.control_path)):
            if folder is not None and not folder.is_dir():
                errors.append((f"{place}.{key}", f"{folder} is not a folder"))
            if folder is not None and folder.resolve() == entry.path.resolve():
                errors.append((f"{place}.{key}", "must be another folder than path"))
    return errors


def _is_source(path: Path) -> bool:
    return path.is_dir() or (path.is_file() and path.name.lower().endswith(ARCHIVE_SUFFIXES))


def dataset_buckets(config: ImageConfig, resolution: int, multiple: int) -> list[Bucket]:
    """The buckets of one resolution."""
    num_buckets = config.num_ar_buckets if config.enable_ar_bucket else 1
    return make_buckets(resolution, config.min_ar, config.max_ar, num_buckets, multiple)


# --- holding out -------------------------------------------------------------------------------------------------------


def hold_out(table: ExampleTable, num_images: int, seed: int) -> tuple[ExampleTable, ExampleTable]:
    """(Those to train on, those held out), in their order: num_images files, each with all its sizes and directories.

    Chosen are the files of the smallest random numbers, and a file's number depends on seed and key alone: an image that
    comes or goes changes one choice at most. Held-out examples are never flipped. Raises ValueError when none would be
    left to train on.
    """
    images = np.unique(table.rows[:, 0])
    same = table.images.same[images]
    # A file with several names has the number of its first.
    files, first = np.unique(same, return_index=True)
    if num_images >= max(1, len(files)):
        raise ValueError(f"of {len(files)} images none would be left to train on")
    numbers = np.array([fraction(seed, "hold out", table.name_of(int(images[place]))) for place in first])
    chosen_files = files[np.argsort(numbers, kind="stable")[:num_images]]
    chosen = np.isin(table.images.same[table.rows[:, 0]], chosen_files)
    return table.where(~chosen), table.where(chosen, never_flipped=True)
