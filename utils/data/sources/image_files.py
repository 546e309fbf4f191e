"""Locates and reads the bytes of an image: a separate file, or a part of a .tar or .parquet file, which is never unpacked.

Files that are missing or truncated raise OSError with the reason in its `strerror`.
"""

from __future__ import annotations

import errno
import os
import stat
from bisect import bisect_right
from dataclasses import dataclass
from functools import lru_cache
from io import BytesIO
from itertools import accumulate
from pathlib import Path
from typing import Any, BinaryIO

TABLE_SUFFIX = ".parquet"
_BYTES_FIELD = "bytes"  # the field of an image's struct in Hugging Face datasets


@dataclass(frozen=True, slots=True, order=True)
class ImageFile:
    """The location of an image's bytes: a file, or a part of a .tar or .parquet file."""

    path: Path
    member: str = ""
    """Empty for a separate file; the member name in a .tar file; the column name in a .parquet file."""
    start: int = 0
    """First byte of the member's content in a .tar file; row number in a .parquet file."""
    length: int = 0
    """Size of the member in bytes in a .tar file; otherwise 0."""

    def __str__(self) -> str:
        if not self.member:
            return str(self.path)
        return f"{self.path}/row {self.start}" if self._is_in_table() else f"{self.path}/{self.member}"

    def read(self) -> bytes:
        """Reads all bytes of the image. Raises OSError."""
        if not self.member:
            with self.open() as file:
                return file.read()
        if self._is_in_table():
            return _read_row(self.path, self.member, self.start)
        return _read_range(self.path, self.start, self.length)

    def open(self) -> BinaryIO:
        """Opens the image's bytes as a binary file that contains nothing else. Raises OSError."""
        return BytesIO(self.read()) if self.member else _open_regular(self.path)

    def _is_in_table(self) -> bool:
        return self.path.suffix.lower() == TABLE_SUFFIX


def _open_regular(path: Path) -> BinaryIO:
    # Non-blocking: opening a named pipe would otherwise wait for a writer.
    file = open(path, "rb", opener=lambda name, flags: os.open(name, flags | os.O_NONBLOCK))
    if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
        file.close()
        raise OSError(errno.EINVAL, "Not a regular file", str(path))
    return file


def _read_range(path: Path, start: int, length: int) -> bytes:
    """Reads bytes start to start + length. Raises OSError if some are missing."""
    with _open_regular(path) as file:
        available = os.fstat(file.fileno()).st_size - start
        if available >= length:  # an impossible length must not be allocated
            file.seek(start)
            content = file.read(length)
            available = len(content)
    if available < length:
        message = f"{path.name} is truncated: {max(0, available)} of {length} bytes exist"
        raise OSError(errno.EIO, message, str(path))
    return content


# --- .parquet files ----------------------------------------------------------------------------------------------------


def _read_row(path: Path, column: str, row: int) -> bytes:
    status = path.stat()
    stamp = (status.st_size, status.st_mtime_ns, status.st_ino)  # so that a replaced file is not served from the cache
    try:
        ends = _row_group_ends(path, stamp)
        group = bisect_right(ends, row)
        first = ends[group - 1] if group else 0
        content = _row_group(path, stamp, group, column)[row - first].as_py()
    except (
        OSError,
        ValueError,
        LookupError,
        TypeError,
        NotImplementedError,
    ) as error:  # raised by pyarrow for damaged files
        if isinstance(error, OSError) and error.strerror:
            raise
        raise OSError(errno.EIO, f"row {row} of {path.name}: {_one_line(error)}", str(path)) from error
    if content is None:
        raise OSError(errno.ENODATA, f"row {row} of {path.name} has no bytes in column {column}", str(path))
    return bytes(content)


@lru_cache(maxsize=64)
def _row_group_ends(path: Path, stamp: tuple[int, ...]) -> list[int]:
    """Returns the end row of each row group (exclusive)."""
    from pyarrow import parquet  # an optional dependency, and slow to import

    with parquet.ParquetFile(path) as table:
        return list(accumulate(table.metadata.row_group(group).num_rows for group in range(table.num_row_groups)))


@lru_cache(maxsize=1)  # rows are read in order, and a group may take hundreds of megabytes
def _row_group(path: Path, stamp: tuple[int, ...], group: int, column: str) -> Any:
    """Returns the bytes of the images of one row group as a pyarrow array."""
    import pyarrow
    from pyarrow import compute, parquet

    with parquet.ParquetFile(path) as table:
        values = table.read_row_group(group, columns=[column], use_threads=False).column(column)
    if pyarrow.types.is_struct(values.type):
        values = compute.struct_field(values, _BYTES_FIELD)
    if not (pyarrow.types.is_binary(values.type) or pyarrow.types.is_large_binary(values.type)):
        raise ValueError(f"column {column} has type {values.type}, not bytes")
    return values


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())
