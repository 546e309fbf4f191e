"""Builds the table of training examples from a dataset file: assigns every image to a bucket at every resolution.

Reads image sizes and captions, but no pixels.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np

from utils.config.schema.dataset import DatasetConfig, DirectoryConfig
from utils.data.buckets import Bucket, nearest_buckets
from utils.data.dataset import Dataset, dataset_buckets, directory_errors
from utils.data.examples import ExampleTable
from utils.data.image_table import Directory, ImageTable, concatenate_images
from utils.data.sources.caption_sources import first_few
from utils.data.sources.decoding import BadFile
from utils.data.sources.directory_index import DirectoryIndexer, IndexPart, IndexSettings
from utils.data.sources.image_rows import NO_ROW, Container, ImageRows
from utils.data.sources.paired_images import CONTROL, MASK, PairedImageKind, PairedImageTable
from utils.data.sources.tags import TagShuffle
from utils.files.file_index import FileTable, StoredHashes


def scan(config: DatasetConfig, multiple: int, indexer: DirectoryIndexer, *, prefix: str = "") -> Dataset:
    """Scans all directories; returns their usable examples, sorted by directory and name, and the unusable files.

    prefix: start of every example key; the datasets of one run need different prefixes. Missing directories are skipped;
    `directory_errors` reports them.
    """
    scanner = _Scanner(config, multiple, indexer)
    invalid = {key.partition(".")[0] for key, _ in directory_errors(config)}
    for index, directory in enumerate(config.directory):
        if f"directory[{index}]" not in invalid:
            scanner.add(directory, f"{prefix}{index}")
    return scanner.dataset()


class _Scanner:
    """Builds the table one directory at a time."""

    def __init__(self, config: DatasetConfig, multiple: int, indexer: DirectoryIndexer) -> None:
        self._multiple, self._indexer = multiple, indexer
        self._dataset = Dataset()
        self._directories: list[Directory] = []
        self._containers: list[Container] = []
        self._buckets: dict[Bucket, int] = {}
        self._parts: list[ImageTable] = []
        self._rows: list[np.ndarray] = []
        self._num_images = 0
        self._tables: list[tuple[int, FileTable, np.ndarray]] = []
        """(First row, table, which rows of the table) of each part."""
        self._paired_images = {kind: PairedImageTable(kind, indexer) for kind in (MASK, CONTROL)}
        self._enlarged: list[np.ndarray] = []

    def add(self, directory: DirectoryConfig, key_prefix: str) -> None:
        settings = IndexSettings(
            directory.recursive,
            directory.caption_per_line,
            image_column=directory.image_column,
            caption_column=directory.caption_column,
        )
        num_bad = len(self._dataset.bad_files)
        excluded = [path for path in (directory.mask_path, directory.control_path) if path is not None]
        index = self._indexer.index(directory.path, settings, excluded)
        self._dataset.bad_files.extend(index.bad_files)
        self._dataset.warnings.extend(index.warnings)
        number = len(self._directories)
        self._directories.append(_directory_of(directory, key_prefix))
        num_examples = sum(map(len, self._rows))
        for part in index.parts:
            self._add_part(part, number, directory)
        if directory.on_bad_file == "error":
            self._dataset.fatal_files.extend(self._dataset.bad_files[num_bad:])
        if sum(map(len, self._rows)) == num_examples:
            self._dataset.warnings.append(f"{directory.path} has no usable image")

    def _add_part(self, part: IndexPart, number: int, directory: DirectoryConfig) -> None:
        rows, count = part.rows, len(part.rows)
        container = NO_ROW
        if part.container is not None:
            container = len(self._containers)
            self._containers.append(part.container)
        mask = self._paired_images_of(MASK, directory.mask_path, directory, rows)
        control = self._paired_images_of(CONTROL, directory.control_path, directory, rows)
        self._parts.append(
            ImageTable(
                directory=np.full(count, number, np.int32),
                names=rows.names,
                sizes=rows.sizes,
                file_ids=rows.file_ids,
                hashes=rows.hashes,
                captions=rows.captions,
                first_caption=rows.first_caption,
                container=np.full(count, container, np.int32),
                start=rows.start,
                length=rows.length,
                mask=mask,
                control=control,
            )
        )
        usable = self._within_pixel_limits(rows, directory)
        usable &= (mask != NO_ROW) | (directory.mask_path is None)
        usable &= (control != NO_ROW) | (directory.control_path is None)
        for index, resolution in enumerate(directory.resolutions):
            self._sort_into_buckets(rows, np.flatnonzero(usable), index, resolution, directory)
        self._tables.append((self._num_images, part.table, part.usable))
        self._num_images += count

    def _paired_images_of(
        self, kind: PairedImageKind, folder: Path | None, directory: DirectoryConfig, rows: ImageRows
    ) -> np.ndarray:
        if folder is None:
            return np.full(len(rows), NO_ROW, np.int32)

        def path_of(row: int) -> Path:
            return directory.path / rows.names[row]

        paired_rows, bad_files = self._paired_images[kind].find(folder, directory.recursive, rows, path_of)
        self._dataset.bad_files.extend(bad_files)
        return paired_rows

    def _within_pixel_limits(self, rows: ImageRows, directory: DirectoryConfig) -> np.ndarray:
        """Returns which images min_pixels and max_pixels allow, bool (n,); records the others as skipped."""
        pixels = rows.sizes[:, 0].astype(np.int64) * rows.sizes[:, 1]
        allowed = np.ones(len(rows), bool)
        for key, limit, excluded in (
            ("min_pixels", directory.min_pixels, pixels < directory.min_pixels),
            ("max_pixels", directory.max_pixels, pixels > (directory.max_pixels or np.inf)),
        ):
            for row in np.flatnonzero(excluded).tolist():
                width, height = rows.sizes[row].tolist()
                reason = f"is {width}x{height} pixels; {key} = {limit}"
                self._dataset.skipped.append(BadFile(directory.path / rows.names[row], reason))
            allowed &= ~excluded
        return allowed

    def _sort_into_buckets(
        self, rows: ImageRows, chosen: np.ndarray, index: int, resolution: int, directory: DirectoryConfig
    ) -> None:
        """Adds an example for each chosen row at a resolution; `index` is the resolution's index in the directory."""
        buckets = dataset_buckets(directory, resolution, self._multiple)
        numbers = np.array([self._buckets.setdefault(bucket, len(self._buckets)) for bucket in buckets], np.int32)
        sizes = rows.sizes[chosen].astype(np.float64)
        nearest = nearest_buckets(sizes, buckets)
        sides = np.array([(bucket.width, bucket.height) for bucket in buckets], np.float64)[nearest]
        is_small = (sides > sizes).any(axis=1)
        if directory.upscale == "allow":
            self._enlarged.append(chosen[is_small] + self._num_images)
        else:
            self._record_small(rows, chosen[is_small], sides[is_small], directory)
            chosen, nearest = chosen[~is_small], nearest[~is_small]
        columns = [chosen + self._num_images, np.full(len(chosen), index), numbers[nearest]]
        self._rows.append(np.stack(columns, axis=1).astype(np.int32))

    def _record_small(self, rows: ImageRows, chosen: np.ndarray, sides: np.ndarray, directory: DirectoryConfig) -> None:
        recorded = self._dataset.too_small if directory.upscale == "error" else self._dataset.skipped
        for row, (bucket_width, bucket_height) in zip(chosen.tolist(), sides.astype(int).tolist(), strict=True):
            width, height = rows.sizes[row].tolist()
            reason = f"is {width}x{height} pixels, smaller than its bucket {bucket_width}x{bucket_height}"
            recorded.append(BadFile(directory.path / rows.names[row], f'{reason}; upscale = "{directory.upscale}"'))

    def dataset(self) -> Dataset:
        """Returns the dataset of all directories added so far."""
        masks, controls = self._paired_images[MASK], self._paired_images[CONTROL]
        # The examples of a directory are sorted by image, then by resolution.
        rows = np.concatenate([np.zeros((0, 3), np.int32), *self._rows])
        rows = rows[np.lexsort((rows[:, 1], rows[:, 0]))]
        images = concatenate_images(self._parts)
        table = ExampleTable(
            self._directories, self._containers, list(self._buckets), images, masks.columns(), controls.columns(), rows
        )
        warnings = [*self._dataset.warnings, *masks.warnings(), *controls.warnings()]
        enlarged = np.unique(np.concatenate([np.zeros(0, np.int64), *self._enlarged]))
        if len(enlarged):
            examples = first_few([images.names[int(row)] for row in enlarged[:6]], total=len(enlarged))
            warnings.append(f"{len(enlarged)} images are smaller than their bucket and are enlarged: {examples}")
        stored = [StoredHashes(images.hashes, *part) for part in self._tables]
        stored += [*masks.stored_hashes(table.masks.hashes), *controls.stored_hashes(table.controls.hashes)]
        return replace(self._dataset, examples=table, warnings=warnings, stored_hashes=stored)


def _directory_of(directory: DirectoryConfig, key_prefix: str) -> Directory:
    """Returns the settings shared by the examples of a directory."""
    shuffle = None
    if directory.cache_shuffle_num > 1:
        shuffle = TagShuffle(directory.cache_shuffle_num, directory.cache_shuffle_delimiter, directory.keep_tokens)
    return Directory(
        key_prefix=key_prefix,
        path=str(directory.path),
        resolutions=tuple(directory.resolutions),
        repeats=directory.num_repeats,
        loss_weight=directory.loss_weight,
        may_flip=directory.horizontal_flip,
        random_crop=directory.crop == "random",
        skip_bad=directory.on_bad_file == "skip",
        shuffle=shuffle,
    )
