"""Who is using a cache folder. Runs share it; only what deletes from it wants it alone.

All locks are the kernel's (flock): a process that dies, however, holds none. So a lock file that nobody holds is stale, and
what its writer had begun can be cleared away. Where a file system knows no locks, nothing is ever held to be stale.
"""

from __future__ import annotations

import fcntl
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

WRITERS = "writers"
"""Folder of the lock files of processes that write."""
_USE = ".in_use"


class CacheInUse(Exception):
    """Somebody else is using the cache."""


def _try_lock(descriptor: int, kind: int) -> bool:
    """Whether the lock could be had, at once. Raises OSError where there are no locks."""
    try:
        fcntl.flock(descriptor, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def is_cache(folder: Path) -> bool:
    """Whether any run has ever used the folder as its cache."""
    return (folder / _USE).is_file()


class SharedUse:
    """Says that this process reads the cache, as long as the object lives."""

    def __init__(self, cache_folder: Path) -> None:
        cache_folder.mkdir(parents=True, exist_ok=True)
        path = cache_folder / _USE
        try:
            # Of somebody else's cache one may only read.
            self._file = path.open("r" if path.exists() else "a")
            if not _try_lock(self._file.fileno(), fcntl.LOCK_SH):
                raise CacheInUse(f"{cache_folder} is being pruned; start again when that has ended")
        except OSError:
            pass  # no locks here: then `prune` cannot have it alone either, and refuses


@contextmanager
def exclusive_use(cache_folder: Path) -> Iterator[None]:
    """Keep everybody else out. Raises CacheInUse when somebody is in, or when one cannot know."""
    with (cache_folder / _USE).open("a") as file:
        try:
            if not _try_lock(file.fileno(), fcntl.LOCK_EX):
                raise CacheInUse(f"{cache_folder} is in use by a run; try again when it has ended")
        except OSError as error:
            raise CacheInUse(f"{cache_folder} is on a file system without locks ({error.strerror})") from error
        yield


class WriterLock:
    """Marks this process as one that writes shards; its unfinished files carry its name."""

    def __init__(self, cache_folder: Path) -> None:
        folder = cache_folder / WRITERS
        folder.mkdir(parents=True, exist_ok=True)
        self.name = f"{socket.gethostname()}-{os.getpid()}-{os.urandom(4).hex()}"
        self._path = folder / f"{self.name}.lock"
        # Locked before it has its name: nobody sees it without.
        temporary = folder / f".{self.name}.tmp"
        self._file = temporary.open("a")
        try:
            _try_lock(self._file.fileno(), fcntl.LOCK_EX)
        except OSError:
            pass
        temporary.rename(self._path)

    def close(self) -> None:
        """Nothing of this writer is unfinished."""
        self._path.unlink(missing_ok=True)
        self._file.close()


def remove_leftovers(cache_folder: Path, *, dry_run: bool = False) -> list[Path]:
    """Delete, or only list, what writers that are dead have left behind: lock files, and shards that are not whole."""
    removed: list[Path] = []
    for lock in sorted((cache_folder / WRITERS).glob("*.lock")):
        if not _is_stale(lock):
            continue
        removed += [*cache_folder.glob(f"*/*/.*.{lock.stem}.tmp"), lock]
    if not dry_run:
        for path in removed:
            path.unlink(missing_ok=True)
    return removed


def _is_stale(lock: Path) -> bool:
    try:
        with lock.open("a") as file:
            return _try_lock(file.fileno(), fcntl.LOCK_EX)
    except OSError:
        return False
