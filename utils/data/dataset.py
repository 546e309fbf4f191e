"""A scanned dataset, validation of a dataset file against the model, and the split into training and held-out images."""

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
from utils.files.file_index import StoredHashes
from utils.randomness import fraction


@dataclass(frozen=True)
class Dataset:
    """The result of scanning the directories of a dataset file."""

    examples: ExampleTable = field(default_factory=empty_table)
    bad_files: list[BadFile] = field(default_factory=list)
    fatal_files: list[BadFile] = field(default_factory=list)
    """The bad files in directories with on_bad_file = "error"."""
    warnings: list[str] = field(default_factory=list)
    skipped: list[BadFile] = field(default_factory=list)
    """Readable images that a key of the dataset file excludes, with the reason."""
    too_small: list[BadFile] = field(default_factory=list)
    """Images smaller than their bucket in directories with upscale = "error"; the run does not start."""
    stored_hashes: list[StoredHashes] = field(default_factory=list)
    """Where the content hashes of the examples' files are stored between runs."""

    @property
    def num_images(self) -> int:
        return self.examples.num_images

    def bucket_counts(self) -> dict[Bucket, int]:
        return self.examples.bucket_counts()


# --- errors of the dataset file --------------------------------------------------------------------------------------


def resolution_errors(config: DatasetConfig, latent: LatentSpec) -> list[tuple[str, str]]:
    """Returns the resolutions that the model cannot be trained at, as (key, message)."""
    errors: list[tuple[str, str]] = []
    for index, directory in enumerate(config.directory):
        is_own = directory.resolutions != config.resolutions
        key = f"directory[{index}].resolutions" if is_own else "resolutions"
        for number, resolution in enumerate(directory.resolutions):
            message = _resolution_error(directory, resolution, latent)
            if message is not None and (f"{key}[{number}]", message) not in errors:
                errors.append((f"{key}[{number}]", message))
    return errors


def _resolution_error(directory: DirectoryConfig, resolution: int, latent: LatentSpec) -> str | None:
    multiple = latent.pixel_multiple
    if resolution % multiple:
        below = resolution // multiple * multiple
        nearest = f"{below} or {below + multiple}" if below else f"{multiple}"
        return f"= {resolution}: must be a multiple of {multiple}; use {nearest}"
    largest = max(max(bucket.width, bucket.height) for bucket in dataset_buckets(directory, resolution, multiple))
    if largest > latent.max_side_pixels:
        return f"= {resolution}: needs sides of {largest} pixels; the network supports at most {latent.max_side_pixels}"
    return None


def directory_errors(config: DatasetConfig) -> list[tuple[str, str]]:
    """Returns missing folders, and folders used for two purposes, as (key, message)."""
    errors = []
    for index, entry in enumerate(config.directory):
        table = f"directory[{index}]"
        if not _is_source(entry.path):
            errors.append((f"{table}.path", f"{entry.path} is neither a folder nor a .tar or .parquet file"))
        for key, folder in (("mask_path", entry.mask_path), ("control_path", entry.control_path)):
            if folder is not None and not folder.is_dir():
                errors.append((f"{table}.{key}", f"{folder} is not a folder"))
            if folder is not None and folder.resolve() == entry.path.resolve():
                errors.append((f"{table}.{key}", "must be a different folder than path"))
    return errors


def _is_source(path: Path) -> bool:
    return path.is_dir() or (path.is_file() and path.name.lower().endswith(ARCHIVE_SUFFIXES))


def dataset_buckets(config: ImageConfig, resolution: int, multiple: int) -> list[Bucket]:
    """Returns the buckets of one resolution."""
    num_buckets = config.num_ar_buckets if config.enable_ar_bucket else 1
    return make_buckets(resolution, config.min_ar, config.max_ar, num_buckets, multiple)


# --- held-out images ---------------------------------------------------------------------------------------------------


def hold_out(table: ExampleTable, num_images: int, seed: int) -> tuple[ExampleTable, ExampleTable]:
    """Returns (training examples, held-out examples), in their original order.

    num_images files are held out, each with all of its resolutions and directories. Each file has a random number that
    depends only on the seed and its key, and the files with the smallest numbers are chosen; so adding or removing an image
    changes at most one choice. Held-out examples are never flipped. Raises ValueError if no training image would remain.
    """
    images = np.unique(table.rows[:, 0])
    file_ids = table.images.file_ids[images]
    # A file with several names uses the random number of its first name.
    files, first = np.unique(file_ids, return_index=True)
    if num_images >= max(1, len(files)):
        raise ValueError(f"no image would remain for training: the dataset has {len(files)} images")
    numbers = np.array([fraction(seed, "hold out", table.name_of(int(images[index]))) for index in first])
    chosen_files = files[np.argsort(numbers, kind="stable")[:num_images]]
    chosen = np.isin(table.images.file_ids[table.rows[:, 0]], chosen_files)
    return table.where(~chosen), table.where(chosen, never_flipped=True)
