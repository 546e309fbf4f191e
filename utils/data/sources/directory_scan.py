"""What files a folder has, by their names, and their stamps: what tells that a file is still the one it was."""

from __future__ import annotations

import os
import stat
from array import array
from collections.abc import Collection, Iterable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from utils.data.sources.decoding import IMAGE_SUFFIXES, BadFile

ARCHIVE_SUFFIXES = (".tar", ".tgz", ".tar.gz", ".parquet")
CAPTION_TABLES = ("captions.json", "metadata.jsonl", "metadata.csv")
_NUMBERS = 5  # size, time of change of content and of anything, number in its file system, number of that


class StampedFiles:
    """Names, and a stamp and an identity of each."""

    def __init__(self, names: list[str], numbers: np.ndarray) -> None:
        """numbers (n, 5) int64: size, mtime, ctime (nanoseconds), inode, device."""
        order = sorted(range(len(names)), key=names.__getitem__)
        self.names = [names[place] for place in order]
        numbers = numbers[order]
        self.stamps = np.ascontiguousarray(numbers[:, :3])
        """(n, 3) int64: when one of them differs, the file may be another."""
        self.same = _identities(numbers[:, 3], numbers[:, 4])
        """(n,) int64, equal for two names of one file."""

    def __len__(self) -> int:
        return len(self.names)


def _identities(inodes: np.ndarray, devices: np.ndarray) -> np.ndarray:
    odd = np.array(0x9E3779B97F4A7C15, dtype=np.uint64)  # no small multiple of which is near another, modulo 2**64
    return (inodes.astype(np.uint64) + odd * devices.astype(np.uint64)).astype(np.int64)


@dataclass
class DirectoryScan:
    """Everything in a folder; names are below it, with slashes. What begins with a dot is not looked at."""

    images: StampedFiles
    texts: StampedFiles
    archives: list[str] = field(default_factory=list)
    tables: list[str] = field(default_factory=list)
    others: list[str] = field(default_factory=list)
    folders: list[str] = field(default_factory=list)
    """Folders that were not looked into."""
    bad_files: list[BadFile] = field(default_factory=list)


def stamp_of(path: Path) -> tuple[int, int, int]:
    """The stamp of one file. Raises OSError."""
    status = path.stat()
    return status.st_size, status.st_mtime_ns, status.st_ctime_ns


def stat_files(folder: Path, names: Iterable[str]) -> StampedFiles:
    """Those of the files that are there; no name that somebody wrote into a table is too odd."""
    found, numbers = [], array("q")
    for name in names:
        try:
            status = os.stat(folder / name)
        except (OSError, ValueError):  # ValueError: it has a null character, or half a surrogate pair
            continue
        found.append(name)
        numbers.extend(_numbers(status))
    return StampedFiles(found, _table(numbers))


def merge_files(first: StampedFiles, second: StampedFiles) -> StampedFiles:
    files = StampedFiles([], np.zeros((0, _NUMBERS), np.int64))
    names = first.names + second.names
    order = sorted(range(len(names)), key=names.__getitem__)
    files.names = [names[place] for place in order]
    files.stamps = np.concatenate([first.stamps, second.stamps])[order]
    files.same = np.concatenate([first.same, second.same])[order]
    return files


def _numbers(status: os.stat_result) -> tuple[int, ...]:
    return status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino, status.st_dev


def _table(numbers: array[int]) -> np.ndarray:
    return np.array(numbers, dtype=np.int64).reshape(-1, _NUMBERS)


