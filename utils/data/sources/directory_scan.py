"""Scans a folder: files by kind, and their stamps (size, mtime, ctime), by which later runs detect changed files."""

from __future__ import annotations

import os
import stat
from array import array
from collections.abc import Collection, Iterable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from utils.data.sources.decoding import IMAGE_SUFFIXES, BadFile
from utils.files.file_index import stamp_from

ARCHIVE_SUFFIXES = (".tar", ".tgz", ".tar.gz", ".parquet")
CAPTION_TABLES = ("captions.json", "metadata.jsonl", "metadata.csv")
_STAT_FIELDS = 5  # size, mtime, ctime, inode, device


class StampedFiles:
    """Sorted file names with a stamp and an identity each."""

    def __init__(self, names: list[str], stats: np.ndarray) -> None:
        """stats: (n, 5) int64: size in bytes, mtime and ctime in nanoseconds, inode, device."""
        order = sorted(range(len(names)), key=names.__getitem__)
        self.names = [names[row] for row in order]
        stats = stats[order]
        self.stamps = np.ascontiguousarray(stats[:, :3])
        """(n, 3) int64: size, mtime, ctime. If one of them differs, the file may have changed."""
        self.file_ids = _identities(stats[:, 3], stats[:, 4])
        """(n,) int64: file identity, equal for two names of the same file."""

    def __len__(self) -> int:
        return len(self.names)


def _identities(inodes: np.ndarray, devices: np.ndarray) -> np.ndarray:
    multiplier = np.array(0x9E3779B97F4A7C15, dtype=np.uint64)  # its small multiples are far apart modulo 2**64
    return (inodes.astype(np.uint64) + multiplier * devices.astype(np.uint64)).astype(np.int64)


@dataclass
class DirectoryScan:
    """The contents of a folder; names are relative to it, with slashes. Names that start with a dot are ignored."""

    images: StampedFiles
    texts: StampedFiles
    archives: list[str] = field(default_factory=list)
    tables: list[str] = field(default_factory=list)
    others: list[str] = field(default_factory=list)
    folders: list[str] = field(default_factory=list)
    """Subfolders that were not scanned."""
    bad_files: list[BadFile] = field(default_factory=list)


def stat_files(folder: Path, names: Iterable[str]) -> StampedFiles:
    """Returns the existing files among the names, which may be arbitrary text from a caption table."""
    existing, stats = [], array("q")
    for name in names:
        try:
            status = os.stat(folder / name)
        except (OSError, ValueError):  # ValueError: the name has a null character or an unpaired surrogate
            continue
        existing.append(name)
        stats.extend(_stat_fields(status))
    return StampedFiles(existing, _table(stats))


def merge_files(first: StampedFiles, second: StampedFiles) -> StampedFiles:
    """Merges two sets of files, sorted by name."""
    files = StampedFiles([], np.zeros((0, _STAT_FIELDS), np.int64))
    names = first.names + second.names
    order = sorted(range(len(names)), key=names.__getitem__)
    files.names = [names[row] for row in order]
    files.stamps = np.concatenate([first.stamps, second.stamps])[order]
    files.file_ids = np.concatenate([first.file_ids, second.file_ids])[order]
    return files


def _stat_fields(status: os.stat_result) -> tuple[int, ...]:
    return *stamp_from(status), status.st_ino, status.st_dev


def _table(stats: array[int]) -> np.ndarray:
    return np.array(stats, dtype=np.int64).reshape(-1, _STAT_FIELDS)


