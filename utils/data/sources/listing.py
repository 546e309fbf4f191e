"""What a [[directory]] of the dataset file holds: its images in columns, with sizes and captions; and what is wrong.

Sizes come from the headers of files, read in several processes; captions from text files, tables and archives. Everything
found is remembered in the cache, with each file's stamp (size, times of change). A start at which no stamp has changed
compares columns and opens no file; only what has changed is read again. What cannot be used is tried anew at each start.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from utils.data.cache.keys import content_key
from utils.data.columns import Texts
from utils.data.sources.archive_entries import NOT_INSIDE, Found
from utils.data.sources.caption_sources import CaptionSources, CaptionTable, some
from utils.data.sources.captions import read_caption_table
from utils.data.sources.decoding import BadFile
from utils.data.sources.directory_scan import Walk, merged, stamp_of, stat_files, walk
from utils.data.sources.image_files import TABLE_SUFFIX, ImageFile
from utils.data.sources.readers import Readers
from utils.data.sources.rows import UNREAD, Container, Memory, Rows, add_captions, carry_over, set_captions, unread_rows
from utils.data.sources.tar_files import list_tar

FILES_AT_ONCE = 256
"""Headers that a reader process is asked for in one go."""
CAPTION_THREADS = 8
"""Captions are small files: what takes time, on a network, is waiting for them."""

CaptionReader = Callable[[int], list[str] | BadFile]
"""Row -> captions, or why there are none."""


@dataclass(frozen=True)
class ListingSettings:
    """What of the dataset file decides what is found."""

    recursive: bool
    caption_per_line: bool = False
    has_captions: bool = True
    """False for masks and control images; archives among them are not looked into."""
    image_column: str | None = None
    caption_column: str | None = None


@dataclass
class Part:
    """The images of a folder, or of an archive in it."""

    rows: Rows
    """Those that can be used; names are below the directory's path."""
    container: Container | None
    memory: Memory
    usable: np.ndarray
    """Which of the rows in the memory these are: boolean."""


@dataclass
class Listing:
    """What a directory holds."""

    parts: list[Part] = field(default_factory=list)
    bad_files: list[BadFile] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    others: list[str] = field(default_factory=list)
    """Of masks and control images: files that are no images."""


