"""What .tar and .parquet files hold: the place of each picture, and its captions. Nothing is unpacked.

A .tar is read as webdataset reads it: members are of one sample when their names are equal up to the first dot behind the
last slash ("000/fox.jpg", "000/fox.txt"), wherever they stand in the archive. Only headers and captions are read. Of a
damaged or unfinished archive, what stands before the damage is used.

A .parquet file has a picture in each row: its bytes, plain or in a struct as Hugging Face writes them, or its path. Only
captions and paths are read, the bytes are not.
"""

from __future__ import annotations

import io
import os
import stat
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from utils.data.sources.captions import (
    CAPTION_KEYS,
    as_captions,
    caption_key,
    captions_of,
    decode_text,
    parse_json,
    shown,
    split_lines,
)
from utils.data.sources.images import IMAGE_SUFFIXES, BadFile

NOT_INSIDE = -1
"""`Found.start` of a picture that is a file of its own."""
_CAPTION_SUFFIXES = (".txt", ".json")
_MAX_CAPTION_BYTES = 2**20
_MAX_HEADER_BYTES = 2**20
_MAX_PADDING_BYTES = 2**20  # zeros behind the end mark; tar fills up to 10 KiB
_COMPRESSED = (b"\x1f\x8b", b"BZh", b"\xfd7zXZ\x00", b"\x28\xb5\x2f\xfd")  # gzip, bzip2, xz, zstandard
_MAX_COLUMNS_SHOWN = 20
_BYTES_COLUMNS = ("image", "jpg", "jpeg", "png", "webp", "bytes", "image_bytes")
_PATH_COLUMNS = ("image", "image_path", "path", "file_name")


class Found(NamedTuple):
    """One picture in an archive or a table."""

    name: str
    """A .tar's member; number of the row in a .parquet file; or a path from the .parquet file's folder."""
    start: int
    """First byte of the member's content; number of the row; NOT_INSIDE for a path."""
    length: int
    """Bytes of the member; 0 for others."""
    captions: list[str] | None
    """None if it has none."""


def _check_regular(path: Path) -> None:
    try:
        status = path.stat()
    except OSError as error:
        raise BadFile(path, f"cannot be read: {error.strerror}") from error
    if not stat.S_ISREG(status.st_mode):
        raise BadFile(path, "is not a regular file")
    if not status.st_size:
        raise BadFile(path, "is empty (0 bytes)")


# --- .tar --------------------------------------------------------------------------------------------------------------


def list_tar(path: Path, *, caption_per_line: bool) -> tuple[list[Found], list[BadFile], list[str]]:
    """Pictures in the archive's order; what cannot be used; names of members of no picture.

    A picture's caption is the .txt file of its name or of its sample, else the .json file with one of CAPTION_KEYS. Hidden
    members are passed over. Raises BadFile for what is no archive, or is one that was compressed.
    """
    _check_regular(path)
    members = _Members(path)
    try:
        with _HeaderFile(path) as file:
            _check_beginning(path, os.pread(file.fileno(), tarfile.BLOCKSIZE, 0))
            try:
                for header in _headers(file):
                    members.add(header)
            except ValueError as error:
                members.refuse("", f"{error} after {len(members.pictures)} pictures")
            found = list(members.with_captions(file.fileno(), caption_per_line))
    except OSError as error:
        raise BadFile(path, f"cannot be read: {error.strerror}") from error
    return found, members.bad, members.of_no_picture()


class _HeaderFile(io.FileIO):
    """A .tar file for tarfile to read headers from; without a buffer, which would read content with each."""

    ran_out = False

    def read(self, size: int | None = -1, /) -> bytes:
        if size is None or not 0 <= size <= _MAX_HEADER_BYTES:  # only damage asks for it, and it would be allocated
            raise ValueError(f"a header of {size} bytes")
        content = super().read(size)
        self.ran_out = self.ran_out or len(content) < size
        return content


