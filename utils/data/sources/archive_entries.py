"""What is found in .tar and .parquet files: an image's place and its captions."""

from __future__ import annotations

import stat
from pathlib import Path
from typing import NamedTuple

from utils.data.sources.decoding import BadFile

NOT_INSIDE = -1
"""`ArchiveEntry.start` of an image that is a file of its own."""


class ArchiveEntry(NamedTuple):
    """One image in an archive or a table."""

    name: str
    """A .tar's member; number of the row in a .parquet file; or a path from the .parquet file's folder."""
    start: int
    """First byte of the member's content; number of the row; NOT_INSIDE for a path."""
    length: int
    """Bytes of the member; 0 for others."""
    captions: list[str] | None
    """None if it has none."""


def check_regular(path: Path) -> None:
    """Raises BadFile for what is no file with something in it; others would keep the process waiting."""
    try:
        status = path.stat()
    except OSError as error:
        raise BadFile(path, f"cannot be read: {error.strerror}") from error
    if not stat.S_ISREG(status.st_mode):
        raise BadFile(path, "is not a regular file")
    if not status.st_size:
        raise BadFile(path, "is empty (0 bytes)")