class Lister:
    """Lists directories, and remembers what it found in a folder; without one it remembers nothing."""

    def __init__(self, readers: Readers, memory_folder: Path | None, *, may_write: bool = True) -> None:
        self._readers, self._memory_folder, self._may_write = readers, memory_folder, may_write

    def look_at(self, path: Path, settings: ListingSettings, excluded: Sequence[Path] = ()) -> Listing:
        """A folder with all it holds, but for the folders in it that are excluded; or one archive."""
        listing = Listing()
        if path.is_file():
            self._add_archive(listing, path, "", settings)
            return listing
        found = walk(path, recursive=settings.recursive, excluded=excluded)
        listing.bad_files += found.bad_files
        tables: list[CaptionTable] = []
        if settings.has_captions:
            tables = [_table_file(path / name) for name in found.tables]
            for name in _without_logs(found.archives):
                tables += self._add_archive(listing, path, name, settings)
        else:
            listing.others = [*found.texts.names, *found.archives, *found.tables, *found.others]
        captions = CaptionSources(path, found.texts, tables, per_line=settings.caption_per_line)
        self._add_files(listing, path, found, captions, settings)
        return listing

    def _memory(self, path: Path, settings: ListingSettings) -> Memory:
        if self._memory_folder is None:
            return Memory(None, False)
        name = content_key(str(path.absolute()), json.dumps(asdict(settings), sort_keys=True)).hex()
        return Memory(self._memory_folder / f"{name}.safetensors", self._may_write)

    # --- images in files of their own ------------------------------------------------------------------------------

    def _add_files(
        self, listing: Listing, folder: Path, found: Walk, captions: CaptionSources, settings: ListingSettings
    ) -> None:
        memory = self._memory(folder, settings)
        old, header = memory.load() or (None, {})
        tables = [[str(table.path), list(table.stamp)] for table in captions.tables]
        same_tables = header.get("tables") == tables
        elsewhere = header.get("elsewhere", []) if same_tables else captions.named_images()
        inside = set(found.images.names)
        elsewhere = [name for name in elsewhere if name not in inside]
        files = merged(found.images, stat_files(folder, elsewhere)) if elsewhere else found.images
        rows = unread_rows(Texts.of(files.names), files.stamps, captions.stamps_of(files.names), files.same)
        if old is not None:
            rows = carry_over(rows, old, captions_too=same_tables)

        def file_of(row: int) -> ImageFile:
            return ImageFile(folder / files.names[row])

        def captions_of(row: int) -> list[str] | BadFile:
            return captions.captions_of(files.names[row])

        bad_files: list[BadFile] = []
        found_any = self._read_missing(rows, file_of, captions_of if settings.has_captions else None, bad_files)
        listing.bad_files += captions.bad_tables + bad_files  # of many, the first are shown: the table, not all it lacks
        if settings.has_captions:
            listing.warnings += captions.warnings(files.names) + _unused(folder, found)
        if found_any or old is None or not same_tables or not _same_files(rows, old):
            same_names = same_tables and old is not None and rows.names == old.names
            nameless = header["nameless"] if same_names else captions.nameless(files.names)
            # A table that cannot be read is tried anew at the next start.
            header = {"tables": None if captions.bad_tables else tables, "elsewhere": elsewhere, "nameless": nameless}
            memory.save(rows, header)
        if header["nameless"]:
            count, shown = len(header["nameless"]), some(header["nameless"])
            listing.warnings.append(f"{folder}: {count} entries of caption tables name no image: {shown}")
        usable = _usable(rows, settings)
        listing.parts.append(Part(rows.where(usable), None, memory, usable))

    def _read_missing(
        self, rows: Rows, file_of: Callable[[int], ImageFile], captions_of: CaptionReader | None, bad_files: list[BadFile]
    ) -> bool:
        """Read what the rows lack; whether anything was found. What cannot be read joins the bad files."""
        unread = np.flatnonzero(rows.sizes[:, 0] == UNREAD)
        sizes = self._read_sizes([file_of(row) for row in unread.tolist()], bad_files)
        rows.sizes[unread] = sizes
        found: dict[int, list[str]] = {}
        if captions_of is not None:
            uncaptioned = np.flatnonzero(rows.caption_counts == 0).tolist()
            with ThreadPoolExecutor(CAPTION_THREADS) as pool:
                for row, answer in zip(uncaptioned, pool.map(captions_of, uncaptioned), strict=True):
                    if isinstance(answer, BadFile):
                        bad_files.append(answer)
                    else:
                        found[row] = answer
            add_captions(rows, found)
        return bool(sizes.any()) or bool(found)

    def _read_sizes(self, files: Sequence[ImageFile], bad_files: list[BadFile]) -> np.ndarray:
        """Width and height of each, (n, 2); UNREAD for those that have none."""
        batches = [files[start : start + FILES_AT_ONCE] for start in range(0, len(files), FILES_AT_ONCE)]
        futures = [self._readers.sizes(batch) for batch in batches]
        sizes = np.full((len(files), 2), UNREAD, np.int32)
        for index, answer in enumerate(answer for future in futures for answer in future.result()):
            if isinstance(answer, str):
                bad_files.append(BadFile(Path(str(files[index])), answer))
            else:
                sizes[index] = answer
        return sizes

    # --- archives ----------------------------------------------------------------------------------------------------

    def _add_archive(self, listing: Listing, folder: Path, name: str, settings: ListingSettings) -> list[CaptionTable]:
        """Add the images in an archive; of one that only names images elsewhere, return it as a table of captions."""
        path = folder / name if name else folder
        memory = self._memory(path, settings)
        try:
            stamp = stamp_of(path)
            rows, header = memory.load() or (None, {})
            was_known = rows is not None and header.get("stamp") == list(stamp)
            if rows is None or not was_known:
                contents = _read_archive(path, settings, self._readers)
                rows, header = _rows_of(contents, path, stamp), _header_of(contents, stamp)
        except BadFile as bad:
            listing.bad_files.append(bad)
            return []
        except OSError as error:
            listing.bad_files.append(BadFile(path, f"cannot be read: {error.strerror}"))
            return []
        listing.bad_files += [BadFile(Path(bad_path), reason) for bad_path, reason in header["bad_files"]]
        if header["others"]:
            listing.warnings.append(f"{path}: {header['others']} members are neither image nor caption of one")
        if header["only_names"]:
            if not was_known:
                memory.save(rows, header)
            return [CaptionTable(path, stamp, lambda: _as_table(rows))]
        container = Container(str(path), name, header["column"])
        names = list(rows.names)

        def file_of(row: int) -> ImageFile:
            return ImageFile(path, container.column or names[row], int(rows.start[row]), int(rows.length[row]))

        def captions_of(row: int) -> BadFile:
            return BadFile(Path(str(file_of(row))), "has no caption in the archive")

        if self._read_missing(rows, file_of, captions_of, listing.bad_files) or not was_known:
            memory.save(rows, header)
        usable = _usable(rows, settings)
        below = replace(rows, names=Texts.of(f"{name}/{member}" for member in names)) if name else rows
        listing.parts.append(Part(below.where(usable), container, memory, usable))
        return []


