"""Locks of a cache folder: many runs may use it at the same time; deleting from it requires exclusive access.

All locks are flock locks, which the kernel releases when a process ends for any reason. A lock file that no process holds is
therefore stale, and unfinished files of its writer can be removed. On a file system without locks, no lock file counts as
stale.
"""

from __future__ import annotations

import fcntl
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

WRITERS = "writers"
"""Folder of the lock files of writing processes."""
_USE = ".in_use"


class CacheInUse(Exception):
    """Another process holds a conflicting lock on the cache."""


def _try_lock(descriptor: int, kind: int) -> bool:
    """Takes the lock if it is free, without waiting; returns whether it was. Raises OSError without support for locks."""
    try:
        fcntl.flock(descriptor, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def is_cache(folder: Path) -> bool:
    """Returns whether any run has used the folder as its cache."""
    return (folder / _USE).is_file()


class SharedLock:
    """Marks the cache as in use by this process for the lifetime of the object. Raises CacheInUse during `prune`."""

    def __init__(self, cache_folder: Path) -> None:
        cache_folder.mkdir(parents=True, exist_ok=True)
        path = cache_folder / _USE
        try:
            # The cache of another user may be readable only; a shared lock does not require write access.
            self._file = path.open("r" if path.exists() else "a")
            if not _try_lock(self._file.fileno(), fcntl.LOCK_SH):
                raise CacheInUse(f"{cache_folder} is being pruned; start again when prune has finished")
        except OSError:
            pass  # the file system has no locks, so `prune` cannot lock the cache and refuses to delete


@contextmanager
def exclusive_lock(cache_folder: Path) -> Iterator[None]:
    """Excludes all other processes. Raises CacheInUse when another one uses the cache, or when locks are unsupported."""
    with (cache_folder / _USE).open("a") as file:
        try:
            if not _try_lock(file.fileno(), fcntl.LOCK_EX):
                raise CacheInUse(f"{cache_folder} is in use by a run; try again when the run has ended")
        except OSError as error:
            raise CacheInUse(f"{cache_folder} is on a file system without locks ({error.strerror})") from error
        yield


class WriterLock:
    """Marks this process as a writer of shards. `name` is unique; names of its unfinished files contain it."""

    def __init__(self, cache_folder: Path) -> None:
        folder = cache_folder / WRITERS
        folder.mkdir(parents=True, exist_ok=True)
        self.name = f"{socket.gethostname()}-{os.getpid()}-{os.urandom(4).hex()}"
        self._path = folder / f"{self.name}.lock"
        # The file is locked before it is renamed, so that no other process can find it unlocked.
        temporary = folder / f".{self.name}.tmp"
        self._file = temporary.open("a")
        try:
            _try_lock(self._file.fileno(), fcntl.LOCK_EX)
        except OSError:
            pass
        temporary.rename(self._path)

    def close(self) -> None:
        """Releases the lock. All files of this writer must be complete."""
        self._path.unlink(missing_ok=True)
        self._file.close()


def remove_leftovers(cache_folder: Path, *, dry_run: bool = False) -> list[Path]:
    """Deletes lock files and incomplete shards of writers that have died; returns them. `dry_run` only lists them."""
    leftovers: list[Path] = []
    for lock in sorted((cache_folder / WRITERS).glob("*.lock")):
        if not _is_stale(lock):
            continue
        leftovers += [*cache_folder.glob(f"*/*/.*.{lock.stem}.tmp"), lock]
    if not dry_run:
        for path in leftovers:
            path.unlink(missing_ok=True)
    return leftovers


def _is_stale(lock: Path) -> bool:
    try:
        with lock.open("a") as file:
            return _try_lock(file.fileno(), fcntl.LOCK_EX)
    except OSError:
        return False
