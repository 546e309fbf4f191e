"""Cache entries for tests; each is computed from its number."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from utils.data.cache.keys import content_key
from utils.data.cache.shards import ShardWriter
from utils.data.cache.store import Store

GROUP = "32x32"


def entry(index: int) -> dict[str, Tensor]:
    return {"sequence": torch.full((3, 4), float(index)), "pooled": torch.tensor([index, -index])}


ENTRY_BYTES = sum(tensor.nbytes for tensor in entry(0).values())


def key_of(index: int) -> bytes:
    return content_key("entry", str(index))


def write(folder: Path, indices: Iterable[int], *, per_shard: int = 2, group: str = GROUP, writer: str = "writer") -> None:
    """Writes entries into the folder of an encoder."""
    shards = ShardWriter(folder, writer, max_bytes=per_shard * ENTRY_BYTES, max_seconds=1e9)
    for index in indices:
        shards.add(group, key_of(index), entry(index))
    shards.flush()


def write_one(folder: Path, key: bytes, tensors: Mapping[str, Tensor]) -> None:
    """Writes a shard of one entry."""
    shards = ShardWriter(folder, "writer")
    shards.add(GROUP, key, tensors)
    shards.flush()


def assert_holds(store: Store, indices: Iterable[int]) -> None:
    for index in indices:
        assert key_of(index) in store
        tensors = store.get(key_of(index))
        assert tensors.keys() == entry(index).keys()
        assert all(torch.equal(tensors[name], value) for name, value in entry(index).items())


def shards_in(folder: Path) -> list[Path]:
    return sorted(folder.rglob("*.safetensors"))


def files_in(folder: Path) -> list[str]:
    """Returns the names of all files in the folder and its subfolders."""
    return sorted(path.name for path in folder.rglob("*") if path.is_file())
