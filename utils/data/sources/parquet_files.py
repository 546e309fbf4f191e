"""Lists the images of .parquet files: row and captions of each.

Each row of a .parquet file has one image: its bytes, plain or in a struct as written by Hugging Face datasets, or its path.
Only captions and paths are read. The bytes are read only if the file's statistics do not specify which rows have none.

Some damaged files make pyarrow terminate the process instead of raising an error, so this code runs in a reader process.
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
    """Returns the images by row, the column that contains them, and the unusable rows.

    A column that is None is chosen by the usual names: the first usable one; without a caption column there are no captions.
    Raises BadFile for an invalid .parquet file, a missing column, and if pyarrow is not installed.
    """
    check_regular(path)
    try:
        from pyarrow import parquet  # an optional dependency, and slow to import
    except ImportError as error:
        raise BadFile(path, "requires pyarrow: pip install pyarrow") from error
    entries: list[ArchiveEntry] = []
    bad: list[BadFile] = []
    try:
        with parquet.ParquetFile(path) as table:
            columns = _choose_columns(table.schema_arrow, image_column, caption_column)
            for number, row in enumerate(_rows(table, columns)):
                try:
                    entries.append(_entry_of_row(number, row))
                except ValueError as error:
                    bad.append(BadFile(path / f"row {number}", str(error)))
    except _WrongColumns as error:
        raise BadFile(path, str(error)) from error
    except MemoryError:
        raise
    except Exception as error:  # damaged files make pyarrow raise arbitrary exceptions
        raise BadFile(path, f"cannot be read as a .parquet file: {' '.join(str(error).split())}") from error
    return entries, columns.images, bad


class _WrongColumns(Exception):
    """A column is missing or has the wrong type."""


class _Columns(NamedTuple):
    images: str
    bytes_leaf: str | None
    """Path of the leaf column with the bytes; None if there are only paths. Likewise for the paths below."""
    path_leaf: str | None
    captions: str | None


def _choose_columns(schema: Any, image_column: str | None, caption_column: str | None) -> _Columns:
    """Chooses the columns to read from a pyarrow schema. Raises _WrongColumns."""
    existing = _described(schema)
    names = (image_column,) if image_column is not None else (*_BYTES_COLUMNS, *_PATH_COLUMNS)
    leaves = [(name, *_image_leaves(schema, name)) for name in names]
    best = next((leaf for leaf in leaves if leaf[1]), None) or next((leaf for leaf in leaves if leaf[2]), None)
    if best is None:
        what = f"column {quoted(image_column)} with images or paths" if image_column is not None else "column of images"
        raise _WrongColumns(f"has no {what}; its columns are {existing}")
    usual = (name for name in CAPTION_KEYS if name != best[0] and _has_captions(schema, name))
    captions = caption_column if caption_column is not None else next(usual, None)
    if captions is not None and not _has_captions(schema, captions):
        raise _WrongColumns(f"has no column {quoted(captions)} with strings or lists of strings; its columns are {existing}")
    return _Columns(*best, captions)


def _described(schema: Any) -> str:
    """Formats names and types of the columns for a message."""
    columns = [f"{quoted(name)} ({str(kind)[:40]})" for name, kind in zip(schema.names, schema.types, strict=True)]
    rest = f" and {len(columns) - _MAX_COLUMNS_SHOWN} more" if len(columns) > _MAX_COLUMNS_SHOWN else ""
    return (", ".join(columns[:_MAX_COLUMNS_SHOWN]) or "none") + rest


def _image_leaves(schema: Any, name: str) -> tuple[str | None, str | None]:
    """Returns the leaf columns of an image column that contain bytes and paths; None where there are none."""
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
    """Returns whether there is a column of this name with strings or lists of strings."""
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
    """Yields the table's rows, reading one row group at a time."""
    names = [name for name in (columns.path_leaf, columns.captions) if name is not None]
    for group in range(table.num_row_groups):
        num_rows = table.metadata.row_group(group).num_rows
        read = table.read_row_group(group, columns=names, use_threads=False)
        paths = _paths(read.column(columns.images)) if columns.path_leaf is not None else [None] * num_rows
        captions = read.column(columns.captions).to_pylist() if columns.captions is not None else [None] * num_rows
        have_bytes = _have_bytes(table, group, columns.bytes_leaf) if columns.bytes_leaf is not None else [False] * num_rows
        yield from map(_Row, have_bytes, paths, captions)


def _entry_of_row(number: int, row: _Row) -> ArchiveEntry:
    """Converts a row to an entry. Raises ValueError with the reason for a row that cannot be used."""
    captions = None if row.captions is None else as_captions(row.captions)
    if row.has_bytes:
        return ArchiveEntry(str(number), number, 0, captions)
    if not row.path:
        raise ValueError("has no image")
    if "://" in row.path:
        raise ValueError(f"has a URL, {quoted(row.path)}: images are not downloaded")
    return ArchiveEntry(row.path, NOT_INSIDE, 0, captions)


def _paths(column: Any) -> list[str | None]:
    """Returns the paths in a column of strings, or of structs of which only `path` was read."""
    from pyarrow import types

    values = column.to_pylist()
    return [value and value["path"] for value in values] if types.is_struct(column.type) else values


def _have_bytes(table: Any, group: int, leaf: str) -> list[bool]:
    """Returns for each row whether it has image bytes; reads the bytes only if the file's statistics are not sufficient."""
    from pyarrow import compute, types

    metadata = table.metadata.row_group(group)
    chunks = (metadata.column(index) for index in range(metadata.num_columns))
    chunk = next(chunk for chunk in chunks if chunk.path_in_schema == leaf)
    statistics = chunk.statistics
    if statistics is not None and statistics.has_null_count and statistics.null_count in (0, metadata.num_rows):
        return [statistics.null_count == 0] * metadata.num_rows
    have_bytes: list[bool] = []
    for batch in table.iter_batches(batch_size=64, row_groups=[group], columns=[leaf], use_threads=False):
        values = batch.column(0)
        if types.is_struct(values.type):
            values = compute.struct_field(values, 0)
        have_bytes.extend(values.is_valid().to_pylist())
    return have_bytes
