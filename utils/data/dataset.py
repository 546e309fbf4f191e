"""Folders of captioned pictures to the list of training examples. Opens headers and captions, no pixels."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from models.base import LatentSpec
from utils.config.schema import DatasetConfig, DirectoryConfig
from utils.data.buckets import Bucket, CropBox, crop_box, make_buckets, nearest_bucket
from utils.data.images import IMAGE_SUFFIXES, BadFile, read_size


@dataclass(frozen=True, slots=True)
class Example:
    """One picture at one size with its caption."""

    key: str
    """Names the example in every random draw: its directory's place in the file, file name, resolution."""
    image: Path
    caption: str
    box: CropBox
    repeats: int

    @property
    def bucket(self) -> Bucket:
        return self.box.bucket


@dataclass(frozen=True)
class Dataset:
    """What a scan of the folders found."""

    examples: list[Example]
    bad_files: list[BadFile]
    warnings: list[str]

    @property
    def num_images(self) -> int:
        return len({example.image for example in self.examples})

    def bucket_counts(self) -> dict[Bucket, int]:
        return dict(sorted(Counter(example.bucket for example in self.examples).items()))


def resolution_problems(config: DatasetConfig, latent: LatentSpec) -> list[tuple[str, str]]:
    """Resolutions the model cannot be trained at, as (key, message)."""
    problems = []
    multiple = latent.pixel_multiple
    for index, resolution in enumerate(config.resolutions):
        key = f"resolutions[{index}]"
        if resolution % multiple:
            below = resolution // multiple * multiple
            problems.append((key, f"= {resolution}: must be a multiple of {multiple}; use {below} or {below + multiple}"))
            continue
        largest = max(max(bucket.width, bucket.height) for bucket in dataset_buckets(config, resolution, multiple))
        if largest > latent.max_side_pixels:
            problems.append(
                (key, f"= {resolution}: needs sides of {largest} pixels, the network reaches {latent.max_side_pixels}")
            )
    return problems


def dataset_buckets(config: DatasetConfig, resolution: int, multiple: int) -> list[Bucket]:
    """The buckets of one resolution."""
    num_buckets = config.num_ar_buckets if config.enable_ar_bucket else 1
    return make_buckets(resolution, config.min_ar, config.max_ar, num_buckets, multiple)


def scan(config: DatasetConfig, multiple: int) -> Dataset:
    """Every usable example of every directory, sorted by name; and what could not be used."""
    dataset = Dataset([], [], [])
    buckets = {resolution: dataset_buckets(config, resolution, multiple) for resolution in config.resolutions}
    for index, directory in enumerate(config.directory):
        if not directory.path.is_dir():
            continue  # preflight.py has told of it
        found = len(dataset.examples)
        _scan_directory(index, directory, buckets, dataset)
        if len(dataset.examples) == found:
            dataset.warnings.append(f"{directory.path} has no usable picture")
    enlarged = sorted({example.image.name for example in dataset.examples if example.box.scale > 1})
    if enlarged:
        dataset.warnings.append(f"{len(enlarged)} pictures are smaller than their bucket and enlarged: {_some(enlarged)}")
    return dataset


def _scan_directory(index: int, directory: DirectoryConfig, buckets: dict[int, list[Bucket]], dataset: Dataset) -> None:
    visible = sorted(path for path in directory.path.iterdir() if not path.name.startswith("."))
    files = [path for path in visible if path.is_file()]
    folders = [path.name for path in visible if path.is_dir()]
    if folders:
        dataset.warnings.append(f"{directory.path}: folders in it are not looked into: {_some(folders)}")
    images = [path for path in files if path.suffix.lower() in IMAGE_SUFFIXES]
    dataset.warnings.extend(_unused_files(directory.path, files, images))
    for image in images:
        try:
            width, height = read_size(image)
            caption = read_caption(image)
        except BadFile as bad:
            dataset.bad_files.append(bad)
            continue
        for resolution, choices in buckets.items():
            box = crop_box(width, height, nearest_bucket(width, height, choices))
            key = f"{index}/{image.name}@{resolution}"
            dataset.examples.append(Example(key, image, caption, box, directory.num_repeats))


def _unused_files(folder: Path, files: Sequence[Path], images: Sequence[Path]) -> list[str]:
    """Warnings for files no picture uses, and for pictures that share a caption file by their names."""
    warnings = []
    stems = Counter(image.stem for image in images)
    shared = sorted(stem for stem, count in stems.items() if count > 1)
    if shared:
        warnings.append(f"{folder}: several pictures share one caption file: {_some(f'{stem}.txt' for stem in shared)}")
    unused = [path for path in files if path not in set(images) and not (path.suffix == ".txt" and path.stem in stems)]
    if unused:
        warnings.append(
            f"{folder}: {len(unused)} files are neither picture nor caption of one: {_some(p.name for p in unused)}"
        )
    return warnings


def _some(names: Iterable[str], limit: int = 5) -> str:
    listed = list(names)
    rest = f" and {len(listed) - limit} more" if len(listed) > limit else ""
    return ", ".join(listed[:limit]) + rest


def read_caption(image: Path) -> str:
    """The text of the .txt file of the picture's name, without white space around it. Raises BadFile."""
    path = image.with_suffix(".txt")
    try:
        return path.read_text(encoding="utf-8-sig").strip()
    except FileNotFoundError:
        raise BadFile(image, f"has no caption: {path.name} is missing (an empty file is an empty caption)") from None
    except UnicodeDecodeError as error:
        raise BadFile(path, f"is not UTF-8: byte {error.start} is 0x{error.object[error.start]:02x}") from error
    except OSError as error:
        raise BadFile(path, f"cannot be read: {error.strerror}") from error
