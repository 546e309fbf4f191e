"""Key-value store of encoded tensors on disk, independent of models and images.

Each encoder identity has a folder ("vae-1f0c…"); in it, each group of entries with the same shapes has a folder
("1024x1024") of shards. Opening a store reads only the keys of its shards and takes 12 bytes of memory per entry.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from pathlib import Path

import numpy as np
from torch import Tensor

from utils.data.cache.shards import KEYS, SHARD_FILES, entry_of, map_shard
from utils.files.columns import mark_used

MAX_MAPPED_SHARDS = 512
"""Limits the number of mappings of a process, of which the kernel allows about 65,000. Returned tensors keep theirs."""


class Store:
    """The entries of one encoder identity: key -> {tensor name: tensor}."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._shards: list[Path] = []
        self._starts = np.zeros(1, np.int64)
        """Number of the first entry of each shard, then the number of all entries."""
        self._prefixes = np.zeros(0, np.uint64)
        """The first eight bytes of each entry's key, sorted."""
        self._numbers = np.zeros(0, np.int32)
        """The number of the entry with each of these prefixes."""
        self._mapped: OrderedDict[int, dict[str, Tensor]] = OrderedDict()
        self._lock = threading.Lock()
        self.refresh()

    def refresh(self) -> None:
        """Adds shards written since the store was opened. Raises DamagedShard."""
        known, shards = set(self._shards), list(self._shards)
        prefixes, numbers, end = [self._prefixes], [self._numbers], int(self._starts[-1])
        starts = self._starts.tolist()
        for path in sorted(self.folder.glob(f"*/{SHARD_FILES}")):
            if path in known:
                continue
            keys = map_shard(path)[KEYS].numpy()
            prefixes.append(prefixes_of(keys))
            numbers.append(np.arange(end, end + len(keys), dtype=np.int32))
            end += len(keys)
            starts.append(end)
            shards.append(path)
        if len(prefixes) == 1:
            return
        joined = np.concatenate(prefixes)
        order = np.argsort(joined, kind="stable")
        self._prefixes, self._numbers = joined[order], np.concatenate(numbers)[order]
        self._shards, self._starts = shards, np.array(starts, np.int64)

    def __len__(self) -> int:
        """The number of entries; an entry that several runs have written is counted several times."""
        return len(self._numbers)

    def __contains__(self, key: bytes) -> bool:
        return self._find(key) is not None

    def find(self, keys: np.ndarray) -> np.ndarray:
        """Returns the number of each key's entry, -1 for a missing one: keys (n, 16) uint8 -> (n,) int64.

        Only the first eight bytes are compared, unlike in `get`: among a million keys, two agree in them with a
        probability of about 3e-8.
        """
        if not len(self._prefixes):
            return np.full(len(keys), -1, np.int64)
        prefixes = prefixes_of(keys)
        places = np.minimum(np.searchsorted(self._prefixes, prefixes), len(self._prefixes) - 1)
        return np.where(self._prefixes[places] == prefixes, self._numbers[places], np.int64(-1))

    def get(self, key: bytes) -> dict[str, Tensor]:
        """Returns the tensors of one entry on the CPU. They are views of the mapped file and must not be written to.

        Raises KeyError for a missing entry.
        """
        found = self._find(key)
        if found is None:
            command = f"python -m utils.data.cache verify {self.folder.parent}"
            raise KeyError(f"{self.folder} has no entry {key.hex()}; `{command}` checks for damaged shards")
        return entry_of(*found)

    def _find(self, key: bytes) -> tuple[dict[str, Tensor], int] | None:
        """Returns the tensors of the shard with the key, and the entry's row in them."""
        prefix = np.uint64(int.from_bytes(key[:8], "little"))
        place = int(np.searchsorted(self._prefixes, prefix))
        while place < len(self._prefixes) and self._prefixes[place] == prefix:
            number = int(self._numbers[place])
            shard = int(np.searchsorted(self._starts, number, side="right")) - 1
            row = number - int(self._starts[shard])
            tensors = self._map(shard)
            if tensors[KEYS][row].numpy().tobytes() == key:
                return tensors, row
            place += 1
        return None

    def _map(self, shard: int) -> dict[str, Tensor]:
        with self._lock:
            if shard in self._mapped:
                self._mapped.move_to_end(shard)
            else:
                self._mapped[shard] = map_shard(self._shards[shard])
                if len(self._mapped) > MAX_MAPPED_SHARDS:
                    self._mapped.popitem(last=False)
            return self._mapped[shard]

    def column(self, keys: np.ndarray, name: str) -> np.ndarray:
        """Returns one tensor of many entries, all of which must exist: keys (n, 16) -> (n, ...)."""
        numbers = self.find(keys)
        shards = np.searchsorted(self._starts, numbers, side="right") - 1
        parts: list[np.ndarray] = []
        places: list[np.ndarray] = []
        for shard in np.unique(shards).tolist():
            chosen = np.flatnonzero(shards == shard)
            parts.append(self._map(shard)[name].numpy()[numbers[chosen] - self._starts[shard]])
            places.append(chosen)
        return np.concatenate(parts)[np.argsort(np.concatenate(places))]

    def mark_used(self, numbers: np.ndarray) -> None:
        """Updates the modification time of the shards of these entries, by which `prune` finds unused shards."""
        for shard in np.unique(np.searchsorted(self._starts, numbers, side="right") - 1).tolist():
            mark_used(self._shards[shard])


def prefixes_of(keys: np.ndarray) -> np.ndarray:
    """Returns the first eight bytes of each key as an integer: (n, 16) uint8 -> (n,) uint64."""
    return np.ascontiguousarray(keys[:, :8]).view("<u8").reshape(-1)
