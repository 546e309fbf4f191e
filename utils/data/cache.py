"""The store of encoded tensors on disk. It knows keys and tensors, and nothing of models or pictures.

One folder for each encoder identity ("vae-1f0c…") holds shards: safetensors files of many entries, `<key>.<tensor>` each.
A shard is written beside its place, flushed to the disk, and renamed; so whatever is there is whole, and a kill loses at
most the shard being written. Nothing is ever changed in place: what an entry is, its key says, and a key that changes is
another entry.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import socket
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from utils.atomic import replace_file, write_text

SHARD_BYTES = 256 * 2**20
SHARD_SECONDS = 20.0
_HASH_BYTES = 16


def content_key(*parts: str) -> str:
    """A name for whatever the parts describe together; 32 hexadecimal digits."""
    return hashlib.blake2b(json.dumps(parts).encode(), digest_size=_HASH_BYTES).hexdigest()


class Store:
    """Entries of one encoder identity: key -> {tensor name: tensor}. Opening it reads the shards' headers only."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._shard_of: dict[str, Path] = {}
        self._tensor_names: dict[str, list[str]] = {}
        self._open_shards: dict[Path, Any] = {}
        self._known: set[Path] = set()
        self.refresh()

    def refresh(self) -> None:
        """Take notice of shards written since the store was opened."""
        for path in sorted(self.folder.glob("*.safetensors")):
            if path in self._known:
                continue
            try:
                with safe_open(path, "pt") as shard:
                    names = list(shard.keys())
            except SafetensorError as error:
                raise ValueError(f"{path} is damaged ({error}); delete it and start again to encode it anew") from error
            self._known.add(path)
            for name in names:
                key, _, tensor_name = name.partition(".")
                if self._shard_of.setdefault(key, path) == path:
                    self._tensor_names.setdefault(key, []).append(tensor_name)

    def __contains__(self, key: str) -> bool:
        return key in self._shard_of

    def __len__(self) -> int:
        return len(self._shard_of)

    def get(self, key: str) -> dict[str, Tensor]:
        """The tensors of one entry, on the CPU. Raises KeyError when it is not there."""
        path = self._shard_of[key]
        if path not in self._open_shards:
            self._open_shards[path] = safe_open(path, "pt").__enter__()
        shard = self._open_shards[path]
        return {name: shard.get_tensor(f"{key}.{name}") for name in self._tensor_names[key]}


class ShardWriter:
    """Collects entries and writes them as shards, every SHARD_BYTES or SHARD_SECONDS, whichever comes first.

    Several processes, of one run or of several, may write into one folder.
    """

    def __init__(self, folder: Path, *, max_bytes: int = SHARD_BYTES, max_seconds: float = SHARD_SECONDS) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        self._max_bytes, self._max_seconds = max_bytes, max_seconds
        self._tensors: dict[str, Tensor] = {}
        self._num_bytes = 0
        self._first_added_at = 0.0

    def add(self, key: str, tensors: Mapping[str, Tensor]) -> None:
        """Add one entry; may write a shard."""
        if not self._tensors:
            self._first_added_at = time.monotonic()
        for name, tensor in tensors.items():
            self._tensors[f"{key}.{name}"] = tensor.contiguous()
            self._num_bytes += tensor.nbytes
        if self._num_bytes >= self._max_bytes or time.monotonic() - self._first_added_at >= self._max_seconds:
            self.flush()

    def flush(self) -> None:
        """Write what has been added since the last shard, if anything."""
        if not self._tensors:
            return
        name = content_key(*sorted(self._tensors))
        temporary = self.folder / f".{name}.{socket.gethostname()}.{os.getpid()}.tmp"
        save_file(self._tensors, temporary)
        replace_file(temporary, self.folder / f"{name}.safetensors")
        self._tensors, self._num_bytes = {}, 0


class FileHashes:
    """Content hashes of files, remembered with size and modification time so that an unchanged file is read once."""

    def __init__(self, memory: Path) -> None:
        self._memory = memory
        self._entries: dict[str, list[Any]] = {}
        if memory.is_file():
            with contextlib.suppress(ValueError, TypeError):  # only a memory: what is lost is hashed again
                self._entries = dict(json.loads(memory.read_text()))
        self._changed = False

    def hash_of(self, path: Path) -> str:
        """32 hexadecimal digits. Raises OSError when the file cannot be read."""
        name, status = str(path.resolve()), path.stat()
        stamp = [status.st_size, status.st_mtime_ns, status.st_ctime_ns]
        entry = self._entries.get(name)
        if entry is not None and entry[:-1] == stamp:
            return str(entry[-1])
        digest = hashlib.blake2b(digest_size=_HASH_BYTES)
        with path.open("rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
        self._entries[name] = [*stamp, digest.hexdigest()]
        self._changed = True
        return digest.hexdigest()

    def save(self) -> None:
        """Write the memory, if anything was learnt."""
        if not self._changed:
            return
        self._memory.parent.mkdir(parents=True, exist_ok=True)
        write_text(self._memory, json.dumps(self._entries))
        self._changed = False