def _headers(file: _HeaderFile) -> Iterator[tarfile.TarInfo]:
    """Each member whose content is there to its end. Raises ValueError where the archive is cut off or damaged."""
    size = os.fstat(file.fileno()).st_size
    reached = 0
    try:
        with tarfile.open(fileobj=file, mode="r:", encoding="utf-8") as tar:
            while (header := tar.next()) is not None:
                tar.members = []  # type: ignore[attr-defined]  # it would keep a kilobyte for each
                if tar.offset <= reached:  # a negative size would have it read the same members for ever
                    raise ValueError("a negative size")
                if header.isreg() and header.sparse is None and header.offset_data + header.size > size:
                    file.ran_out = True
                    raise ValueError("content is missing")
                reached = tar.offset
                yield header
            reached = tar.offset
    except (MemoryError, OSError):
        raise
    except Exception as error:  # damaged headers make tarfile raise whatever they like
        raise ValueError("is cut off" if file.ran_out else f"is damaged at byte {reached}") from error
    _check_end(file, reached)


def _check_end(file: _HeaderFile, end: int) -> None:
    """tarfile ends without a word where a header is damaged or missing. Raises ValueError."""
    if file.ran_out:
        raise ValueError("is cut off")
    padding = os.pread(file.fileno(), _MAX_PADDING_BYTES, end)
    if any(padding[: tarfile.BLOCKSIZE]):
        raise ValueError(f"is damaged at byte {end}")
    if any(padding):
        raise ValueError(f"has an end mark at byte {end} and more behind it, which is not read (joined by cat?),")


def _check_beginning(path: Path, block: bytes) -> None:
    """Raises BadFile for what tarfile cannot begin with; a block of zeros ends an archive of nothing."""
    if block.startswith(_COMPRESSED):
        raise BadFile(path, "is compressed: members cannot be read in place; unpack it")
    if len(block) == tarfile.BLOCKSIZE and not any(block):
        return
    try:
        tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
    except (tarfile.TarError, ValueError) as error:
        raise BadFile(path, "is not a .tar file") from error


@dataclass
class _Members:
    """What an archive's headers tell."""

    archive: Path
    pictures: dict[str, Found] = field(default_factory=dict)
    """By what members of a sample have in common."""
    captions: dict[str, tuple[str, int, int]] = field(default_factory=dict)
    """Name with its suffix in small letters -> name, first byte, bytes."""
    others: list[str] = field(default_factory=list)
    """Names of all but pictures."""
    bad: list[BadFile] = field(default_factory=list)

    def add(self, header: tarfile.TarInfo) -> None:
        name = header.name
        if header.isdir() or name.rpartition("/")[2].startswith("."):
            return
        stem, suffix = _split(name)
        is_picture = suffix in IMAGE_SUFFIXES
        if not is_picture:
            self.others.append(name)
            if suffix not in _CAPTION_SUFFIXES:
                return
        reason = _unreadable(header)
        if reason:
            self.refuse(name, reason)
        elif is_picture:
            found = Found(name, header.offset_data, header.size, None)
            first = self.pictures.setdefault(_key(name), found)
            if first is not found:
                self.refuse(name, f"shares its name up to the first dot with {shown(first.name)}: one sample, one picture")
        elif self.captions.setdefault(stem + suffix, place := (name, header.offset_data, header.size)) is not place:
            self.refuse(name, "is there twice")

    def refuse(self, name: str, reason: str) -> None:
        self.bad.append(BadFile(Path(f"{self.archive}/{name}"), reason))  # joined by "/", an absolute name would stand alone

    def with_captions(self, descriptor: int, caption_per_line: bool) -> Iterator[Found]:
        """The pictures but those whose caption cannot be read."""
        for key, picture in self.pictures.items():
            places = [
                self.captions[stem + suffix]
                for suffix in _CAPTION_SUFFIXES
                for stem in dict.fromkeys((_split(picture.name)[0], key))
                if stem + suffix in self.captions
            ]
            captions = None
            try:
                for name, start, length in places:
                    captions = _read_captions(descriptor, name, start, length, caption_per_line)
                    if captions is not None:
                        break
            except ValueError as error:
                self.refuse(name, str(error))
                continue
            yield picture._replace(captions=captions)

    def of_no_picture(self) -> list[str]:
        return [name for name in self.others if _key(name) not in self.pictures]