class _Scanner:
    """The state of a directory scan."""

    def __init__(self, folder: Path, recursive: bool, excluded: Collection[tuple[int, int]]) -> None:
        self.folder, self.recursive, self.excluded = folder, recursive, excluded
        """excluded: (device, inode) of subfolders that are used for something else."""
        self.known_folders: set[tuple[int, int]] = set()
        self.links: list[tuple[str, tuple[int, int]]] = []
        """(Name, (device, inode) of the target) of links to folders that have not been followed yet."""
        self.image_names: list[str] = []
        self.text_names: list[str] = []
        self.image_stats, self.text_stats = array("q"), array("q")
        self.result = DirectoryScan(StampedFiles([], _table(array("q"))), StampedFiles([], _table(array("q"))))

    def scan_folder(self, prefix: str) -> list[str]:
        """Records the files of a folder; returns its subfolders to be scanned. prefix: its path below the root and "/"."""
        subfolders = []
        try:
            entries = list(os.scandir(self.folder / prefix))
        except OSError as error:
            self.result.bad_files.append(BadFile(self.folder / prefix, f"cannot be listed: {error.strerror}"))
            return []
        for entry in entries:
            if entry.name.startswith("."):
                continue
            name = f"{prefix}{entry.name}"
            try:
                status = entry.stat()
            except OSError as error:
                self._record_broken(name, entry, error)
                continue
            if stat.S_ISDIR(status.st_mode):
                subfolders += self._subfolder(name, status)
            else:
                self._record(name, status)
        return subfolders

    def _subfolder(self, name: str, status: os.stat_result) -> list[str]:
        """Returns the subfolder if it is to be scanned now; records skipped subfolders and links."""
        identity = (status.st_dev, status.st_ino)
        if identity in self.excluded:
            return []
        if not self.recursive:
            self.result.folders.append(name)
            return []
        if os.path.islink(self.folder / name):
            self.links.append((name, identity))
            return []
        return self._unless_known(name, identity)

    def follow_link(self) -> list[str]:
        """Returns the target of a link if it has not been scanned. Called when no other folder is left: so a folder that is
        also reachable without links keeps its own name, in whatever order the file system lists entries."""
        name, identity = min(self.links)
        self.links.remove((name, identity))
        subfolders = self._unless_known(name, identity)
        if not subfolders:
            reason = "is a link to a folder that is already included"
            self.result.bad_files.append(BadFile(self.folder / name, reason))
        return subfolders

    def _unless_known(self, name: str, identity: tuple[int, int]) -> list[str]:
        if identity in self.known_folders:
            return []
        self.known_folders.add(identity)
        return [f"{name}/"]

    def _record(self, name: str, status: os.stat_result) -> None:
        suffix = name[name.rfind(".") :].lower()
        if suffix in IMAGE_SUFFIXES:
            self.image_names.append(name)
            self.image_stats.extend(_stat_fields(status))
        elif suffix == ".txt":
            self.text_names.append(name)
            self.text_stats.extend(_stat_fields(status))
        elif name.lower().endswith(ARCHIVE_SUFFIXES):
            self.result.archives.append(name)
        elif name.rpartition("/")[2] in CAPTION_TABLES:
            self.result.tables.append(name)
        else:
            self.result.others.append(name)

    def _record_broken(self, name: str, entry: os.DirEntry[str], error: OSError) -> None:
        """Records an entry that cannot be read: a broken or circular link, or a file that has just been deleted."""
        if os.path.splitext(name)[1].lower() in IMAGE_SUFFIXES or entry.is_symlink():
            reason = f"is a broken link: {error.strerror}" if entry.is_symlink() else f"cannot be read: {error.strerror}"
            self.result.bad_files.append(BadFile(self.folder / name, reason))


def scan_directory(folder: Path, *, recursive: bool, excluded: Collection[Path] = ()) -> DirectoryScan:
    """Scans a folder; the result is sorted by name. excluded: subfolders that are used for something else."""
    root = os.stat(folder)
    identities = {(status.st_dev, status.st_ino) for path in excluded if path.is_dir() for status in [os.stat(path)]}
    scanner = _Scanner(folder, recursive, identities)
    scanner.known_folders.add((root.st_dev, root.st_ino))
    pending = [""]
    while pending:
        pending += scanner.scan_folder(pending.pop())
        while not pending and scanner.links:
            pending += scanner.follow_link()
    result = scanner.result
    result.images = StampedFiles(scanner.image_names, _table(scanner.image_stats))
    result.texts = StampedFiles(scanner.text_names, _table(scanner.text_stats))
    for names in (result.archives, result.tables, result.others, result.folders):
        names.sort()
    result.bad_files.sort(key=lambda bad: bad.path)
    return result
