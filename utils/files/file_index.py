"""The file index: what was read from files before, so that unchanged files are not read again.

Everything in the index belongs to a file and is valid as long as the file's stamp (size, mtime and ctime) is unchanged. The
index lies in the cache folder and has two parts:

* `files.json`: hashes of single files, such as weights and tokenizers.
* `files/*.safetensors`: a `FileTable` for each directory and archive of a dataset. It has one row per file, stored in
  columns, because datasets have millions of files and an object per file would take about a kilobyte. Besides name, stamp
  and hash, a row holds what else was read from the file, such as the size of an image.

If a part of the index is lost or damaged, files are read again; results never depend on it. Parts are written atomically, so
several runs may share an index.
"""

from __future__ import annotations

import hashlib
import json
import os
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from safetensors import SafetensorError

from utils.files.atomic import write_text
from utils.files.columns import Texts, map_columns, save_columns

Stamp = tuple[int, int, int]
"""Size in bytes, mtime and ctime in nanoseconds. ctime detects changes after which mtime was set back."""
Algorithm = Literal["blake2b", "sha256"]
_HASH_BYTES = 16
"""Length of the blake2b hashes, from which cache keys are computed."""
HASHES = "content"
"""Column of a file table with the blake2b hashes, (n, 16) uint8; zeros for files that have not been hashed."""
Columns = dict[str, "Texts | np.ndarray"]
_BLOCK_BYTES = 1 << 20
_ALGORITHMS: Mapping[Algorithm, Callable[[], Any]] = {
    "blake2b": lambda: hashlib.blake2b(digest_size=_HASH_BYTES),
    "sha256": hashlib.sha256,
}


def stamp_of(path: Path) -> Stamp:
    """Returns the stamp of a file. Raises OSError."""
    return stamp_from(path.stat())


def stamp_from(status: os.stat_result) -> Stamp:
    return status.st_size, status.st_mtime_ns, status.st_ctime_ns


@dataclass(frozen=True)
class _Entry:
    """The hashes of one file, by algorithm, in hexadecimal digits."""

    stamp: Stamp
    hashes: Mapping[str, str]


class FileIndex:
    """Hashes of single files, and the tables of directories and archives. May be used by several threads."""

    def __init__(self, folder: Path | None, *, may_write: bool = True) -> None:
        """folder: the cache folder; None keeps the hashes in memory only. may_write: whether files may be created."""
        self._folder, self._may_write = folder, may_write
        self._lock = threading.Lock()
        self._entries = self._read()
        self._changed: set[str] = set()

    def hash_of(self, path: Path, algorithm: Algorithm = "blake2b") -> str:
        """Returns the hash of a file's content in hexadecimal digits. Raises OSError for a file that cannot be read."""
        name, stamp = str(path.resolve()), stamp_of(path)
        known = self._hashes_of(name, stamp).get(algorithm)
        if known is not None:
            return known
        digest = _ALGORITHMS[algorithm]()
        with path.open("rb") as file:
            while block := file.read(_BLOCK_BYTES):
                digest.update(block)
        with self._lock:
            self._entries[name] = _Entry(stamp, {**self._hashes_of(name, stamp), algorithm: digest.hexdigest()})
            self._changed.add(name)
        return digest.hexdigest()

    def _hashes_of(self, name: str, stamp: Stamp) -> Mapping[str, str]:
        entry = self._entries.get(name)
        return entry.hashes if entry is not None and entry.stamp == stamp else {}

    def save(self) -> None:
        """Writes new hashes, if any, and drops the hashes of files that have changed or are missing. Raises OSError."""
        with self._lock:
            if self._folder is None or not self._may_write or not self._changed:
                return
            # Another run may have added hashes since this one read the file.
            entries = self._read() | {name: self._entries[name] for name in self._changed}
            valid = {name: entry for name, entry in entries.items() if _is_current(name, entry.stamp)}
            self._folder.mkdir(parents=True, exist_ok=True)
            table = {name: {"stamp": entry.stamp, "hashes": entry.hashes} for name, entry in valid.items()}
            write_text(self._folder / "files.json", json.dumps(table))
            self._entries, self._changed = valid, set()

    def _read(self) -> dict[str, _Entry]:
        try:
            table = json.loads((self._folder / "files.json").read_text(encoding="utf-8")) if self._folder else {}
            parsed = {name: _parse_entry(value) for name, value in table.items()}
        except (OSError, ValueError, AttributeError):
            return {}
        return {name: entry for name, entry in parsed.items() if entry is not None}

    def table(self, name: str) -> FileTable:
        """Returns the table with this name, which need not exist yet."""
        if self._folder is None:
            return FileTable(None, may_write=False)
        return FileTable(self._folder / "files" / f"{name}.safetensors", self._may_write)