def _split(name: str) -> tuple[str, str]:
    """Name up to its last dot; the rest in small letters."""
    stem, dot, suffix = name.rpartition(".")
    return (stem, f".{suffix.lower()}") if dot and "/" not in suffix else (name, "")


def _key(name: str) -> str:
    """Name up to the first dot behind the last slash: what members of one sample have in common."""
    folder, slash, last = name.rpartition("/")
    return folder + slash + last.partition(".")[0]


def _unreadable(header: tarfile.TarInfo) -> str:
    """Why the member's content does not stand in the archive as it is; empty if it does."""
    if header.islnk() or header.issym():
        return f"is a link to {shown(header.linkname)}: the archive must have the file itself"
    if header.sparse is not None:
        return "is stored with its zeros left out (sparse) and cannot be read in place"
    return "" if header.isreg() else f"is no file, but a member of type {header.type!r}"


def _read_captions(descriptor: int, name: str, start: int, length: int, caption_per_line: bool) -> list[str] | None:
    """Captions of a .txt or .json member; None if there are none in it. Raises ValueError with the reason."""
    if length > _MAX_CAPTION_BYTES:
        raise ValueError(f"has {length} bytes: a caption's file may have {_MAX_CAPTION_BYTES}")
    content = os.pread(descriptor, length, start)
    if len(content) < length:
        raise ValueError("is cut off")
    text = decode_text(content)
    if _split(name)[1] == ".txt":
        return split_lines(text) if caption_per_line else [text.strip()]
    entry = parse_json(text)
    return captions_of(entry) if isinstance(entry, dict) and caption_key(entry) is not None else None


# --- .parquet ----------------------------------------------------------------------------------------------------------


def list_parquet(
    path: Path, image_column: str | None, caption_column: str | None
) -> tuple[list[Found], str, list[BadFile]]:
    """Pictures by row; the column they are in; rows that cannot be used.

    Where no column is named, the first usable one of the usual names is taken; without one for captions there are none.
    Raises BadFile for what is no .parquet file or lacks a column, and if pyarrow is not installed.
    """
    _check_regular(path)
    try:
        from pyarrow import parquet  # an optional requirement, and slow to import
    except ImportError as error:
        raise BadFile(path, "needs pyarrow to be read: pip install pyarrow") from error
    found: list[Found] = []
    bad: list[BadFile] = []
    try:
        with parquet.ParquetFile(path) as table:
            columns = _choose_columns(table.schema_arrow, image_column, caption_column)
            for number, row in enumerate(_rows(table, columns)):
                try:
                    found.append(_found_in_row(number, row))
                except ValueError as error:
                    bad.append(BadFile(path / f"row {number}", str(error)))
    except _WrongColumns as error:
        raise BadFile(path, str(error)) from error
    except MemoryError:
        raise
    except Exception as error:  # damage makes pyarrow raise errors of many kinds
        raise BadFile(path, f"cannot be read as a .parquet file: {' '.join(str(error).split())}") from error
    return found, columns.images, bad


class _WrongColumns(Exception):
    """A column is missing, or has another type than it must have."""


class _Columns(NamedTuple):
    images: str
    bytes_leaf: str | None
    """The column in the file that has the bytes; None if there are paths only. So for the next."""
    path_leaf: str | None
    captions: str | None


def _choose_columns(schema: Any, image_column: str | None, caption_column: str | None) -> _Columns:
    """The columns to read of a table of pyarrow's. Raises _WrongColumns."""
    there = _described(schema)
    names = (image_column,) if image_column is not None else (*_BYTES_COLUMNS, *_PATH_COLUMNS)
    leaves = [(name, *_picture_leaves(schema, name)) for name in names]
    best = next((leaf for leaf in leaves if leaf[1]), None) or next((leaf for leaf in leaves if leaf[2]), None)
    if best is None:
        what = f"column {shown(image_column)} with pictures or paths" if image_column is not None else "column of pictures"
        raise _WrongColumns(f"has no {what}; its columns are {there}")
    usual = (name for name in CAPTION_KEYS if name != best[0] and _has_captions(schema, name))
    captions = caption_column if caption_column is not None else next(usual, None)
    if captions is not None and not _has_captions(schema, captions):
        raise _WrongColumns(f"has no column {shown(captions)} with strings or lists of strings; its columns are {there}")
    return _Columns(*best, captions)


