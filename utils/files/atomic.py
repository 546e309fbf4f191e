"""Files that are whole whenever they are there: written beside their place, flushed to the disk, renamed."""

from __future__ import annotations

import os
import shutil
from pathlib import Path


def sync_folder(folder: Path) -> None:
    """Make renames inside a folder survive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


_UMASK = os.umask(0)
os.umask(_UMASK)  # it cannot be read without being set


def replace_file(temporary: Path, path: Path) -> None:
    """Flush a finished file and give it its name in one step; both in one folder.

    It gets the permissions that any new file gets: safetensors writes files that only their owner can read.
    """
    temporary.chmod(0o666 & ~_UMASK)
    with temporary.open("rb") as file:
        os.fsync(file.fileno())
    temporary.replace(path)
    sync_folder(path.parent)


def temporary_beside(path: Path) -> Path:
    """A name for a file that is to take the path's place. No other writer's: containers that share a disk share numbers of
    processes too."""
    return path.with_name(f".{path.name}.{os.urandom(8).hex()}.tmp")


def write_text(path: Path, text: str) -> None:
    """Write a text file in UTF-8, or leave the old one as it was."""
    temporary = temporary_beside(path)
    temporary.write_text(text, encoding="utf-8")
    replace_file(temporary, path)


def remove_folder(folder: Path) -> None:
    """Delete a folder; killed half-way, it leaves nothing of that name."""
    doomed = folder.with_name(f".{folder.name}.old")
    folder.replace(doomed)
    shutil.rmtree(doomed)
