"""Shards: safetensors files that each hold many cache entries with tensors of the same shapes.

A shard of n entries holds `keys` (n, 16) and `checksums` (n, 8), both uint8, and each tensor of the entries, stacked to
(n, ...). Shards are written atomically (temporary file, fsync, rename), so a file with a shard's name is complete, and a
killed process loses only the entries it has not written yet. Shards are never modified: the key identifies the content of
an entry, and changed content has a different key.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from utils.data.cache.keys import KEY_BYTES, content_key
from utils.files.atomic import replace_file
from utils.files.columns import map_tensors

SHARD_BYTES = 256 * 2**20
SHARD_SECONDS = 20.0
SHARD_FILES = "[0-9a-f]" * 32 + ".safetensors"
"""Glob pattern of files named by a key. All other files in a cache folder are ignored and never deleted."""
KEYS, CHECKSUMS = "keys", "checksums"
CHECKSUM_BYTES = 8
_FORMAT = {"format": "mmdit-pipe cache", "version": "1"}


class DamagedShard(ValueError):
    """A file with the name of a shard that is not a valid shard."""


class CacheWriteError(OSError):
    """A shard could not be written, for example because the disk is full."""


def checksum(tensors: Mapping[str, Tensor]) -> bytes:
    """The hash of one entry: of the names and bytes of its tensors, in order of the names."""
    digest = hashlib.blake2b(digest_size=CHECKSUM_BYTES)
    for name in sorted(tensors):
        digest.update(name.encode())
        digest.update(tensors[name].contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.digest()


def map_shard(path: Path) -> dict[str, Tensor]:
    """Returns the memory-mapped tensors of a shard. Raises DamagedShard with advice."""
    try:
        tensors, metadata = map_tensors(path)
        if metadata != _FORMAT:
            raise ValueError("not a shard of this version")
        count = len(tensors[KEYS])
        if CHECKSUMS not in tensors:
            raise ValueError("checksums are missing")
        if tensors[KEYS].shape != (count, KEY_BYTES) or any(len(tensor) != count for tensor in tensors.values()):
            raise ValueError("its tensors have different numbers of entries")
    except (SafetensorError, ValueError, KeyError) as error:
        advice = f"`python -m utils.data.cache prune {path.parents[2]}` deletes it; the next run encodes its entries again"
        raise DamagedShard(f"{path} is damaged ({error}); {advice}") from error
    return tensors


def shard_name(keys: Iterable[bytes]) -> str:
    """Returns the file name, without suffix, of the shard that holds the entries with these keys."""
    return content_key(*(key.hex() for key in sorted(keys))).hex()


def entry_of(tensors: Mapping[str, Tensor], row: int) -> dict[str, Tensor]:
    """Returns the tensors of one entry of a shard: views of the mapped file."""
    return {name: tensor[row] for name, tensor in tensors.items() if name not in (KEYS, CHECKSUMS)}


@dataclass
class _Group:
    """Entries of one group that have not been written yet."""

    entries: dict[bytes, dict[str, Tensor]]
    first_added_at: float
    num_bytes: int = 0


class ShardWriter:
    """Collects entries in groups and writes each group as a shard.

    All groups are written when they hold `max_bytes` in total, or when the oldest entry is `max_seconds` old at a call of
    `add`. Several processes, of one or several runs, may write to the same folder; each has its own `writer` name.
    """

    def __init__(
        self, folder: Path, writer: str, *, max_bytes: int = SHARD_BYTES, max_seconds: float = SHARD_SECONDS
    ) -> None:
        self.folder, self._writer = folder, writer
        self._max_bytes, self._max_seconds = max_bytes, max_seconds
        self._groups: dict[str, _Group] = {}

    def add(self, group: str, key: bytes, tensors: Mapping[str, Tensor]) -> None:
        """Adds an entry of CPU tensors; may write shards. All entries of a group have the same tensor names and shapes.

        Raises CacheWriteError.
        """
        now = time.monotonic()
        members = self._groups.setdefault(group, _Group({}, now))
        members.entries[key] = {name: tensor.contiguous() for name, tensor in tensors.items()}
        members.num_bytes += sum(tensor.nbytes for tensor in tensors.values())
        total = sum(waiting.num_bytes for waiting in self._groups.values())
        oldest = min(waiting.first_added_at for waiting in self._groups.values())
        if total >= self._max_bytes or now - oldest >= self._max_seconds:
            self.flush()

    def flush(self) -> None:
        """Writes all entries that have not been written yet. Raises CacheWriteError."""
        for group, members in self._groups.items():
            self._write(group, members.entries)
        self._groups = {}

    def _write(self, group: str, entries: Mapping[bytes, dict[str, Tensor]]) -> None:
        folder = self.folder / group
        folder.mkdir(parents=True, exist_ok=True)
        names = next(iter(entries.values())).keys()
        tensors = {name: torch.stack([entry[name] for entry in entries.values()]) for name in names}
        tensors[KEYS] = _as_rows(list(entries))
        tensors[CHECKSUMS] = _as_rows([checksum(entry) for entry in entries.values()])
        name = shard_name(entries)
        temporary = folder / f".{name}.{self._writer}.tmp"
        try:
            save_file(tensors, temporary, _FORMAT)
            replace_file(temporary, folder / f"{name}.safetensors")
        except (SafetensorError, OSError) as error:
            raise CacheWriteError(
                f"cannot write to {folder} ({error}); the next run keeps the entries written so far"
            ) from error


def _as_rows(values: list[bytes]) -> Tensor:
    return torch.frombuffer(bytearray(b"".join(values)), dtype=torch.uint8).view(len(values), -1)
