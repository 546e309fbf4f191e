"""The store finds all entries, copies no tensor and keeps no file open."""

from __future__ import annotations

import os
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.utils.data.cache.entries import assert_holds, entry, key_of, shards_in, write, write_one
from utils.data.cache import shards
from utils.data.cache import store as store_module
from utils.data.cache.shards import DamagedShard
from utils.data.cache.store import Store, prefixes_of

DAY_SECONDS = 86400


def keys_of(*indices: int) -> np.ndarray:
    """(n, 16) uint8."""
    return np.frombuffer(b"".join(key_of(index) for index in indices), np.uint8).reshape(-1, 16)


def mappings_in(folder: Path) -> int:
    """Counts the mappings that this process has of files in the folder."""
    return Path("/proc/self/maps").read_text().count(f"{folder}/")


def test_a_missing_entry_raises_key_error(tmp_path: Path) -> None:
    store = Store(tmp_path / "none yet")
    assert len(store) == 0
    assert key_of(0) not in store
    assert store.find(keys_of(0, 1)).tolist() == [-1, -1]
    with pytest.raises(KeyError, match=key_of(0).hex()):
        store.get(key_of(0))
    write(tmp_path, range(5))
    with pytest.raises(KeyError, match=f"{key_of(7).hex()}; `python -m utils.data.cache verify {tmp_path.parent}`"):
        Store(tmp_path).get(key_of(7))


def test_shards_of_all_groups_are_found(tmp_path: Path) -> None:
    write(tmp_path, range(4), group="32x32")
    write(tmp_path, range(4, 8), group="16x48", per_shard=1)
    assert_holds(Store(tmp_path), range(8))


def test_find_returns_minus_one_for_missing_keys(tmp_path: Path) -> None:
    write(tmp_path, range(10), per_shard=3)
    found = Store(tmp_path).find(keys_of(99, 3, 0, 98, 9, 3))
    assert (found >= 0).tolist() == [False, True, True, False, True, True]
    assert found[1] == found[5]
    assert len(set(found[found >= 0].tolist())) == 3
    assert found.dtype == np.int64
    assert Store(tmp_path).find(keys_of()).tolist() == []


def test_a_column_has_the_order_of_its_keys(tmp_path: Path) -> None:
    write(tmp_path, range(10), per_shard=3)
    indices = (7, 0, 9, 3, 0, 1)
    column = Store(tmp_path).column(keys_of(*indices), "pooled")
    assert column.tolist() == [[index, -index] for index in indices]


def test_an_entry_written_twice_is_read_once(tmp_path: Path) -> None:
    """Two runs that started together may write it; both shards are complete, so either may be read."""
    write(tmp_path, range(3), per_shard=2)
    write(tmp_path, range(1, 4), per_shard=3)
    store = Store(tmp_path)
    assert len(store) == 6
    assert_holds(store, range(4))
    assert (store.find(keys_of(0, 1, 2, 3)) >= 0).all()
    shards_in(tmp_path)[0].unlink()
    assert sum(key_of(index) in Store(tmp_path) for index in range(4)) >= 2


def test_keys_with_equal_first_bytes_are_distinguished(tmp_path: Path) -> None:
    keys = [b"eight by" + bytes([number]) * 8 for number in range(3)]
    assert len(set(prefixes_of(np.frombuffer(b"".join(keys), np.uint8).reshape(3, 16)).tolist())) == 1
    for number in (0, 1):
        write_one(tmp_path, keys[number], entry(number))
    store = Store(tmp_path)
    assert [store.get(keys[number])["pooled"].tolist() for number in (0, 1)] == [[0, 0], [1, -1]]
    assert keys[2] not in store
    with pytest.raises(KeyError):
        store.get(keys[2])


def test_refresh_finds_new_shards(tmp_path: Path) -> None:
    write(tmp_path, range(2))
    store = Store(tmp_path)
    write(tmp_path, range(2, 4), group="0, before the others")
    assert key_of(3) not in store
    assert_holds(store, range(2))
    store.refresh()
    assert_holds(store, range(4))
    store.refresh()
    assert len(store) == 4


def test_a_damaged_new_shard_leaves_an_open_store_unchanged(tmp_path: Path) -> None:
    write(tmp_path, range(2), group="b")
    store = Store(tmp_path)
    write(tmp_path, range(2, 4), group="a")
    bad = tmp_path / "c" / f"{0:032x}.safetensors"
    bad.parent.mkdir()
    bad.write_bytes(b"damaged")
    with pytest.raises(DamagedShard):
        store.refresh()
    assert len(store) == 2
    assert_holds(store, range(2))
    bad.unlink()
    store.refresh()
    assert_holds(store, range(4))


