"""Listed images in columns, and remembering them: what was found, with the stamps of the files it was found in."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError

from utils.data.columns import Texts, map_columns, save_columns
from utils.data.sources.decoding import CONTENT_BYTES
from utils.data.sources.image_files import ImageFile

UNREAD = 0
"""A width that is not known."""
NONE = -1
"""In a column of numbers of rows: there is none."""


@dataclass(frozen=True)
class Container:
    """A .tar or .parquet file with images."""

    path: str
    name: str
    """Below the directory's path; empty when it is that path."""
    column: str
    """Of a .parquet file, where its images are; empty for a .tar."""


@dataclass(frozen=True)
class PairedImages:
    """Images that belong to images, masks or control images; one row each."""

    paths: Texts
    content: np.ndarray
    """(n, 16) uint8: hashes of their bytes, zeros where they are not known yet."""

    def file(self, row: int) -> ImageFile:
        return ImageFile(Path(self.paths[row]))


def no_paired_images() -> PairedImages:
    return PairedImages(Texts.of([]), np.zeros((0, CONTENT_BYTES), np.uint8))


@dataclass
class Rows:
    """Images in columns, one row each, in order of names."""

    names: Texts
    stamps: np.ndarray
    """(n, 3) int64: size, mtime, ctime of the file."""
    caption_stamps: np.ndarray
    """(n, 3) int64: those of the text file with its captions; zeros where there is none."""
    same: np.ndarray
    """(n,) int64: equal for two names of one file."""
    sizes: np.ndarray
    """(n, 2) int32: width and height in pixels; UNREAD where they are not known, or cannot be read."""
    content: np.ndarray
    """(n, 16) uint8: hash of the bytes; zeros where it is not known."""
    start: np.ndarray
    length: np.ndarray
    """(n,) int64: where in an archive the image is, as in ImageFile."""
    captions: Texts
    first_caption: np.ndarray
    """(n + 1,) int64: row i has captions first_caption[i] to first_caption[i + 1]; none where they are not known."""

    def __len__(self) -> int:
        return len(self.stamps)

    @property
    def caption_counts(self) -> np.ndarray:
        return np.diff(self.first_caption)

    def where(self, chosen: np.ndarray) -> Rows:
        """Only the rows for which `chosen` is true."""
        counts = self.caption_counts
        return Rows(
            names=self.names.where(chosen),
            stamps=self.stamps[chosen],
            caption_stamps=self.caption_stamps[chosen],
            same=self.same[chosen],
            sizes=self.sizes[chosen],
            content=self.content[chosen],
            start=self.start[chosen],
            length=self.length[chosen],
            captions=self.captions.where(np.repeat(chosen, counts)),
            first_caption=firsts(counts[chosen]),
        )


def firsts(counts: np.ndarray) -> np.ndarray:
    """Where each of consecutive groups of these sizes begins, and the end of the last: (n,) to (n + 1,)."""
    first = np.zeros(len(counts) + 1, np.int64)
    np.cumsum(counts, out=first[1:])
    return first


def unread_rows(names: Texts, stamps: np.ndarray, caption_stamps: np.ndarray, same: np.ndarray) -> Rows:
    """Images in files of their own, of which nothing more is known."""
    count = len(stamps)
    return Rows(
        names=names,
        stamps=stamps,
        caption_stamps=caption_stamps,
        same=same,
        sizes=np.full((count, 2), UNREAD, np.int32),
        content=np.zeros((count, CONTENT_BYTES), np.uint8),
        start=np.zeros(count, np.int64),
        length=np.zeros(count, np.int64),
        captions=Texts.of([]),
        first_caption=np.zeros(count + 1, np.int64),
    )


