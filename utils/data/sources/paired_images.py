"""Masks and control images: which image has which, by name and shape."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from utils.data.columns import Texts
from utils.data.sources.caption_sources import first_few, stem_of
from utils.data.sources.decoding import CONTENT_BYTES, BadFile
from utils.data.sources.directory_index import DirectoryIndex, DirectoryIndexer, IndexSettings
from utils.data.sources.image_rows import NO_ROW, ImageRows, PairedImages, Remembered


@dataclass(frozen=True)
class Kind:
    """A kind of companion."""

    word: str
    key: str
    """Of the dataset file: where they are."""
    hint: str


MASK = Kind("mask", "mask_path", " (a white image is a mask of everything)")
CONTROL = Kind("control image", "control_path", "")


class PairedImageTable:
    """The companions of one kind of all directories; each folder of theirs is listed once."""

    def __init__(self, kind: Kind, indexer: DirectoryIndexer) -> None:
        self._kind, self._indexer = kind, indexer
        self._listings: dict[Path, DirectoryIndex] = {}
        self._starts: dict[Path, int] = {}
        self._used: dict[Path, set[str]] = {}
        self._count = 0

    def find(
        self, folder: Path, recursive: bool, images: ImageRows, shown: Callable[[int], Path]
    ) -> tuple[np.ndarray, list[BadFile]]:
        """Of each image the row of its companion in `columns`, NO_ROW where it has none that can be used; the bad files.

        folder: where they are. shown: how the image of a row is called in messages.
        """
        listing, start = self._list(folder, recursive), self._starts[folder]
        names, sizes = list(listing.parts[0].rows.names), listing.parts[0].rows.sizes.tolist()
        by_stem: dict[str, list[int]] = {}
        for row, name in enumerate(names):
            by_stem.setdefault(stem_of(name), []).append(row)
        broken = {stem_of(_below(bad.path, folder)): bad for bad in listing.bad_files}
        found, bad_files = np.full(len(images), NO_ROW, np.int32), []
        for image, (name, size) in enumerate(zip(images.names, images.sizes.tolist(), strict=True)):
            rows = by_stem.get(stem_of(name), [])
            self._used[folder].update(names[row] for row in rows)
            if not rows and stem_of(name) in broken:
                bad = broken[stem_of(name)]
                self._used[folder].add(_below(bad.path, folder))
            else:
                candidates = [(folder / names[row], sizes[row]) for row in rows]
                misfit = _misfit(self._kind, shown(image), size, candidates)
                if misfit is None:
                    found[image] = start + rows[0]
                    continue
                bad = misfit
            bad_files.append(bad)
        return found, bad_files

    def _list(self, folder: Path, recursive: bool) -> DirectoryIndex:
        if folder not in self._listings:
            listing = self._indexer.index(folder, IndexSettings(recursive, has_captions=False))
            self._listings[folder], self._starts[folder], self._used[folder] = listing, self._count, set()
            self._count += len(listing.parts[0].rows)
        return self._listings[folder]

    def columns(self) -> PairedImages:
        rows = [listing.parts[0].rows for listing in self._listings.values()]
        content = np.concatenate([np.zeros((0, CONTENT_BYTES), np.uint8), *(part.content for part in rows)])
        paths = (str(folder / name) for folder, part in zip(self._listings, rows, strict=True) for name in part.names)
        return PairedImages(Texts.of(paths), content)

    def remembered(self) -> list[Remembered]:
        """Where the hashes of the rows of `columns` are kept."""
        parts = {folder: listing.parts[0] for folder, listing in self._listings.items()}
        return [Remembered(part.memory, part.usable, self._starts[folder]) for folder, part in parts.items()]

    def warnings(self) -> list[str]:
        """StampedFiles in the folders that are no image's companion."""
        warnings = []
        for folder, listing in self._listings.items():
            names = {*listing.parts[0].rows.names, *listing.others}
            names |= {_below(bad.path, folder) for bad in listing.bad_files}
            unused = sorted(names - self._used[folder])
            if unused:
                warnings.append(f"{folder}: {len(unused)} files are no {self._kind.word} of an image: {first_few(unused)}")
        return warnings


def _below(path: Path, folder: Path) -> str:
    return path.relative_to(folder).as_posix()


def _misfit(
    kind: Kind, image: Path, size: Sequence[int], candidates: Sequence[tuple[Path, Sequence[int]]]
) -> BadFile | None:
    """Why none of these can be the image's companion, if none can."""
    if not candidates:
        return BadFile(image, f"has no {kind.word}: none in {kind.key} has its name{kind.hint}")
    if len(candidates) > 1:
        paths = ", ".join(str(path) for path, _ in candidates)
        return BadFile(image, f"has several {kind.word}s: {paths}; keep one")
    ((path, found),) = candidates
    if same_shape(found, size):
        return None
    sizes = [f"{width}x{height}" for width, height in (found, size)]
    return BadFile(path, f"is {sizes[0]} pixels, its image {image.name} {sizes[1]}: not the same shape")


def same_shape(size: Sequence[int], other: Sequence[int]) -> bool:
    """Whether the smaller (width, height) is the larger one scaled in proportion, to within a pixel of the smaller."""
    (width, height), (larger_width, larger_height) = sorted((tuple(size), tuple(other)))
    return abs(width / larger_width - height / larger_height) <= 1 / larger_width + 1 / larger_height