def _without_logs(archives: Sequence[str]) -> list[str]:
    """Without the .parquet files that img2dataset writes beside .tar files, about what is in those."""
    tars = {name.removesuffix(".tar") for name in archives if name.endswith(".tar")}
    return [name for name in archives if name.removesuffix(TABLE_SUFFIX) not in tars]


def _same_files(rows: Rows, old: Rows) -> bool:
    if len(rows) != len(old) or rows.names != old.names:
        return False
    return bool((rows.stamps == old.stamps).all() and (rows.caption_stamps == old.caption_stamps).all())


def _usable(rows: Rows, settings: ListingSettings) -> np.ndarray:
    has_size = rows.sizes[:, 0] != UNREAD
    return has_size & (rows.caption_counts > 0) if settings.has_captions else has_size


def _table_file(path: Path) -> CaptionTable:
    return CaptionTable(path, stamp_of(path), lambda: read_caption_table(path))


def _unused(folder: Path, found: Walk) -> list[str]:
    warnings = []
    if found.folders:
        warnings.append(f"{folder}: folders in it are not looked into (recursive = true does): {some(found.folders)}")
    if found.others:
        warnings.append(f"{folder}: {len(found.others)} files are neither image nor caption of one: {some(found.others)}")
    return warnings


@dataclass(frozen=True)
class _Contents:
    """What an archive holds."""

    found: list[Found]
    column: str
    bad_files: list[BadFile]
    num_others: int


def _read_archive(path: Path, settings: ListingSettings, readers: Readers) -> _Contents:
    """Raises BadFile for one that cannot be read at all."""
    if path.suffix.lower() == TABLE_SUFFIX:
        found, column, bad_files = readers.parquet(path, settings.image_column, settings.caption_column).result()
        if len({one.start == NOT_INSIDE for one in found}) > 1:
            raise BadFile(path, "has the bytes of some images and only the paths of others; make two files of it")
        return _Contents(found, column, bad_files, 0)
    found, bad_files, others = list_tar(path, caption_per_line=settings.caption_per_line)
    return _Contents(found, "", bad_files, len(others))


def _rows_of(contents: _Contents, path: Path, stamp: tuple[int, int, int]) -> Rows:
    """Of each image in an archive, where it is and its captions; nothing else is known yet."""
    found, count = contents.found, len(contents.found)
    zeros = np.zeros((count, 3), np.int64)
    start = np.fromiter((one.start for one in found), np.int64, count)
    same = start + int.from_bytes(content_key(str(path.resolve()))[:7], "little")
    rows = unread_rows(Texts.of(one.name for one in found), zeros + np.array(stamp), zeros, same)
    rows.start, rows.length = start, np.fromiter((one.length for one in found), np.int64, count)
    set_captions(rows, [one.captions or [] for one in found])
    return rows


def _header_of(contents: _Contents, stamp: tuple[int, int, int]) -> dict[str, Any]:
    return {
        "stamp": list(stamp),
        "column": contents.column,
        "bad_files": [(str(bad.path), bad.reason) for bad in contents.bad_files],
        "others": contents.num_others,
        "only_names": bool(contents.found) and contents.found[0].start == NOT_INSIDE,
    }


def _as_table(rows: Rows) -> dict[str, list[str]]:
    texts, bounds = list(rows.captions), rows.first_caption.tolist()
    return {name: texts[bounds[row] : bounds[row + 1]] for row, name in enumerate(rows.names)}
