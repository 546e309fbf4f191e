"""Where the bytes of an image are: in a file of its own, or inside a .tar or .parquet file, which is never unpacked.

Whatever is missing, cut off or changed since it was listed raises OSError, with a reason in its `strerror`.
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
_BYTES_FIELD = "bytes"  # what Hugging Face's datasets call it in an image's struct


@dataclass(frozen=True, slots=True, order=True)
class ImageFile:
    """Where the bytes of an image are: a file, or a part of a .tar or .parquet file."""

    path: Path
    member: str = ""
    """Empty for a file of its own; in a .tar file the member's name, in a .parquet file that of the column."""
    start: int = 0
    """In a .tar file the first byte of the member's content, in a .parquet file the number of the row."""
    length: int = 0
    """In a .tar file how many bytes the member has."""

    def __str__(self) -> str:
        if not self.member:
            return str(self.path)
        return f"{self.path}/row {self.start}" if self._is_in_table() else f"{self.path}/{self.member}"

    def read(self) -> bytes:
        """All bytes of the image. Raises OSError."""
        if not self.member:
            with self.open() as file:
                return file.read()
        if self._is_in_table():
            return _read_row(self.path, self.member, self.start)
        return _read_range(self.path, self.start, self.length)

    def open(self) -> BinaryIO:
        """The image's bytes as a file to read from, with an end of its own. Raises OSError."""
        return BytesIO(self.read()) if self.member else _open_regular(self.path)

    def _is_in_table(self) -> bool:
        return self.path.suffix.lower() == TABLE_SUFFIX


def _open_regular(path: Path) -> BinaryIO:
    # Opened without waiting: a named pipe would keep the reader until somebody writes to it.
    file = open(path, "rb", opener=lambda name, flags: os.open(name, flags | os.O_NONBLOCK))
    if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
        file.close()
        raise OSError(errno.EINVAL, "Not a regular file", str(path))
    return file


def _read_range(path: Path, start: int, length: int) -> bytes:
    """Bytes start to start + length, of which none may be missing."""
    with _open_regular(path) as file:
        there = os.fstat(file.fileno()).st_size - start
        if there >= length:  # a length that cannot be right must not be allocated
            file.seek(start)
            content = file.read(length)
            there = len(content)
    if there < length:
        raise OSError(errno.EIO, f"{path.name} is cut off: of {length} bytes {max(0, there)} are there", str(path))
    return content


# --- tables ------------------------------------------------------------------------------------------------------------


def _read_row(path: Path, column: str, row: int) -> bytes:
    status = path.stat()
    stamp = (status.st_size, status.st_mtime_ns, status.st_ino)  # a file that was replaced is not read from memory
    try:
        ends = _row_group_ends(path, stamp)
        group = bisect_right(ends, row)
        first = ends[group - 1] if group else 0
        content = _row_group(path, stamp, group, column)[row - first].as_py()
    except (OSError, ValueError, LookupError, TypeError, NotImplementedError) as error:  # pyarrow's, of a damaged file
        if isinstance(error, OSError) and error.strerror:
            raise
        raise OSError(errno.EIO, f"row {row} of {path.name}: {_one_line(error)}", str(path)) from error
    if content is None:
        raise OSError(errno.ENODATA, f"row {row} of {path.name} has no bytes in column {column}", str(path))
    return bytes(content)


@lru_cache(maxsize=64)
def _row_group_ends(path: Path, stamp: tuple[int, ...]) -> list[int]:
    """The number of the first row behind each row group."""
    from pyarrow import parquet  # an optional requirement, and slow to import

    with parquet.ParquetFile(path) as table:
        return list(accumulate(table.metadata.row_group(group).num_rows for group in range(table.num_row_groups)))


@lru_cache(maxsize=1)  # rows are read in their order, and a group may have hundreds of megabytes
def _row_group(path: Path, stamp: tuple[int, ...], group: int, column: str) -> Any:
    """The bytes of the images of one row group, as an array of pyarrow's."""
    import pyarrow
    from pyarrow import compute, parquet

    with parquet.ParquetFile(path) as table:
        values = table.read_row_group(group, columns=[column], use_threads=False).column(column)
    if pyarrow.types.is_struct(values.type):
        values = compute.struct_field(values, _BYTES_FIELD)
    if not (pyarrow.types.is_binary(values.type) or pyarrow.types.is_large_binary(values.type)):
        raise ValueError(f"column {column} has {values.type} and no bytes")
    return values


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())
