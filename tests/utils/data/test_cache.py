"""The store: whole or not there, whatever happens to its writer."""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from utils.data.cache import FileHashes, ShardWriter, Store, content_key

ROOT = Path(__file__).resolve().parents[3]


def entry(index: int) -> dict[str, Tensor]:
    return {"sequence": torch.full((3, 4), float(index)), "pooled": torch.tensor([index, -index])}


def key_of(index: int) -> str:
    return content_key("entry", str(index))


def write(folder: Path, indices: range, *, per_shard: int = 2) -> None:
    size = sum(tensor.nbytes for tensor in entry(0).values())
    shards = ShardWriter(folder, max_bytes=per_shard * size, max_seconds=1e9)
    for index in indices:
        shards.add(key_of(index), entry(index))
    shards.flush()


def assert_holds(store: Store, indices: range) -> None:
    for index in indices:
        assert key_of(index) in store
        tensors = store.get(key_of(index))
        assert tensors.keys() == entry(index).keys()
        assert all(torch.equal(tensors[name], value) for name, value in entry(index).items())


def test_what_is_written_is_read_back(tmp_path: Path) -> None:
    write(tmp_path, range(7))
    store = Store(tmp_path)
    assert len(store) == 7
    assert_holds(store, range(7))
    assert len(list(tmp_path.iterdir())) == 4


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.int64])
def test_tensors_keep_type_and_shape(tmp_path: Path, dtype: torch.dtype) -> None:
    value = torch.arange(24).view(2, 3, 4).to(dtype)
    writer = ShardWriter(tmp_path)
    writer.add("k", {"latents": value, "view": value.transpose(0, 2)})
    writer.flush()
    read = Store(tmp_path).get("k")
    assert read["latents"].dtype == dtype
    assert torch.equal(read["latents"], value)
    assert torch.equal(read["view"], value.transpose(0, 2))


def test_a_missing_entry_is_a_key_error(tmp_path: Path) -> None:
    store = Store(tmp_path / "none yet")
    assert len(store) == 0
    assert "k" not in store
    with pytest.raises(KeyError):
        store.get("k")


def test_a_shard_is_written_when_it_is_full(tmp_path: Path) -> None:
    writer = ShardWriter(tmp_path, max_bytes=100, max_seconds=1e9)
    writer.add("a", {"x": torch.zeros(10)})
    assert list(tmp_path.iterdir()) == []
    writer.add("b", {"x": torch.zeros(20)})
    assert "a" in Store(tmp_path)
    assert "b" in Store(tmp_path)


