"""What .parquet files hold: the row of each image, and its captions.

A .parquet file has an image in each row: its bytes, plain or in a struct as Hugging Face writes them, or its path. Only
captions and paths are read; the bytes are not, unless the file does not tell in which rows there are none.

Of some damaged files pyarrow does not raise an error but ends the process. So this is called in a reader process, which may.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from utils.data.sources.archive_entries import NOT_INSIDE, ArchiveEntry, check_regular
from utils.data.sources.captions import CAPTION_KEYS, as_captions, quoted
from utils.data.sources.decoding import BadFile

_MAX_COLUMNS_SHOWN = 20
_BYTES_COLUMNS = ("image", "jpg", "jpeg", "png", "webp", "bytes", "image_bytes")
_PATH_COLUMNS = ("image", "image_path", "path", "file_name")


def list_parquet(
    path: Path, image_column: str | None, caption_column: str | None
) -> tuple[list[ArchiveEntry], str, list[BadFile]]:
    """Images by row; the column they are in; rows that cannot be used.

    Where no column is named, the first usable one of the usual names is taken; without one for captions there are none.
    Raises BadFile for what is no .parquet file or lacks a column, and if pyarrow is not installed.
    """
    check_regular(path)
    try:
        from pyarrow import parquet  # an optional requirement, and slow to import
    except ImportError as error:
        raise BadFile(path, "needs pyarrow to be read: pip install pyarrow") from error
    found: list[ArchiveEntry] = []
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
    leaves = [(name, *_image_leaves(schema, name)) for name in names]
    best = next((leaf for leaf in leaves if leaf[1]), None) or next((leaf for leaf in leaves if leaf[2]), None)
    if best is None:
        what = f"column {quoted(image_column)} with images or paths" if image_column is not None else "column of images"
        raise _WrongColumns(f"has no {what}; its columns are {there}")
    usual = (name for name in CAPTION_KEYS if name != best[0] and _has_captions(schema, name))
    captions = caption_column if caption_column is not None else next(usual, None)
    if captions is not None and not _has_captions(schema, captions):
        raise _WrongColumns(f"has no column {quoted(captions)} with strings or lists of strings; its columns are {there}")
    return _Columns(*best, captions)


def _described(schema: Any) -> str:
    """Names and types of columns for a message."""
    columns = [f"{quoted(name)} ({str(kind)[:40]})" for name, kind in zip(schema.names, schema.types, strict=True)]
    rest = f" and {len(columns) - _MAX_COLUMNS_SHOWN} more" if len(columns) > _MAX_COLUMNS_SHOWN else ""
    return (", ".join(columns[:_MAX_COLUMNS_SHOWN]) or "none") + rest


def _image_leaves(schema: Any, name: str) -> tuple[str | None, str | None]:
    """Where a column of images has bytes, and where paths; None where it has not."""
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


def _found_in_row(number: int, row: _Row) -> ArchiveEntry:
    """Raises ValueError for a row that cannot be used, with the reason."""
    captions = None if row.captions is None else as_captions(row.captions)
    if row.has_bytes:
        return ArchiveEntry(str(number), number, 0, captions)
    if not row.path:
        raise ValueError("has no image")
    if "://" in row.path:
        raise ValueError(f"has an address, {quoted(row.path)}: images are not downloaded")
    return ArchiveEntry(row.path, NOT_INSIDE, 0, captions)


def _paths(column: Any) -> list[str | None]:
    """Paths of a column of strings, or of a struct of which nothing else was read."""
    from pyarrow import types

    values = column.to_pylist()
    return [value and value["path"] for value in values] if types.is_struct(column.type) else values


def _have_bytes(table: Any, group: int, leaf: str) -> list[bool]:
    """Of each row whether the image's bytes are there; they are read only where the file's statistics do not tell."""
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
