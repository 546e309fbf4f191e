"""The store of encoded tensors on disk. It knows keys and tensors, and nothing of models or images.

One folder for each encoder identity ("vae-1f0c…"), in it one for each group of entries of the same shapes ("1024x1024"), in
it shards. Opening a store reads the keys of its shards only: 12 bytes of memory an entry.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from pathlib import Path

import numpy as np
from torch import Tensor

from utils.data.cache.shards import KEYS, SHARD_FILES, entry_of, map_shard
from utils.data.columns import mark_used

MAX_MAPPED_SHARDS = 512
"""A process may have some ten thousands of mappings; tensors that were handed out keep theirs."""


class Store:
    """Entries of one encoder identity: key -> {tensor name: tensor}."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._shards: list[Path] = []
        self._starts = np.zeros(1, np.int64)
        """Number of the first entry of each shard, and the number of all."""
        self._prefixes = np.zeros(0, np.uint64)
        """First eight bytes of each entry's key, sorted."""
        self._numbers = np.zeros(0, np.int32)
        """Number of the entry of each of these."""
        self._mapped: OrderedDict[int, dict[str, Tensor]] = OrderedDict()
        self._lock = threading.Lock()
        self.refresh()

    def refresh(self) -> None:
        """Take notice of shards written since the store was opened. Raises DamagedShard."""
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
        """Entries; one that several runs have written counts several times."""
        return len(self._numbers)

    def __contains__(self, key: bytes) -> bool:
        return self._find(key) is not None

    def find(self, keys: np.ndarray) -> np.ndarray:
        """Of each key (n, 16) the number of its entry, -1 where there is none; (n,) int64.

        Compared are eight bytes; `get` compares all. Two of a million keys agree in eight with a chance of one in 10^8.
        """
        if not len(self._prefixes):
            return np.full(len(keys), -1, np.int64)
        wanted = prefixes_of(keys)
        places = np.minimum(np.searchsorted(self._prefixes, wanted), len(self._prefixes) - 1)
        return np.where(self._prefixes[places] == wanted, self._numbers[places], np.int64(-1))

    def get(self, key: bytes) -> dict[str, Tensor]:
        """The tensors of one entry, on the CPU; they share the file's memory, so don't write to them.

        Raises KeyError when it is not there.
        """
        found = self._find(key)
        if found is None:
            command = f"python -m utils.data.cache verify {self.folder.parent}"
            raise KeyError(f"{self.folder} has no entry {key.hex()}; `{command}` says whether a shard is damaged")
        return entry_of(*found)

    def _find(self, key: bytes) -> tuple[dict[str, Tensor], int] | None:
        """The tensors of the key's shard, and its row in them."""
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
        """One tensor of many entries that are there: keys (n, 16) to (n, ...)."""
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
        """Note on the shards of these entries that they were used today; `prune` goes by it."""
        for shard in np.unique(np.searchsorted(self._starts, numbers, side="right") - 1).tolist():
            mark_used(self._shards[shard])


def prefixes_of(keys: np.ndarray) -> np.ndarray:
    """The first eight bytes of each key (n, 16) uint8, as numbers; (n,) uint64."""
    return np.ascontiguousarray(keys[:, :8]).view("<u8").reshape(-1)