def carry_over(fresh: Rows, old: Rows, *, captions_too: bool) -> Rows:
    """`fresh`, of which nothing is known, with what `old` knows of the same files.

    captions_too: whether captions without a text file can be the same.
    """
    if len(old) == len(fresh) and old.names == fresh.names:
        sources = np.arange(len(old))
    else:
        places = {name: row for row, name in enumerate(old.names)}
        sources = np.fromiter((places.get(name, -1) for name in fresh.names), np.int64, len(fresh))
    known = sources >= 0
    if not known.any():
        return fresh
    same_file = known & (old.stamps[sources] == fresh.stamps).all(axis=1)
    fresh.sizes[same_file] = old.sizes[sources[same_file]]
    fresh.content[same_file] = old.content[sources[same_file]]
    same_text = known & (old.caption_stamps[sources] == fresh.caption_stamps).all(axis=1)
    same_text &= fresh.caption_stamps.any(axis=1) | captions_too
    if same_text.all() and np.array_equal(sources, np.arange(len(old))):
        fresh.captions, fresh.first_caption = old.captions, old.first_caption
        return fresh
    texts, bounds = list(old.captions), old.first_caption.tolist()
    chosen = zip(sources.tolist(), same_text.tolist(), strict=True)
    set_captions(fresh, [texts[bounds[row] : bounds[row + 1]] if same else [] for row, same in chosen])
    return fresh


def set_captions(rows: Rows, captions: Sequence[Sequence[str]]) -> None:
    """Give each row its captions."""
    rows.captions = Texts.of(caption for of_row in captions for caption in of_row)
    rows.first_caption = firsts(np.fromiter(map(len, captions), np.int64, len(captions)))


def add_captions(rows: Rows, found: Mapping[int, Sequence[str]]) -> None:
    """Give some rows, which had none, their captions: row -> captions."""
    if not found:
        return
    texts, bounds = list(rows.captions), rows.first_caption.tolist()
    set_captions(rows, [found.get(row) or texts[bounds[row] : bounds[row + 1]] for row in range(len(rows))])


@dataclass(frozen=True)
class Memory:
    """A file that remembers rows. Losing it, or finding it damaged, costs reading again and nothing else."""

    path: Path | None
    """None: nothing is remembered."""
    may_write: bool

    def load(self) -> tuple[Rows, dict[str, Any]] | None:
        """The rows and what was written with them, if anything."""
        if self.path is None or not self.path.is_file():
            return None
        try:
            columns, text = map_columns(self.path, checked=True)
            header = json.loads(text)
            values = {
                field.name: Texts(columns[f"{field.name}.offsets"], columns[f"{field.name}.block"])
                if f"{field.name}.offsets" in columns
                else columns[field.name]
                for field in fields(Rows)
            }
            return Rows(**values), header  # type: ignore[arg-type]
        except (SafetensorError, OSError, ValueError, KeyError):
            return None

    def save(self, rows: Rows, header: Mapping[str, Any]) -> None:
        """Remember the rows and a header, a table of JSON."""
        if self.path is None or not self.may_write:
            return
        columns: dict[str, np.ndarray] = {}
        for field in fields(Rows):
            value = getattr(rows, field.name)
            if isinstance(value, Texts):
                columns |= {f"{field.name}.offsets": value.offsets, f"{field.name}.block": value.block[:]}
            else:
                columns[field.name] = value
        save_columns(self.path, columns, json.dumps(header))

    def save_content(self, chosen: np.ndarray, content: np.ndarray) -> None:
        """Remember the hashes (m, 16) of the rows for which `chosen` is true."""
        loaded = self.load()
        if loaded is not None and len(loaded[0]) == len(chosen):
            rows, header = loaded
            rows.content = rows.content.copy()
            rows.content[chosen] = content
            self.save(rows, header)


@dataclass(frozen=True)
class Remembered:
    """Where the hashes of some images of a longer table are kept: of `start` and following, as many as are usable."""

    memory: Memory
    usable: np.ndarray
    """Which rows of the memory they are: boolean."""
    start: int

    def save_content(self, content: np.ndarray) -> None:
        """Remember hashes; of the whole table, (n, 16)."""
        count = int(self.usable.sum())
        self.memory.save_content(self.usable, content[self.start : self.start + count])
