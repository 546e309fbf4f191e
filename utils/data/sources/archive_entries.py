"""The entries of .tar and .parquet files: position and captions of one image."""

from __future__ import annotations

import stat
from pathlib import Path
from typing import NamedTuple

from utils.data.sources.decoding import BadFile

NOT_INSIDE = -1
"""`ArchiveEntry.start` of an image that is stored in a separate file."""


class ArchiveEntry(NamedTuple):
    """One image in a .tar or .parquet file."""

    name: str
    """Member name in a .tar file; row number in a .parquet file, or a path relative to the .parquet file's folder."""
    start: int
    """First byte of the member's content; row number; NOT_INSIDE for a path."""
    length: int
    """Size of the member in bytes; 0 in a .parquet file."""
    captions: list[str] | None
    """None if the entry has no captions."""


def check_regular(path: Path) -> None:
    """Raises BadFile unless the path is a regular, non-empty file. Opening a named pipe would block the process."""
    try:
        status = path.stat()
    except OSError as error:
        raise BadFile(path, f"cannot be read: {error.strerror}") from error
    if not stat.S_ISREG(status.st_mode):
        raise BadFile(path, "is not a regular file")
    if not status.st_size:
        raise BadFile(path, "is empty (0 bytes)")