def test_a_shard_is_written_when_it_is_old(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr("utils.data.cache.time.monotonic", lambda: now[0])
    writer = ShardWriter(tmp_path, max_seconds=20)
    writer.add("a", {"x": torch.zeros(1)})
    now[0] = 19.0
    writer.add("b", {"x": torch.zeros(1)})
    assert len(Store(tmp_path)) == 0
    now[0] = 20.0
    writer.add("c", {"x": torch.zeros(1)})
    assert len(Store(tmp_path)) == 3
    now[0] = 39.0
    writer.add("d", {"x": torch.zeros(1)})
    assert len(Store(tmp_path)) == 3


KILLED = """
import sys, torch
from pathlib import Path
from tests.utils.data.test_cache import key_of, entry
from utils.data import cache

folder = Path(sys.argv[1])
size = sum(tensor.nbytes for tensor in entry(0).values())
writer = cache.ShardWriter(folder, max_bytes=2 * size, max_seconds=1e9)
real_save = cache.save_file

def half_a_save(tensors, path):
    real_save(tensors, path)
    if list(folder.glob("*.safetensors")):
        content = path.read_bytes()
        path.write_bytes(content[: len(content) // 2])
        print("half", flush=True)
        sys.stdin.read()

cache.save_file = half_a_save
for index in range(100):
    writer.add(key_of(index), entry(index))
"""


def test_a_killed_writer_leaves_no_visible_shard_and_loses_only_the_one_being_written(tmp_path: Path) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", KILLED, str(tmp_path)], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "half\n"
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert len(list(tmp_path.iterdir())) == 2, "a whole shard and half of one"
    store = Store(tmp_path)
    assert len(store) == 2
    assert_holds(store, range(2))
    write(tmp_path, range(2, 6))
    assert_holds(Store(tmp_path), range(6))


def test_a_shard_is_flushed_to_the_disk_before_it_gets_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    happened: list[str] = []
    real_fsync, real_replace = os.fsync, Path.replace

    def fsync(descriptor: int) -> None:
        happened.append("folder" if os.path.isdir(f"/proc/self/fd/{descriptor}") else "file")
        real_fsync(descriptor)

    def replace(self: Path, target: Path) -> Path:
        happened.append("name")
        return real_replace(self, target)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(Path, "replace", replace)
    write(tmp_path, range(1))
    assert happened == ["file", "name", "folder"]


def test_two_writers_share_a_folder(tmp_path: Path) -> None:
    write(tmp_path, range(4))
    write(tmp_path, range(4, 8))
    assert_holds(Store(tmp_path), range(8))


def test_an_entry_written_twice_is_read_once(tmp_path: Path) -> None:
    write(tmp_path, range(3), per_shard=2)
    write(tmp_path, range(1, 4), per_shard=3)
    store = Store(tmp_path)
    assert len(store) == 4
    assert_holds(store, range(4))


def test_an_open_store_sees_new_shards_when_asked_to(tmp_path: Path) -> None:
    write(tmp_path, range(2))
    store = Store(tmp_path)
    write(tmp_path, range(2, 4))
    assert key_of(3) not in store
    store.refresh()
    assert_holds(store, range(4))


def test_a_damaged_shard_is_named_with_what_to_do(tmp_path: Path) -> None:
    write(tmp_path, range(2))
    (shard,) = tmp_path.iterdir()
    shard.write_bytes(shard.read_bytes()[:-4])
    with pytest.raises(ValueError, match="delete it and start again") as caught:
        Store(tmp_path)
    assert str(shard) in str(caught.value)


def test_nothing_added_writes_nothing(tmp_path: Path) -> None:
    ShardWriter(tmp_path).flush()
    assert list(tmp_path.iterdir()) == []


def test_keys_depend_on_every_part_and_on_where_parts_end() -> None:
    keys = [
        content_key(),
        content_key(""),
        content_key("", ""),
        content_key("ab", "c"),
        content_key("a", "bc"),
        content_key("abc"),
        content_key("c", "ab"),
        content_key('ab", "c'),
        content_key("Ab", "c"),
    ]
    assert len(set(keys)) == len(keys)
    assert all(len(key) == 32 and "." not in key for key in keys)
    assert content_key("a", "b") == content_key("a", "b")


def test_known_keys_stay_what_they_are() -> None:
    """A change here silently encodes every dataset anew."""
    assert content_key("a photo of a red fox") == GOLDEN_KEY


# python -c "from utils.data.cache import content_key; print(content_key('a photo of a red fox'))"
GOLDEN_KEY = "c50f3dafbef44143f62466490c1b0fbd"


# --- hashes of files ---------------------------------------------------------------------------------------------------


def test_a_hash_is_of_the_content_alone(tmp_path: Path) -> None:
    for name, content in (("a", b"fox"), ("b", b"fox"), ("c", b"owl")):
        (tmp_path / name).write_bytes(content)
    hashes = FileHashes(tmp_path / "memory.json")
    first, second, third = (hashes.hash_of(tmp_path / name) for name in "abc")
    assert first == second != third


def test_a_file_replaced_in_place_is_noticed(tmp_path: Path) -> None:
    """Same name, same size: only the time tells, down to its nanoseconds."""
    path = tmp_path / "picture.png"
    path.write_bytes(b"old content")
    stamp = path.stat().st_mtime_ns
    hashes = FileHashes(tmp_path / "memory.json")
    old = hashes.hash_of(path)
    hashes.save()
    path.write_bytes(b"new content")
    os.utime(path, ns=(stamp + 1, stamp + 1))
    assert hashes.hash_of(path) != old
    assert FileHashes(tmp_path / "memory.json").hash_of(path) != old


def test_a_file_of_another_size_is_noticed_whatever_its_time(tmp_path: Path) -> None:
    path = tmp_path / "picture.png"
    path.write_bytes(b"old content")
    stamp = path.stat().st_mtime_ns
    hashes = FileHashes(tmp_path / "memory.json")
    old = hashes.hash_of(path)
    path.write_bytes(b"newer content")
    os.utime(path, ns=(stamp, stamp))
    assert hashes.hash_of(path) != old


def test_an_unchanged_file_is_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "picture.png"
    path.write_bytes(b"content")
    hashes = FileHashes(tmp_path / "cache" / "memory.json")
    digest = hashes.hash_of(path)
    hashes.save()
    again = FileHashes(tmp_path / "cache" / "memory.json")

    def refuse(*_arguments: object, **_keywords: object) -> None:
        raise AssertionError("read again")

    monkeypatch.setattr(Path, "open", refuse)
    assert again.hash_of(path) == hashes.hash_of(path) == digest


@pytest.mark.parametrize("content", ["", '{"/a": [1, 2', "[]", '{"/a": 3}', "null"])
def test_a_damaged_memory_is_forgotten(tmp_path: Path, content: str) -> None:
    (tmp_path / "memory.json").write_text(content)
    path = tmp_path / "picture.png"
    path.write_bytes(b"content")
    hashes = FileHashes(tmp_path / "memory.json")
    digest = hashes.hash_of(path)
    hashes.save()
    assert FileHashes(tmp_path / "memory.json").hash_of(path) == digest


def test_saving_leaves_nothing_beside_the_memory(tmp_path: Path) -> None:
    (tmp_path / "picture.png").write_bytes(b"content")
    hashes = FileHashes(tmp_path / "cache" / "memory.json")
    hashes.save()
    assert not (tmp_path / "cache").exists()
    hashes.hash_of(tmp_path / "picture.png")
    hashes.save()
    assert [path.name for path in (tmp_path / "cache").iterdir()] == ["memory.json"]


def test_a_missing_file_is_an_os_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        FileHashes(tmp_path / "memory.json").hash_of(tmp_path / "none.png")


def test_two_runs_may_write_the_same_entries_at_once(tmp_path: Path) -> None:
    """As two runs do that start together with an empty cache: the shards have one name, the files being written not."""
    with multiprocessing.get_context("fork").Pool(2) as pool:
        pool.map(_write_often, [tmp_path, tmp_path], chunksize=1)
    assert_holds(Store(tmp_path), range(8))
    assert not list(tmp_path.glob(".*"))


def _write_often(folder: Path) -> None:
    for _ in range(25):
        write(folder, range(8))


def test_a_file_copied_over_with_its_old_time_is_hashed_again(tmp_path: Path) -> None:
    picture = tmp_path / "picture.png"
    picture.write_bytes(b"old")
    before = picture.stat()
    hashes = FileHashes(tmp_path / "files.json")
    first = hashes.hash_of(picture)
    picture.write_bytes(b"new")
    os.utime(picture, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert hashes.hash_of(picture) != first