def _described(schema: Any) -> str:
    """Names and types of columns for a message."""
    columns = [f"{shown(name)} ({str(kind)[:40]})" for name, kind in zip(schema.names, schema.types, strict=True)]
    rest = f" and {len(columns) - _MAX_COLUMNS_SHOWN} more" if len(columns) > _MAX_COLUMNS_SHOWN else ""
    return (", ".join(columns[:_MAX_COLUMNS_SHOWN]) or "none") + rest


def _picture_leaves(schema: Any, name: str) -> tuple[str | None, str | None]:
    """Where a column of pictures has bytes, and where paths; None where it has not."""
    from pyarrow import types

    if schema.get_field_index(name) < 0:
        return None, None
    kind = schema.field(name).type
    leaves = {name: kind}
    if types.is_struct(kind):
        leaves = {f"{name}.{part.name}": part.type for part in kind if part.name in ("bytes", "path")}
    with_bytes = (leaf for leaf, part in leaves.items() if types.is_binary(part) or types.is_large_binary(part))
    with_paths = (leaf for leaf, part in leaves.items() if types.is_string(part) or types.is_large_string(part))
    return next(with_bytes, None), next(with_paths, None)


def _has_captions(schema: Any, name: str) -> bool:
    """Whether there is such a column, of strings or lists of strings."""
    from pyarrow import types

    if schema.get_field_index(name) < 0:
        return False
    kind = schema.field(name).type
    if types.is_list(kind) or types.is_large_list(kind):
        kind = kind.value_type
    if types.is_dictionary(kind):
        kind = kind.value_type
    return types.is_string(kind) or types.is_large_string(kind) or types.is_null(kind)


class _Row(NamedTuple):
    has_bytes: bool
    path: str | None
    captions: object


def _rows(table: Any, columns: _Columns) -> Iterator[_Row]:
    """The table's rows, read a row group at a time."""
    names = [name for name in (columns.path_leaf, columns.captions) if name is not None]
    for group in range(table.num_row_groups):
        num_rows = table.metadata.row_group(group).num_rows
        read = table.read_row_group(group, columns=names, use_threads=False)
        paths = _paths(read.column(columns.images)) if columns.path_leaf is not None else [None] * num_rows
        captions = read.column(columns.captions).to_pylist() if columns.captions is not None else [None] * num_rows
        have_bytes = _have_bytes(table, group, columns.bytes_leaf) if columns.bytes_leaf is not None else [False] * num_rows
        yield from map(_Row, have_bytes, paths, captions)


def _found_in_row(number: int, row: _Row) -> Found:
    """Raises ValueError for a row that cannot be used, with the reason."""
    captions = None if row.captions is None else as_captions(row.captions)
    if row.has_bytes:
        return Found(str(number), number, 0, captions)
    if not row.path:
        raise ValueError("has no picture")
    if "://" in row.path:
        raise ValueError(f"has an address, {shown(row.path)}: pictures are not downloaded")
    return Found(row.path, NOT_INSIDE, 0, captions)


def _paths(column: Any) -> list[str | None]:
    """Paths of a column of strings, or of a struct of which nothing else was read."""
    from pyarrow import types

    values = column.to_pylist()
    return [value and value["path"] for value in values] if types.is_struct(column.type) else values


def _have_bytes(table: Any, group: int, leaf: str) -> list[bool]:
    """Of each row whether the picture's bytes are there; they are read only where the file's statistics do not tell."""
    from pyarrow import compute, types

    about = table.metadata.row_group(group)
    chunk = next(about.column(index) for index in range(about.num_columns) if about.column(index).path_in_schema == leaf)
    statistics = chunk.statistics
    if statistics is not None and statistics.has_null_count and statistics.null_count in (0, about.num_rows):
        return [statistics.null_count == 0] * about.num_rows
    there: list[bool] = []
    for batch in table.iter_batches(batch_size=64, row_groups=[group], columns=[leaf], use_threads=False):
        values = batch.column(0)
        if types.is_struct(values.type):
            values = compute.struct_field(values, 0)
        there.extend(values.is_valid().to_pylist())
    return there
