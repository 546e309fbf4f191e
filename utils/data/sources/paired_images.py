"""Pairs images with their masks and control images, by name and aspect ratio."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from utils.data.sources.caption_sources import first_few, stem_of
from utils.data.sources.decoding import HASH_BYTES, BadFile
from utils.data.sources.directory_index import DirectoryIndex, DirectoryIndexer, IndexSettings
from utils.data.sources.image_rows import NO_ROW, ImageRows, PairedImages
from utils.files.columns import Texts
from utils.files.file_index import StoredHashes


@dataclass(frozen=True)
class PairedImageKind:
    """A kind of paired image: masks or control images."""

    name: str
    """As in messages."""
    key: str
    """Key of the dataset file that names their folder."""
    hint: str
    """Suffix of the message about an image without one."""


MASK = PairedImageKind("mask", "mask_path", " (a white image as mask trains on all pixels)")
CONTROL = PairedImageKind("control image", "control_path", "")


class PairedImageTable:
    """The paired images of one kind for all directories; each of their folders is indexed once."""

    def __init__(self, kind: PairedImageKind, indexer: DirectoryIndexer) -> None:
        self._kind, self._indexer = kind, indexer
        self._indexes: dict[Path, DirectoryIndex] = {}
        self._starts: dict[Path, int] = {}
        self._used: dict[Path, set[str]] = {}
        self._count = 0

    def find(
        self, folder: Path, recursive: bool, images: ImageRows, path_of: Callable[[int], Path]
    ) -> tuple[np.ndarray, list[BadFile]]:
        """Returns the row in `columns` of each image's paired image, NO_ROW where there is no usable one; and the bad files.

        folder: contains the paired images. path_of: the path of an image, by its row, for messages.
        """
        index, start = self._index(folder, recursive), self._starts[folder]
        names, sizes = list(index.parts[0].rows.names), index.parts[0].rows.sizes.tolist()
        by_stem: dict[str, list[int]] = {}
        for row, name in enumerate(names):
            by_stem.setdefault(stem_of(name), []).append(row)
        bad_by_stem = {stem_of(_relative(bad.path, folder)): bad for bad in index.bad_files}
        paired_rows, bad_files = np.full(len(images), NO_ROW, np.int32), []
        for image, (name, size) in enumerate(zip(images.names, images.sizes.tolist(), strict=True)):
            rows = by_stem.get(stem_of(name), [])
            self._used[folder].update(names[row] for row in rows)
            if not rows and stem_of(name) in bad_by_stem:
                bad = bad_by_stem[stem_of(name)]
                self._used[folder].add(_relative(bad.path, folder))
            else:
                candidates = [(folder / names[row], sizes[row]) for row in rows]
                misfit = _misfit(self._kind, path_of(image), size, candidates)
                if misfit is None:
                    paired_rows[image] = start + rows[0]
                    continue
                bad = misfit
            bad_files.append(bad)
        return paired_rows, bad_files

    def _index(self, folder: Path, recursive: bool) -> DirectoryIndex:
        if folder not in self._indexes:
            index = self._indexer.index(folder, IndexSettings(recursive, has_captions=False))
            self._indexes[folder], self._starts[folder], self._used[folder] = index, self._count, set()
            self._count += len(index.parts[0].rows)
        return self._indexes[folder]

    def columns(self) -> PairedImages:
        """Returns the paired images of all folders."""
        rows = [index.parts[0].rows for index in self._indexes.values()]
        hashes = np.concatenate([np.zeros((0, HASH_BYTES), np.uint8), *(part.hashes for part in rows)])
        paths = (str(folder / name) for folder, part in zip(self._indexes, rows, strict=True) for name in part.names)
        return PairedImages(Texts.of(paths), hashes)

    def stored_hashes(self, hashes: np.ndarray) -> list[StoredHashes]:
        """Returns where the hashes are stored; `hashes` is the hash column of `columns`."""
        parts = {folder: index.parts[0] for folder, index in self._indexes.items()}
        return [StoredHashes(hashes, self._starts[folder], part.table, part.usable) for folder, part in parts.items()]

    def warnings(self) -> list[str]:
        """Returns warnings about files in the folders that are paired with no image."""
        warnings = []
        for folder, index in self._indexes.items():
            names = {*index.parts[0].rows.names, *index.others}
            names |= {_relative(bad.path, folder) for bad in index.bad_files}
            unused = sorted(names - self._used[folder])
            if unused:
                warnings.append(
                    f"{folder}: {len(unused)} files are not the {self._kind.name} of any image: {first_few(unused)}"
                )
        return warnings


def _relative(path: Path, folder: Path) -> str:
    return path.relative_to(folder).as_posix()


def _misfit(
    kind: PairedImageKind, image: Path, size: Sequence[int], candidates: Sequence[tuple[Path, Sequence[int]]]
) -> BadFile | None:
    """Returns the reason why the image has no usable paired image, None if it has one."""
    if not candidates:
        return BadFile(image, f"has no {kind.name}: no file in {kind.key} has its name{kind.hint}")
    if len(candidates) > 1:
        paths = ", ".join(str(path) for path, _ in candidates)
        return BadFile(image, f"has several {kind.name}s: {paths}; keep one")
    ((path, paired_size),) = candidates
    if have_same_aspect_ratio(paired_size, size):
        return None
    sizes = [f"{width}x{height}" for width, height in (paired_size, size)]
    return BadFile(path, f"is {sizes[0]} pixels, but its image {image.name} is {sizes[1]}: the aspect ratios differ")


def have_same_aspect_ratio(size: Sequence[int], other: Sequence[int]) -> bool:
    """Returns whether two sizes (width, height) have the same aspect ratio, to within one pixel of the smaller size."""
    (width, height), (larger_width, larger_height) = sorted((tuple(size), tuple(other)))
    return abs(width / larger_width - height / larger_height) <= 1 / larger_width + 1 / larger_height
