"""Indexes a [[directory]] of the dataset file: its images as columns, with sizes and captions, and its unusable files.

Sizes are read from file headers in several processes; captions come from text files, caption tables and archives. The index
is stored in the cache's file index together with each file's stamp. A later start compares the stamps and reads only the
files that changed, so it opens no file of an unchanged directory. Unusable files are tried again at every start.
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
from utils.data.sources.archive_entries import NOT_INSIDE, ArchiveEntry
from utils.data.sources.caption_sources import CaptionSources, CaptionTable, first_few
from utils.data.sources.captions import read_caption_table
from utils.data.sources.decoding import BadFile
from utils.data.sources.directory_scan import DirectoryScan, merge_files, scan_directory, stat_files
from utils.data.sources.image_files import TABLE_SUFFIX, ImageFile
from utils.data.sources.image_rows import (
    UNREAD,
    Container,
    ImageRows,
    add_captions,
    carry_over,
    load_rows,
    save_rows,
    set_captions,
    unread_rows,
)
from utils.data.sources.readers import Readers
from utils.data.sources.tar_files import list_tar
from utils.files.columns import Texts
from utils.files.file_index import FileIndex, FileTable, Stamp, stamp_of

FILES_AT_ONCE = 256
"""Files per request to a reader process."""
CAPTION_THREADS = 8
"""Caption files are small: on a network drive, latency dominates."""

CaptionReader = Callable[[int], list[str] | BadFile]
"""Row -> captions, or the reason why there are none."""


@dataclass(frozen=True)
class IndexSettings:
    """The keys of the dataset file that affect the index. Their names are part of the name of its table."""

    recursive: bool
    caption_per_line: bool = False
    has_captions: bool = True
    """False for masks and control images, whose archives are not read."""
    image_column: str | None = None
    caption_column: str | None = None


@dataclass
class IndexPart:
    """The images of a folder, or of one archive in it."""

    rows: ImageRows
    """The usable images; names are relative to the directory's path."""
    container: Container | None
    table: FileTable
    """Where the rows are stored."""
    usable: np.ndarray
    """Which rows of the table these are (bool)."""


@dataclass
class DirectoryIndex:
    """The contents of a directory."""

    parts: list[IndexPart] = field(default_factory=list)
    bad_files: list[BadFile] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    others: list[str] = field(default_factory=list)
    """For masks and control images: files that are not images."""