def _is_current(name: str, stamp: Stamp) -> bool:
    try:
        return stamp_of(Path(name)) == stamp
    except OSError:
        return False


def _parse_entry(value: Any) -> _Entry | None:
    """Parses an entry of files.json; None for a damaged one."""
    if isinstance(value, list) and len(value) == 4:  # the format of earlier versions: stamp and blake2b hash
        value = {"stamp": value[:3], "hashes": {"blake2b": value[3]}}
    try:
        size, mtime, ctime = map(int, value["stamp"])
        hashes = {str(algorithm): str(digest) for algorithm, digest in value["hashes"].items()}
    except (TypeError, ValueError, KeyError, AttributeError):
        return None
    return _Entry((size, mtime, ctime), hashes)


# --- tables ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class FileTable:
    """A file with one row for each file of a directory, or for each member of an archive."""

    path: Path | None
    """None: nothing is stored."""
    may_write: bool

    def load(self) -> tuple[Columns, dict[str, Any]] | None:
        """Returns the columns and the header, or None if there is no intact file."""
        if self.path is None or not self.path.is_file():
            return None
        try:
            arrays, text = map_columns(self.path, checked=True)
            columns: Columns = {name: array for name, array in arrays.items() if not name.endswith((".offsets", ".block"))}
            for name in (name.removesuffix(".offsets") for name in arrays if name.endswith(".offsets")):
                columns[name] = Texts(arrays[f"{name}.offsets"], arrays[f"{name}.block"])
            return columns, json.loads(text)
        except (SafetensorError, OSError, ValueError, KeyError):
            return None

    def save(self, columns: Mapping[str, Texts | np.ndarray], header: Mapping[str, Any]) -> None:
        """Writes the columns and a header, a JSON object."""
        if self.path is None or not self.may_write:
            return
        arrays: dict[str, np.ndarray] = {}
        for name, column in columns.items():
            if isinstance(column, Texts):
                arrays |= {f"{name}.offsets": column.offsets, f"{name}.block": column.block[:]}
            else:
                arrays[name] = column
        save_columns(self.path, arrays, json.dumps(header))

    def save_hashes(self, rows: np.ndarray, hashes: np.ndarray) -> None:
        """Stores the hashes (m, 16) of the rows for which `rows` (bool, (n,)) is true, if the table still has n rows."""
        loaded = self.load()
        if loaded is None:
            return
        columns, header = loaded
        column = columns.get(HASHES)
        if isinstance(column, np.ndarray) and len(column) == len(rows):
            column = column.copy()
            column[rows] = hashes
            self.save({**columns, HASHES: column}, header)


@dataclass(frozen=True)
class StoredHashes:
    """Hashes that are filled in after a scan, and the file table that stores them."""

    hashes: np.ndarray
    """(k, 16) uint8: the hash column of a larger table, of which some consecutive rows belong to the file table."""
    start: int
    """The first of these rows."""
    table: FileTable
    rows: np.ndarray
    """Which rows of the file table they are (bool)."""

    def save(self) -> None:
        """Writes the current hashes to the file table."""
        stop = self.start + int(self.rows.sum())
        self.table.save_hashes(self.rows, self.hashes[self.start : stop])


def match_rows(names: Texts, old_names: Texts) -> np.ndarray:
    """Returns the row of each name in the old table, (n,) int64; -1 for a new name."""
    if names == old_names:
        return np.arange(len(names))
    row_of = {name: row for row, name in enumerate(old_names)}
    return np.fromiter((row_of.get(name, -1) for name in names), np.int64, len(names))


def are_unchanged(stamps: np.ndarray, old_stamps: np.ndarray, old_rows: np.ndarray) -> np.ndarray:
    """Returns which files have the stamp (n, 3) of their row in the old table: (n,) bool, false for new files."""
    if not len(old_stamps):
        return np.zeros(len(stamps), bool)
    return (old_rows >= 0) & (old_stamps[old_rows] == stamps).all(axis=1)
