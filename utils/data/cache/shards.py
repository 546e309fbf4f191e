"""Shards: safetensors files of many entries of the cache whose tensors have the same shapes.

A shard holds, for its n entries, `keys` (n, 16) and `checksums` (n, 8), both uint8, and each tensor of the entries stacked,
(n, ...). It is written beside its place, flushed to the disk, and renamed; so whatever has a shard's name is whole, and a
kill loses at most the shards being collected. Nothing is ever changed in place: what an entry is, its key says, and a key
that changes is another entry.
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
from utils.data.columns import map_tensors
from utils.files.atomic import replace_file

SHARD_BYTES = 256 * 2**20
SHARD_SECONDS = 20.0
SHARD_FILES = "[0-9a-f]" * 32 + ".safetensors"
"""Pattern of the names of files that are named by a key. Others are not ours, whoever put them there."""
KEYS, CHECKSUMS = "keys", "checksums"
CHECKSUM_BYTES = 8
_FORMAT = {"format": "mmdit-pipe cache", "version": "1"}


class DamagedShard(ValueError):
    """A file that has a shard's name and is none, or not a whole one."""


class CannotWrite(OSError):
    """A shard could not be written, such as for want of room."""


def checksum(tensors: Mapping[str, Tensor]) -> bytes:
    """Of one entry: of its tensors' bytes, in order of their names."""
    digest = hashlib.blake2b(digest_size=CHECKSUM_BYTES)
    for name in sorted(tensors):
        digest.update(name.encode())
        digest.update(tensors[name].contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.digest()


def map_shard(path: Path) -> dict[str, Tensor]:
    """The tensors of a shard, mapped. Raises DamagedShard, saying what to do."""
    try:
        tensors, metadata = map_tensors(path)
        if metadata != _FORMAT:
            raise ValueError("it has another format")
        count = len(tensors[KEYS])
        if CHECKSUMS not in tensors:
            raise ValueError("it has no checksums")
        if tensors[KEYS].shape != (count, KEY_BYTES) or any(len(tensor) != count for tensor in tensors.values()):
            raise ValueError("its tensors have different lengths")
    except (SafetensorError, ValueError, KeyError) as error:
        advice = f"`python -m utils.data.cache prune {path.parents[2]}` removes it; the next run encodes it anew"
        raise DamagedShard(f"{path} is damaged ({error}); {advice}") from error
    return tensors


def shard_name(keys: Iterable[bytes]) -> str:
    """The name, without its suffix, of the shard that has the entries with these keys."""
    return content_key(*(key.hex() for key in sorted(keys))).hex()


def entry_of(tensors: Mapping[str, Tensor], row: int) -> dict[str, Tensor]:
    """One entry of a shard's tensors: views that share the file's memory."""
    return {name: tensor[row] for name, tensor in tensors.items() if name not in (KEYS, CHECKSUMS)}


@dataclass
class _Group:
    """Entries of one group that are not written yet."""

    entries: dict[bytes, dict[str, Tensor]]
    first_added_at: float
    num_bytes: int = 0


class ShardWriter:
    """Collects entries in groups, and writes groups as shards.

    All groups together are written when they have max_bytes, or when the oldest entry is max_seconds old at an `add`.
    Several processes, of one run or of several, may write into one folder, each under a name of its own.
    """

    def __init__(
        self, folder: Path, writer: str, *, max_bytes: int = SHARD_BYTES, max_seconds: float = SHARD_SECONDS
    ) -> None:
        self.folder, self._writer = folder, writer
        self._max_bytes, self._max_seconds = max_bytes, max_seconds
        self._groups: dict[str, _Group] = {}

    def add(self, group: str, key: bytes, tensors: Mapping[str, Tensor]) -> None:
        """Add one entry, on the CPU; may write shards. Entries of a group have tensors of the same names and shapes."""
        now = time.monotonic()
        members = self._groups.setdefault(group, _Group({}, now))
        members.entries[key] = {name: tensor.contiguous() for name, tensor in tensors.items()}
        members.num_bytes += sum(tensor.nbytes for tensor in tensors.values())
        total = sum(waiting.num_bytes for waiting in self._groups.values())
        oldest = min(waiting.first_added_at for waiting in self._groups.values())
        if total >= self._max_bytes or now - oldest >= self._max_seconds:
            self.flush()

    def flush(self) -> None:
        """Write what has been added since, if anything. Raises CannotWrite, as `add` does."""
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
            raise CannotWrite(f"{folder} cannot be written to ({error}); the next run goes on from what is there") from error


def _as_rows(values: list[bytes]) -> Tensor:
    return torch.frombuffer(bytearray(b"".join(values)), dtype=torch.uint8).view(len(values), -1)
