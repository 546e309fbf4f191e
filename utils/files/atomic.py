"""Atomic file writes: write to a temporary file in the same folder, fsync, rename."""

from __future__ import annotations

import os
import shutil
from pathlib import Path


def sync_folder(folder: Path) -> None:
    """Flushes a folder to disk, so that renames inside it survive a power failure."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


_UMASK = os.umask(0)
os.umask(_UMASK)  # the umask can only be read by setting it


def replace_file(temporary: Path, path: Path) -> None:
    """Flushes a complete file and renames it to `path`, in the same folder.

    The file gets the default permissions of new files, because safetensors creates files that only their owner can read.
    """
    temporary.chmod(0o666 & ~_UMASK)
    with temporary.open("rb") as file:
        os.fsync(file.fileno())
    temporary.replace(path)
    sync_folder(path.parent)


def temporary_beside(path: Path) -> Path:
    """Returns a unique temporary name for a file that will replace `path`.

    The name is random, because containers that share a disk may have processes with equal ids.
    """
    return path.with_name(f".{path.name}.{os.urandom(8).hex()}.tmp")


def write_text(path: Path, text: str) -> None:
    """Writes a text file in UTF-8. If it is interrupted, the old file is unchanged."""
    temporary = temporary_beside(path)
    temporary.write_text(text, encoding="utf-8")
    replace_file(temporary, path)


def remove_folder(folder: Path) -> None:
    """Deletes a folder. It is renamed first, so that an interruption leaves no partial folder with its name."""
    renamed = folder.with_name(f".{folder.name}.old")
    folder.replace(renamed)
    shutil.rmtree(renamed)