# --- memory and files --------------------------------------------------------------------------------------------------


def test_returned_tensors_are_views_of_the_mapped_file(tmp_path: Path) -> None:
    write(tmp_path, range(3), per_shard=3)
    store = Store(tmp_path)
    first, second, again = (store.get(key_of(index))["sequence"] for index in (0, 1, 0))
    assert first.untyped_storage().data_ptr() == second.untyped_storage().data_ptr()
    assert second.data_ptr() - first.data_ptr() == first.nbytes
    assert again.data_ptr() == first.data_ptr()
    (shard,) = shards_in(tmp_path)
    lines = [line.split() for line in Path("/proc/self/maps").read_text().splitlines() if line.endswith(str(shard))]
    bounds = [tuple(int(end, 16) for end in line[0].split("-")) for line in lines]
    assert any(start <= first.data_ptr() < end for start, end in bounds), "not a copy"


def test_writing_to_a_returned_tensor_does_not_change_the_file(tmp_path: Path) -> None:
    write(tmp_path, range(1))
    Store(tmp_path).get(key_of(0))["sequence"].fill_(7)
    assert_holds(Store(tmp_path), range(1))


def test_the_number_of_open_files_does_not_depend_on_the_number_of_shards(tmp_path: Path) -> None:
    before = len(os.listdir("/proc/self/fd"))
    write(tmp_path, range(60), per_shard=1)
    store = Store(tmp_path)
    held = [store.get(key_of(index)) for index in range(60)]
    assert len(os.listdir("/proc/self/fd")) == before
    assert len(held) == 60


def test_opening_a_store_keeps_no_shard_mapped(tmp_path: Path) -> None:
    write(tmp_path, range(20), per_shard=1)
    store = Store(tmp_path)
    assert mappings_in(tmp_path) == 0
    assert_holds(store, range(1))
    assert mappings_in(tmp_path) == 1


def test_tensors_stay_valid_after_the_store_has_unmapped_their_shard(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(store_module, "MAX_MAPPED_SHARDS", 2)
    write(tmp_path, range(10), per_shard=1)
    store = Store(tmp_path)
    first = store.get(key_of(0))
    assert_holds(store, range(1, 10))
    assert mappings_in(tmp_path) == 3, "the two most recently used shards, and the one whose tensors are referenced"
    assert all(torch.equal(first[name], value) for name, value in entry(0).items())
    del first
    assert mappings_in(tmp_path) == 2
    assert_holds(store, range(10))


def test_the_most_recently_used_shards_stay_mapped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store_module, "MAX_MAPPED_SHARDS", 2)
    write(tmp_path, range(3), per_shard=1)
    store = Store(tmp_path)
    for index in (0, 1, 0, 2, 0):
        store.get(key_of(index))
    mapped: list[Path] = []
    real_map = shards.map_shard

    def map_shard(path: Path) -> dict[str, torch.Tensor]:
        mapped.append(path)
        return real_map(path)

    monkeypatch.setattr(store_module, "map_shard", map_shard)
    store.get(key_of(0))
    store.get(key_of(2))
    assert mapped == []
    store.get(key_of(1))
    assert len(mapped) == 1


def test_a_mapped_shard_can_be_read_after_its_file_is_deleted(tmp_path: Path) -> None:
    write(tmp_path, range(2))
    store = Store(tmp_path)
    held = store.get(key_of(0))
    shards_in(tmp_path)[0].unlink()
    assert torch.equal(held["sequence"], entry(0)["sequence"])
    assert_holds(store, range(2))


# --- marks of use ------------------------------------------------------------------------------------------------------


def test_only_used_shards_are_marked(tmp_path: Path) -> None:
    write(tmp_path, range(3), per_shard=1)
    old = time.time() - 5 * DAY_SECONDS
    for shard in shards_in(tmp_path):
        os.utime(shard, (old, old))
    store = Store(tmp_path)
    store.mark_used(store.find(keys_of(0, 2)))
    ages = [time.time() - shard.stat().st_mtime for shard in shards_in(tmp_path)]
    assert sum(age < DAY_SECONDS for age in ages) == 2
    assert sum(age > 4 * DAY_SECONDS for age in ages) == 1
    store.mark_used(store.find(keys_of()))


def test_a_shard_is_marked_at_most_once_a_day(tmp_path: Path) -> None:
    """Starting many runs does not write to the disk each time."""
    write(tmp_path, range(1))
    (shard,) = shards_in(tmp_path)
    an_hour_ago = time.time() - 3600
    os.utime(shard, (an_hour_ago, an_hour_ago))
    store = Store(tmp_path)
    store.mark_used(store.find(keys_of(0)))
    assert shard.stat().st_mtime == pytest.approx(an_hour_ago, abs=1)