class _Walker:
    """A walk under way."""

    def __init__(self, folder: Path, recursive: bool, excluded: Collection[tuple[int, int]]) -> None:
        self.folder, self.recursive, self.excluded = folder, recursive, excluded
        """excluded: (device, inode) of folders that are none of this one's."""
        self.seen: set[tuple[int, int]] = set()
        self.links: list[tuple[str, tuple[int, int]]] = []
        """Links to folders, and the folders' identities."""
        self.image_names: list[str] = []
        self.text_names: list[str] = []
        self.image_numbers, self.text_numbers = array("q"), array("q")
        self.found = DirectoryScan(StampedFiles([], _table(array("q"))), StampedFiles([], _table(array("q"))))

    def look_into(self, inner: str) -> list[str]:
        """Take down the files of a folder; returns its folders that are to be looked into."""
        deeper = []
        try:
            entries = list(os.scandir(self.folder / inner))
        except OSError as error:
            self.found.bad_files.append(BadFile(self.folder / inner, f"cannot be looked into: {error.strerror}"))
            return []
        for entry in entries:
            if entry.name.startswith("."):
                continue
            name = f"{inner}{entry.name}"
            try:
                status = entry.stat()
            except OSError as error:
                self._take_broken(name, entry, error)
                continue
            if stat.S_ISDIR(status.st_mode):
                deeper += self._folder(name, status)
            else:
                self._take(name, status)
        return deeper

    def _folder(self, name: str, status: os.stat_result) -> list[str]:
        identity = (status.st_dev, status.st_ino)
        if identity in self.excluded:
            return []
        if not self.recursive:
            self.found.folders.append(name)
            return []
        if os.path.islink(self.folder / name):
            self.links.append((name, identity))
            return []
        return self._not_seen(name, identity)

    def follow_link(self) -> list[str]:
        """The folder behind a link, unless it is looked into anyway. To be called when no other folder is left: what has a
        name of its own is called by that, in whatever order the file system lists."""
        name, identity = min(self.links)
        self.links.remove((name, identity))
        deeper = self._not_seen(name, identity)
        if not deeper:
            reason = "is a link to a folder that is looked into already"
            self.found.bad_files.append(BadFile(self.folder / name, reason))
        return deeper

    def _not_seen(self, name: str, identity: tuple[int, int]) -> list[str]:
        if identity in self.seen:
            return []
        self.seen.add(identity)
        return [f"{name}/"]

    def _take(self, name: str, status: os.stat_result) -> None:
        suffix = name[name.rfind(".") :].lower()
        if suffix in IMAGE_SUFFIXES:
            self.image_names.append(name)
            self.image_numbers.extend(_numbers(status))
        elif suffix == ".txt":
            self.text_names.append(name)
            self.text_numbers.extend(_numbers(status))
        elif name.lower().endswith(ARCHIVE_SUFFIXES):
            self.found.archives.append(name)
        elif name.rpartition("/")[2] in CAPTION_TABLES:
            self.found.tables.append(name)
        else:
            self.found.others.append(name)

    def _take_broken(self, name: str, entry: os.DirEntry[str], error: OSError) -> None:
        """What has a name and is nothing: a link to nothing, or in a circle; a file that has just gone."""
        if os.path.splitext(name)[1].lower() in IMAGE_SUFFIXES or entry.is_symlink():
            reason = f"is a link to nothing: {error.strerror}" if entry.is_symlink() else f"cannot be read: {error.strerror}"
            self.found.bad_files.append(BadFile(self.folder / name, reason))


def scan_directory(folder: Path, *, recursive: bool, excluded: Collection[Path] = ()) -> DirectoryScan:
    """Everything in the folder, in order of names; `excluded`: folders in it that belong to something else."""
    here = os.stat(folder)
    identities = {(status.st_dev, status.st_ino) for path in excluded if path.is_dir() for status in [os.stat(path)]}
    walker = _Walker(folder, recursive, identities)
    walker.seen.add((here.st_dev, here.st_ino))
    todo = [""]
    while todo:
        todo += walker.look_into(todo.pop())
        while not todo and walker.links:
            todo += walker.follow_link()
    found = walker.found
    found.images = StampedFiles(walker.image_names, _table(walker.image_numbers))
    found.texts = StampedFiles(walker.text_names, _table(walker.text_numbers))
    for names in (found.archives, found.tables, found.others, found.folders):
        names.sort()
    found.bad_files.sort(key=lambda bad: bad.path)
    return found
