"""Column storage for datasets of millions of images: numbers as arrays, strings as one block of bytes.

A Python object per image would take about a kilobyte; columns take only the size of the numbers and characters. A table is
stored as a safetensors file and memory-mapped: unused pages are never loaded, and processes share the pages they use.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import time
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from utils.files.atomic import replace_file, temporary_beside

_ESCAPE = "surrogateescape"
"""File names may contain bytes that are not UTF-8."""
_DAY_SECONDS = 86400.0
_CHECKSUM_BYTES = 8


class FileBlock:
    """A byte range of a file, read on each access: unlike a memory-mapped range, it never stays in memory."""

    def __init__(self, path: Path, start: int, stop: int) -> None:
        self._file = path.open("rb", buffering=0)
        self._start, self._stop = start, stop

    def __len__(self) -> int:
        return self._stop - self._start

    def __getitem__(self, part: slice) -> np.ndarray:
        start, stop, _ = part.indices(len(self))
        found = b""
        while len(found) < stop - start:  # pread returns at most 2 GiB at a time
            more = os.pread(self._file.fileno(), stop - start - len(found), self._start + start + len(found))
            if not more:
                raise OSError(errno.EIO, "is truncated", self._file.name)
            found += more
        return np.frombuffer(found, dtype=np.uint8)

    def tobytes(self) -> bytes:
        """Reads the whole range."""
        return self[:].tobytes()


class Texts:
    """Strings stored in one block of bytes; string i is block[offsets[i]:offsets[i + 1]] in UTF-8."""

    def __init__(self, offsets: np.ndarray, block: np.ndarray | FileBlock) -> None:
        self.offsets, self.block = offsets, block

    @classmethod
    def of(cls, strings: Iterable[str]) -> Texts:
        encoded = [text.encode("utf-8", _ESCAPE) for text in strings]
        offsets = np.zeros(len(encoded) + 1, dtype=np.int64)
        np.cumsum(np.fromiter(map(len, encoded), np.int64, len(encoded)), out=offsets[1:])
        return cls(offsets, np.frombuffer(b"".join(encoded), dtype=np.uint8))

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, index: int) -> str:
        start, stop = int(self.offsets[index]), int(self.offsets[index + 1])
        return self.block[start:stop].tobytes().decode("utf-8", _ESCAPE)

    def __iter__(self) -> Iterator[str]:
        block, bounds = self.block.tobytes(), self.offsets.tolist()
        return (block[start:stop].decode("utf-8", _ESCAPE) for start, stop in zip(bounds[:-1], bounds[1:], strict=True))

    def __eq__(self, other: object) -> bool:
        return (
            isinstance(other, Texts)
            and np.array_equal(self.offsets, other.offsets)
            and np.array_equal(self.block[:], other.block[:])
        )

    __hash__ = None  # type: ignore[assignment]

    def where(self, chosen: np.ndarray) -> Texts:
        """Returns the strings for which `chosen` (bool, (n,)) is true."""
        if chosen.all():
            return self
        lengths = np.diff(self.offsets)
        offsets = np.zeros(int(chosen.sum()) + 1, dtype=np.int64)
        np.cumsum(lengths[chosen], out=offsets[1:])
        return Texts(offsets, self.block[:][np.repeat(chosen, lengths)])

    @classmethod
    def concatenate(cls, parts: Iterable[Texts]) -> Texts:
        """Concatenates the strings of all parts."""
        offsets, blocks, end = [np.zeros(1, dtype=np.int64)], [np.zeros(0, dtype=np.uint8)], 0
        for part in parts:
            offsets.append(part.offsets[1:] + end)
            blocks.append(part.block[:])
            end += len(part.block)
        return cls(np.concatenate(offsets), np.concatenate(blocks))


def save_columns(path: Path, columns: Mapping[str, np.ndarray], header: str) -> None:
    """Writes the columns and a header text atomically."""
    path.parent.mkdir(parents=True, exist_ok=True)
    tensors = {name: torch.from_numpy(np.require(column, requirements=["C", "W"])) for name, column in columns.items()}
    temporary = temporary_beside(path)
    save_file(tensors, temporary, {"header": header, "checksum": _checksum(tensors, header)})
    replace_file(temporary, path)


def _checksum(tensors: Mapping[str, Tensor], header: str) -> str:
    """Returns a checksum of the columns and the header, to detect corruption on disk."""
    digest = hashlib.blake2b(header.encode(), digest_size=_CHECKSUM_BYTES)
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.numpy().reshape(-1).view(np.uint8).data)
    return digest.hexdigest()


def map_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Maps a safetensors file; returns its tensors, which share the file's pages and keep no file open, and its metadata.

    Raises SafetensorError or OSError if the file is not a valid safetensors file.
    """
    with safe_open(path, "pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}, dict(file.metadata() or {})  # noqa: SIM118


def tensor_place(path: Path, name: str) -> tuple[int, int]:
    """Returns the start and end of a tensor's bytes in a safetensors file."""
    with path.open("rb") as file:
        header_bytes = int.from_bytes(file.read(8), "little")
        start, stop = json.loads(file.read(header_bytes))[name]["data_offsets"]
    return 8 + header_bytes + start, 8 + header_bytes + stop


def mark_used(path: Path) -> None:
    """Updates the modification time of a cache file once a day; `prune` deletes files by it."""
    try:
        if time.time() - path.stat().st_mtime > _DAY_SECONDS:
            os.utime(path)
    except OSError:
        pass  # a read-only cache of another user


def is_intact(path: Path) -> bool:
    """Reads the whole file and returns whether it exists and matches its checksum."""
    try:
        map_columns(path, checked=True)
    except (SafetensorError, OSError, ValueError):
        return False
    return True


def map_columns(path: Path, *, checked: bool = False) -> tuple[dict[str, np.ndarray], str]:
    """Maps a file written by `save_columns`; returns its columns and header, and marks the file as used.

    checked: verifies the checksum first, which reads the whole file. Raises ValueError if the file is damaged.
    """
    mark_used(path)
    tensors, metadata = map_tensors(path)
    if checked and metadata.get("checksum") != _checksum(tensors, metadata.get("header", "")):
        raise ValueError(f"{path} is damaged: its checksum does not match")
    return {name: tensor.numpy() for name, tensor in tensors.items()}, metadata.get("header", "")