class DirectoryIndexer:
    """Indexes directories; what is read from their files is stored in `files`."""

    def __init__(self, readers: Readers, files: FileIndex) -> None:
        self._readers, self._files = readers, files

    def index(self, path: Path, settings: IndexSettings, excluded: Sequence[Path] = ()) -> DirectoryIndex:
        """Indexes a folder, without the subfolders in `excluded`, or a single archive."""
        index = DirectoryIndex()
        if path.is_file():
            self._add_archive(index, path, "", settings)
            return index
        scan = scan_directory(path, recursive=settings.recursive, excluded=excluded)
        index.bad_files += scan.bad_files
        tables: list[CaptionTable] = []
        if settings.has_captions:
            tables = [_caption_table_at(path / name) for name in scan.tables]
            for name in _without_img2dataset_logs(scan.archives):
                tables += self._add_archive(index, path, name, settings)
        else:
            index.others = [*scan.texts.names, *scan.archives, *scan.tables, *scan.others]
        captions = CaptionSources(path, scan.texts, tables, per_line=settings.caption_per_line)
        self._add_files(index, path, scan, captions, settings)
        return index

    def _table(self, path: Path, settings: IndexSettings) -> FileTable:
        return self._files.table(content_key(str(path.absolute()), json.dumps(asdict(settings), sort_keys=True)).hex())

    # --- images in files of their own ------------------------------------------------------------------------------

    def _add_files(
        self, index: DirectoryIndex, folder: Path, scan: DirectoryScan, captions: CaptionSources, settings: IndexSettings
    ) -> None:
        table = self._table(folder, settings)
        old, header = load_rows(table) or (None, {})
        tables = [[str(source.path), list(source.stamp)] for source in captions.tables]
        same_tables = header.get("tables") == tables
        elsewhere = header.get("elsewhere", []) if same_tables else captions.named_images()
        inside = set(scan.images.names)
        elsewhere = [name for name in elsewhere if name not in inside]
        files = merge_files(scan.images, stat_files(folder, elsewhere)) if elsewhere else scan.images
        rows = unread_rows(Texts.of(files.names), files.stamps, captions.stamps_of(files.names), files.file_ids)
        if old is not None:
            rows = carry_over(rows, old, captions_too=same_tables)

        def file_of(row: int) -> ImageFile:
            return ImageFile(folder / files.names[row])

        def captions_of(row: int) -> list[str] | BadFile:
            return captions.captions_of(files.names[row])

        bad_files: list[BadFile] = []
        was_read = self._read_missing(rows, file_of, captions_of if settings.has_captions else None, bad_files)
        # Messages show only the first bad files: an unreadable table comes before the images that lack its captions.
        index.bad_files += captions.bad_tables + bad_files
        if settings.has_captions:
            index.warnings += captions.warnings(files.names) + _scan_warnings(folder, scan)
        if was_read or old is None or not same_tables or not _same_files(rows, old):
            same_names = same_tables and old is not None and rows.names == old.names
            unmatched = header["nameless"] if same_names else captions.unmatched_entries(files.names)
            # An unreadable table is tried again at the next start.
            header = {"tables": None if captions.bad_tables else tables, "elsewhere": elsewhere, "nameless": unmatched}
            save_rows(table, rows, header)
        if header["nameless"]:
            count, entries = len(header["nameless"]), first_few(header["nameless"])
            index.warnings.append(f"{folder}: {count} entries of caption tables match no image: {entries}")
        usable = _usable(rows, settings)
        index.parts.append(IndexPart(rows.where(usable), None, table, usable))

    def _read_missing(
        self,
        rows: ImageRows,
        file_of: Callable[[int], ImageFile],
        captions_of: CaptionReader | None,
        bad_files: list[BadFile],
    ) -> bool:
        """Reads missing sizes and captions; appends unreadable files to `bad_files`. Returns whether anything was read."""
        unread = np.flatnonzero(rows.sizes[:, 0] == UNREAD)
        sizes = self._read_sizes([file_of(row) for row in unread.tolist()], bad_files)
        rows.sizes[unread] = sizes
        new_captions: dict[int, list[str]] = {}
        if captions_of is not None:
            uncaptioned = np.flatnonzero(rows.caption_counts == 0).tolist()
            with ThreadPoolExecutor(CAPTION_THREADS) as pool:
                for row, result in zip(uncaptioned, pool.map(captions_of, uncaptioned), strict=True):
                    if isinstance(result, BadFile):
                        bad_files.append(result)
                    else:
                        new_captions[row] = result
            add_captions(rows, new_captions)
        return bool(sizes.any()) or bool(new_captions)

    def _read_sizes(self, files: Sequence[ImageFile], bad_files: list[BadFile]) -> np.ndarray:
        """Returns the width and height of each file, (n, 2) int32 in pixels; UNREAD for unreadable files."""
        batches = [files[start : start + FILES_AT_ONCE] for start in range(0, len(files), FILES_AT_ONCE)]
        futures = [self._readers.sizes(batch) for batch in batches]
        sizes = np.full((len(files), 2), UNREAD, np.int32)
        for index, result in enumerate(result for future in futures for result in future.result()):
            if isinstance(result, str):
                bad_files.append(BadFile(Path(str(files[index])), result))
            else:
                sizes[index] = result
        return sizes

    # --- archives ----------------------------------------------------------------------------------------------------

    def _add_archive(self, index: DirectoryIndex, folder: Path, name: str, settings: IndexSettings) -> list[CaptionTable]:
        """Adds the images in an archive. A .parquet file that only has image paths becomes a caption table instead."""
        path = folder / name if name else folder
        table = self._table(path, settings)
        try:
            stamp = stamp_of(path)
            rows, header = load_rows(table) or (None, {})
            is_stored = rows is not None and header.get("stamp") == list(stamp)
            if rows is None or not is_stored:
                contents = _read_archive(path, settings, self._readers)
                rows, header = _rows_from(contents, path, stamp), _header_from(contents, stamp)
        except BadFile as bad:
            index.bad_files.append(bad)
            return []
        except OSError as error:
            index.bad_files.append(BadFile(path, f"cannot be read: {error.strerror}"))
            return []
        index.bad_files += [BadFile(Path(bad_path), reason) for bad_path, reason in header["bad_files"]]
        if header["others"]:
            index.warnings.append(f"{path}: {header['others']} members are neither images nor captions")
        if header["only_names"]:
            if not is_stored:
                save_rows(table, rows, header)
            return [CaptionTable(path, stamp, lambda: _caption_table_of(rows))]
        container = Container(str(path), name, header["column"])
        names = list(rows.names)

        def file_of(row: int) -> ImageFile:
            return ImageFile(path, container.column or names[row], int(rows.start[row]), int(rows.length[row]))

        def captions_of(row: int) -> BadFile:
            return BadFile(Path(str(file_of(row))), "has no caption in the archive")

        if self._read_missing(rows, file_of, captions_of, index.bad_files) or not is_stored:
            save_rows(table, rows, header)
        usable = _usable(rows, settings)
        prefixed = replace(rows, names=Texts.of(f"{name}/{member}" for member in names)) if name else rows
        index.parts.append(IndexPart(prefixed.where(usable), container, table, usable))
        return []


