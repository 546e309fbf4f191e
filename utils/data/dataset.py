"""Folders of captioned pictures to the list of training examples. Opens headers and captions, no pixels."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from models.base import LatentSpec
from utils import randomness
from utils.config.schema import DatasetConfig, DirectoryConfig
from utils.data.buckets import Bucket, CropBox, crop_box, make_buckets, nearest_bucket
from utils.data.images import IMAGE_SUFFIXES, BadFile, read_size
from utils.data.masks import mask_of, masks_by_stem


@dataclass(frozen=True, slots=True)
class Example:
    """One picture at one size with its caption."""

    key: str
    """Names the example in every random draw: its directory's place in the file, file name, resolution ("0/fox.png@512")."""
    image: Path
    caption: str
    box: CropBox
    repeats: int
    mask: Path | None = None
    loss_weight: float = 1.0
    may_flip: bool = False
    """Whether it is shown mirrored at some of its visits."""

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


def directory_problems(config: DatasetConfig) -> list[tuple[str, str]]:
    """Folders that are not there or are given twice, as (key, message)."""
    problems = []
    for index, entry in enumerate(config.directory):
        for key, folder in (("path", entry.path), ("mask_path", entry.mask_path)):
            if folder is not None and not folder.is_dir():
                problems.append((f"directory[{index}].{key}", f"{folder} is not a folder"))
        if entry.mask_path is not None and entry.mask_path.resolve() == entry.path.resolve():
            problems.append((f"directory[{index}].mask_path", "must be another folder than path"))
    return problems


def dataset_buckets(config: DatasetConfig, resolution: int, multiple: int) -> list[Bucket]:
    """The buckets of one resolution."""
    num_buckets = config.num_ar_buckets if config.enable_ar_bucket else 1
    return make_buckets(resolution, config.min_ar, config.max_ar, num_buckets, multiple)


def scan(config: DatasetConfig, multiple: int, *, prefix: str = "") -> Dataset:
    """Every usable example of every directory, sorted by name; and what could not be used.

    Keys begin with the prefix: several datasets of one run need different ones.
    """
    dataset = Dataset([], [], [])
    buckets = {resolution: dataset_buckets(config, resolution, multiple) for resolution in config.resolutions}
    for index, directory in enumerate(config.directory):
        if not _folders_are_usable(directory):
            continue  # preflight.py has told of it
        found = len(dataset.examples)
        _scan_directory(f"{prefix}{index}", directory, buckets, dataset)
        if len(dataset.examples) == found:
            dataset.warnings.append(f"{directory.path} has no usable picture")
    dataset.warnings.extend(_unused_mask_files(config.directory))
    enlarged = sorted({example.image.name for example in dataset.examples if example.box.scale > 1})
    if enlarged:
        dataset.warnings.append(f"{len(enlarged)} pictures are smaller than their bucket and enlarged: {_some(enlarged)}")
    return dataset


def _folders_are_usable(directory: DirectoryConfig) -> bool:
    if directory.mask_path is None:
        return directory.path.is_dir()
    is_there = directory.path.is_dir() and directory.mask_path.is_dir()
    return is_there and not directory.path.samefile(directory.mask_path)


def _scan_directory(place: str, directory: DirectoryConfig, buckets: dict[int, list[Bucket]], dataset: Dataset) -> None:
    dataset.warnings.extend(_inner_folders(directory))
    files = _visible_files(directory.path)
    images = _pictures(files)
    dataset.warnings.extend(_unused_files(directory.path, files, images))
    masks = masks_by_stem(_visible_files(directory.mask_path)) if directory.mask_path is not None else None
    for image in images:
        try:
            width, height = read_size(image)
            caption = read_caption(image)
            mask = mask_of(image, (width, height), masks) if masks is not None else None
        except BadFile as bad:
            dataset.bad_files.append(bad)
            continue
        for resolution, choices in buckets.items():
            example = Example(
                key=f"{place}/{image.name}@{resolution}",
                image=image,
                caption=caption,
                box=crop_box(width, height, nearest_bucket(width, height, choices)),
                repeats=directory.num_repeats,
                mask=mask,
                loss_weight=directory.loss_weight,
                may_flip=directory.horizontal_flip,
            )
            dataset.examples.append(example)


def _visible_files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if not path.name.startswith(".") and path.is_file())


def _pictures(files: Iterable[Path]) -> list[Path]:
    return [path for path in files if path.suffix.lower() in IMAGE_SUFFIXES]


def _inner_folders(directory: DirectoryConfig) -> list[str]:
    """A warning for folders in the folder, unless they are hidden or hold its masks."""
    folders = [path for path in directory.path.iterdir() if path.is_dir() and not path.name.startswith(".")]
    masks = directory.mask_path
    names = sorted(path.name for path in folders if masks is None or not path.samefile(masks))
    return [f"{directory.path}: folders in it are not looked into: {_some(names)}"] if names else []


def _unused_mask_files(directories: Iterable[DirectoryConfig]) -> list[str]:
    """Warnings for files in folders of masks that are no mask of a picture of any directory that has its masks there."""
    stems: dict[Path, set[str]] = {}
    for directory in directories:
        if directory.mask_path is not None and _folders_are_usable(directory):
            pictures = _pictures(_visible_files(directory.path))
            stems.setdefault(directory.mask_path, set()).update(path.stem for path in pictures)
    warnings = []
    for folder, used in stems.items():
        files = _visible_files(folder)
        masks = {path for path in _pictures(files) if path.stem in used}
        unused = [path.name for path in files if path not in masks]
        if unused:
            warnings.append(f"{folder}: {len(unused)} files are no mask of a picture: {_some(unused)}")
    return warnings


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


def hold_out(examples: Sequence[Example], num_images: int, seed: int) -> tuple[list[Example], list[Example]]:
    """(Those to train on, those held out), in their order: num_images files, each with all its sizes and directories.

    Chosen are the files of the smallest random numbers, and a file's number depends on seed and key alone: a picture that
    comes or goes changes one choice at most. Held-out examples are never mirrored. Raises ValueError when none would be
    left to train on.
    """
    files = {image: image.resolve() for image in {example.image for example in examples}}
    names: dict[Path, str] = {}
    for example in examples:
        names.setdefault(files[example.image], example.key.rpartition("@")[0])
    if num_images >= max(1, len(names)):
        raise ValueError(f"of {len(names)} pictures none would be left to train on")
    ranking = sorted(names, key=lambda file: randomness.uniform(seed, "hold out", names[file]))
    chosen = set(ranking[:num_images])
    training = [example for example in examples if files[example.image] not in chosen]
    return training, [replace(example, may_flip=False) for example in examples if files[example.image] in chosen]


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
