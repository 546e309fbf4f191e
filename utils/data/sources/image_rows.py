"""Indexed images as columns: what the file index stores for each image of a directory or archive."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np

from utils.data.sources.decoding import HASH_BYTES
from utils.data.sources.image_files import ImageFile
from utils.files.columns import Texts
from utils.files.file_index import HASHES, FileTable, are_unchanged, match_rows

UNREAD = 0
"""Width stored for an image whose size is not known."""
NO_ROW = -1
"""Marks a missing row in a column of row numbers."""
_STORED_NAMES = {"file_ids": "same", "hashes": HASHES}
"""Fields whose columns have another name in the file index. Stored names never change, since existing indexes have them."""


@dataclass(frozen=True)
class Container:
    """A .tar or .parquet file that contains images."""

    path: str
    name: str
    """Path relative to the directory; empty if the directory entry itself names the file."""
    column: str
    """Image column of a .parquet file; empty for a .tar file."""


@dataclass(frozen=True)
class PairedImages:
    """Masks, or control images, one row each."""

    paths: Texts
    hashes: np.ndarray
    """(n, 16) uint8: hash of each file's bytes; zeros where it is not known yet."""

    def file(self, row: int) -> ImageFile:
        return ImageFile(Path(self.paths[row]))


def empty_paired_images() -> PairedImages:
    return PairedImages(Texts.of([]), np.zeros((0, HASH_BYTES), np.uint8))


@dataclass
class ImageRows:
    """Images as columns, one row each, sorted by name."""

    names: Texts
    stamps: np.ndarray
    """(n, 3) int64: size, mtime and ctime of the file."""
    caption_stamps: np.ndarray
    """(n, 3) int64: size, mtime and ctime of the image's caption text file; zeros if it has none."""
    file_ids: np.ndarray
    """(n,) int64: file identity, equal for two names of the same file."""
    sizes: np.ndarray
    """(n, 2) int32: width and height in pixels; UNREAD where they are unknown or unreadable."""
    hashes: np.ndarray
    """(n, 16) uint8: hash of the image file's bytes; zeros where it is not known."""
    start: np.ndarray
    length: np.ndarray
    """(n,) int64: position of the image in its archive, as in ImageFile."""
    captions: Texts
    first_caption: np.ndarray
    """(n + 1,) int64: row i has captions first_caption[i]:first_caption[i + 1]; empty where they are not known."""

    def __len__(self) -> int:
        return len(self.stamps)

    @property
    def caption_counts(self) -> np.ndarray:
        return np.diff(self.first_caption)

    def where(self, chosen: np.ndarray) -> ImageRows:
        """Returns the rows for which `chosen` (bool, (n,)) is true."""
        counts = self.caption_counts
        return ImageRows(
            names=self.names.where(chosen),
            stamps=self.stamps[chosen],
            caption_stamps=self.caption_stamps[chosen],
            file_ids=self.file_ids[chosen],
            sizes=self.sizes[chosen],
            hashes=self.hashes[chosen],
            start=self.start[chosen],
            length=self.length[chosen],
            captions=self.captions.where(np.repeat(chosen, counts)),
            first_caption=group_offsets(counts[chosen]),
        )


def group_offsets(counts: np.ndarray) -> np.ndarray:
    """Converts sizes of consecutive groups, (n,), to the start of each group and the end of the last, (n + 1,)."""
    first = np.zeros(len(counts) + 1, np.int64)
    np.cumsum(counts, out=first[1:])
    return first


def unread_rows(names: Texts, stamps: np.ndarray, caption_stamps: np.ndarray, file_ids: np.ndarray) -> ImageRows:
    """Returns rows for image files whose sizes, hashes and captions are not known yet."""
    count = len(stamps)
    return ImageRows(
        names=names,
        stamps=stamps,
        caption_stamps=caption_stamps,
        file_ids=file_ids,
        sizes=np.full((count, 2), UNREAD, np.int32),
        hashes=np.zeros((count, HASH_BYTES), np.uint8),
        start=np.zeros(count, np.int64),
        length=np.zeros(count, np.int64),
        captions=Texts.of([]),
        first_caption=np.zeros(count + 1, np.int64),
    )


def carry_over(fresh: ImageRows, old: ImageRows, *, captions_too: bool) -> ImageRows:
    """Fills in the rows of `fresh`, which are all unread, from `old` where the file stamps are equal, and returns them.

    captions_too: whether captions that do not come from a text file may be reused as well.
    """
    sources = match_rows(fresh.names, old.names)
    if not (sources >= 0).any():
        return fresh
    same_file = are_unchanged(fresh.stamps, old.stamps, sources)
    fresh.sizes[same_file] = old.sizes[sources[same_file]]
    fresh.hashes[same_file] = old.hashes[sources[same_file]]
    same_text = are_unchanged(fresh.caption_stamps, old.caption_stamps, sources)
    same_text &= fresh.caption_stamps.any(axis=1) | captions_too
    if same_text.all() and np.array_equal(sources, np.arange(len(old))):
        fresh.captions, fresh.first_caption = old.captions, old.first_caption
        return fresh
    texts, bounds = list(old.captions), old.first_caption.tolist()
    chosen = zip(sources.tolist(), same_text.tolist(), strict=True)
    set_captions(fresh, [texts[bounds[row] : bounds[row + 1]] if same else [] for row, same in chosen])
    return fresh


def set_captions(rows: ImageRows, captions: Sequence[Sequence[str]]) -> None:
    """Sets the captions of every row."""
    rows.captions = Texts.of(caption for row_captions in captions for caption in row_captions)
    rows.first_caption = group_offsets(np.fromiter(map(len, captions), np.int64, len(captions)))


def add_captions(rows: ImageRows, new: Mapping[int, Sequence[str]]) -> None:
    """Sets the captions of some rows that had none; `new` maps row -> captions."""
    if not new:
        return
    texts, bounds = list(rows.captions), rows.first_caption.tolist()
    set_captions(rows, [new.get(row) or texts[bounds[row] : bounds[row + 1]] for row in range(len(rows))])


def load_rows(table: FileTable) -> tuple[ImageRows, dict[str, Any]] | None:
    """Returns the stored rows and their header, or None if the table is missing or damaged."""
    loaded = table.load()
    if loaded is None:
        return None
    columns, header = loaded
    try:
        values: dict[str, Any] = {field.name: columns[_stored_name(field.name)] for field in fields(ImageRows)}
        return ImageRows(**values), header
    except KeyError:
        return None


def save_rows(table: FileTable, rows: ImageRows, header: Mapping[str, Any]) -> None:
    """Writes the rows and a header, a JSON object."""
    table.save({_stored_name(field.name): getattr(rows, field.name) for field in fields(ImageRows)}, header)


def _stored_name(field_name: str) -> str:
    return _STORED_NAMES.get(field_name, field_name)