def _without_img2dataset_logs(archives: Sequence[str]) -> list[str]:
    """Drops the .parquet files that img2dataset writes beside each .tar file; they describe its contents."""
    tars = {name.removesuffix(".tar") for name in archives if name.endswith(".tar")}
    return [name for name in archives if name.removesuffix(TABLE_SUFFIX) not in tars]


def _same_files(rows: ImageRows, old: ImageRows) -> bool:
    if len(rows) != len(old) or rows.names != old.names:
        return False
    return bool((rows.stamps == old.stamps).all() and (rows.caption_stamps == old.caption_stamps).all())


def _usable(rows: ImageRows, settings: IndexSettings) -> np.ndarray:
    has_size = rows.sizes[:, 0] != UNREAD
    return has_size & (rows.caption_counts > 0) if settings.has_captions else has_size


def _caption_table_at(path: Path) -> CaptionTable:
    return CaptionTable(path, stamp_of(path), lambda: read_caption_table(path))


def _scan_warnings(folder: Path, scan: DirectoryScan) -> list[str]:
    warnings = []
    if scan.folders:
        warnings.append(
            f"{folder}: subfolders are skipped (set recursive = true to include them): {first_few(scan.folders)}"
        )
    if scan.others:
        warnings.append(f"{folder}: {len(scan.others)} files are neither images nor captions: {first_few(scan.others)}")
    return warnings


@dataclass(frozen=True)
class _Contents:
    """The contents of an archive."""

    entries: list[ArchiveEntry]
    column: str
    bad_files: list[BadFile]
    num_others: int


def _read_archive(path: Path, settings: IndexSettings, readers: Readers) -> _Contents:
    """Lists an archive. Raises BadFile if it cannot be read at all."""
    if path.suffix.lower() == TABLE_SUFFIX:
        entries, column, bad_files = readers.parquet(path, settings.image_column, settings.caption_column).result()
        if len({entry.start == NOT_INSIDE for entry in entries}) > 1:
            raise BadFile(path, "has image bytes in some rows and only paths in others; split it into two files")
        return _Contents(entries, column, bad_files, 0)
    entries, bad_files, others = list_tar(path, caption_per_line=settings.caption_per_line)
    return _Contents(entries, "", bad_files, len(others))


def _rows_from(contents: _Contents, path: Path, stamp: Stamp) -> ImageRows:
    """Returns rows with the position and captions of each image of an archive; sizes and hashes are not known yet."""
    entries, count = contents.entries, len(contents.entries)
    zeros = np.zeros((count, 3), np.int64)
    start = np.fromiter((entry.start for entry in entries), np.int64, count)
    file_ids = start + int.from_bytes(content_key(str(path.resolve()))[:7], "little")
    rows = unread_rows(Texts.of(entry.name for entry in entries), zeros + np.array(stamp), zeros, file_ids)
    rows.start, rows.length = start, np.fromiter((entry.length for entry in entries), np.int64, count)
    set_captions(rows, [entry.captions or [] for entry in entries])
    return rows


def _header_from(contents: _Contents, stamp: Stamp) -> dict[str, Any]:
    return {
        "stamp": list(stamp),
        "column": contents.column,
        "bad_files": [(str(bad.path), bad.reason) for bad in contents.bad_files],
        "others": contents.num_others,
        "only_names": bool(contents.entries) and contents.entries[0].start == NOT_INSIDE,
    }


def _caption_table_of(rows: ImageRows) -> dict[str, list[str]]:
    texts, bounds = list(rows.captions), rows.first_caption.tolist()
    return {name: texts[bounds[row] : bounds[row + 1]] for row, name in enumerate(rows.names)}
