"""Shards are complete or absent, whatever happens to their writer."""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from tests.utils.data.cache.entries import (
    ENTRY_BYTES,
    GROUP,
    assert_holds,
    entry,
    files_in,
    key_of,
    shards_in,
    write,
    write_one,
)
from utils.data.cache import shards
from utils.data.cache.shards import (
    CHECKSUMS,
    KEYS,
    CacheWriteError,
    DamagedShard,
    ShardWriter,
    checksum,
    map_shard,
    shard_name,
)
from utils.data.cache.store import Store

ROOT = Path(__file__).resolve().parents[4]


def test_written_entries_are_read_back(tmp_path: Path) -> None:
    write(tmp_path, range(7))
    store = Store(tmp_path)
    assert len(store) == 7
    assert_holds(store, range(7))
    assert len(shards_in(tmp_path / GROUP)) == len(files_in(tmp_path)) == 4


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.float8_e4m3fn])
def test_tensors_keep_dtype_and_shape(tmp_path: Path, dtype: torch.dtype) -> None:
    value = torch.arange(24).view(2, 3, 4).to(dtype)
    write_one(tmp_path, key_of(0), {"latents": value, "view": value.transpose(0, 2), "number": value[0, 0, 1]})
    read = Store(tmp_path).get(key_of(0))
    assert {tensor.dtype for tensor in read.values()} == {dtype}
    assert torch.equal(read["latents"].float(), value.float())
    assert torch.equal(read["view"].float(), value.transpose(0, 2).float())
    assert read["number"].shape == ()
    assert read["number"].float() == 1


def test_flush_without_entries_writes_nothing(tmp_path: Path) -> None:
    ShardWriter(tmp_path, "writer").flush()
    assert list(tmp_path.iterdir()) == []


def test_a_shard_is_written_when_it_has_max_bytes(tmp_path: Path) -> None:
    writer = ShardWriter(tmp_path, "writer", max_bytes=2 * ENTRY_BYTES, max_seconds=1e9)
    writer.add(GROUP, key_of(0), entry(0))
    assert list(tmp_path.iterdir()) == []
    writer.add(GROUP, key_of(1), entry(1))
    assert_holds(Store(tmp_path), range(2))


def test_max_bytes_limits_all_groups_together_and_each_group_has_its_own_folder(tmp_path: Path) -> None:
    """Otherwise a dataset of a hundred buckets would keep a hundred shards in memory."""
    writer = ShardWriter(tmp_path, "writer", max_bytes=100, max_seconds=1e9)
    writer.add("32x32", key_of(0), {"x": torch.zeros(10)})
    writer.add("16x48", key_of(1), {"x": torch.ones(5)})
    assert list(tmp_path.iterdir()) == []
    writer.add("16x48", key_of(2), {"x": torch.zeros(10)[:10:2]})
    assert [path.parent.name for path in shards_in(tmp_path)] == []
    writer.add("32x32", key_of(3), {"x": torch.ones(10)})
    assert sorted(path.parent.name for path in shards_in(tmp_path)) == ["16x48", "32x32"]
    store = Store(tmp_path)
    assert [store.get(key_of(index))["x"].tolist() for index in range(4)] == [[0] * 10, [1] * 5, [0] * 5, [1] * 10]


def test_a_shard_is_written_when_its_oldest_entry_has_max_seconds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr("utils.data.cache.shards.time.monotonic", lambda: now[0])
    writer = ShardWriter(tmp_path, "writer", max_seconds=20)
    for seconds, group, num_written in ((0.0, "a", 0), (19.0, "b", 0), (20.0, "b", 3), (39.0, "a", 3), (60.0, "b", 5)):
        now[0] = seconds
        writer.add(group, key_of(int(seconds)), {"x": torch.zeros(1)})
        assert len(Store(tmp_path)) == num_written, f"after {seconds} seconds"


def test_an_entry_that_is_added_twice_is_written_once(tmp_path: Path) -> None:
    write(tmp_path, [0, 1, 0], per_shard=4)
    assert len(Store(tmp_path)) == 2


def test_a_checksum_depends_on_names_and_bytes_and_not_on_strides() -> None:
    tensors = {"a": torch.arange(6.0).view(2, 3), "b": torch.tensor(1)}
    plain = checksum(tensors)
    assert checksum(dict(reversed(tensors.items()))) == plain
    assert checksum({**tensors, "a": tensors["a"].T.contiguous().T}) == plain
    changed = torch.arange(6.0).view(2, 3)
    changed[1, 2] = 5.0000005
    others = [{**tensors, "a": changed}, {"a": tensors["a"], "c": tensors["b"]}, {"a": tensors["a"]}]
    assert plain not in {checksum(other) for other in others}


# --- killed and concurrent writers -------------------------------------------------------------------------------------

KILLED = """
import sys
from pathlib import Path
from tests.utils.data.cache.entries import write
from utils.data.cache import shards

folder = Path(sys.argv[1])
real_save = shards.save_file

def save_half(tensors, path, metadata):
    real_save(tensors, path, metadata)
    if list(folder.glob("*/*.safetensors")):
        content = path.read_bytes()
        path.write_bytes(content[: len(content) // 2])
        print("half", flush=True)
        sys.stdin.read()

shards.save_file = save_half
write(folder, range(100))
"""


def test_a_killed_writer_leaves_no_incomplete_shard_and_loses_only_the_one_being_written(tmp_path: Path) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", KILLED, str(tmp_path)], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "half\n"
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert len(files_in(tmp_path)) == 2, "a complete shard and half of one"
    store = Store(tmp_path)
    assert len(store) == 2
    assert_holds(store, range(2))
    write(tmp_path, range(2, 6))
    assert_holds(Store(tmp_path), range(6))


def test_a_shard_is_flushed_to_disk_before_it_is_renamed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    real_fsync, real_replace = os.fsync, Path.replace

    def fsync(descriptor: int) -> None:
        calls.append("folder" if os.path.isdir(f"/proc/self/fd/{descriptor}") else "file")
        real_fsync(descriptor)

    def replace(self: Path, target: Path) -> Path:
        calls.append("name")
        return real_replace(self, target)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(Path, "replace", replace)
    write(tmp_path, range(1))
    assert calls == ["file", "name", "folder"]


@pytest.mark.parametrize("step", ["save_file", "replace_file"])
@pytest.mark.parametrize("error", [OSError(28, "No space left"), SafetensorError("I/O error: No space left")])
def test_a_full_disk_raises_an_error_with_the_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str, error: Exception
) -> None:
    def fail(*_arguments: object) -> None:
        raise error

    write(tmp_path, range(2))
    monkeypatch.setattr(shards, step, fail)
    with pytest.raises(
        CacheWriteError, match=f"cannot write to {tmp_path / GROUP} .*No space left.*next run keeps the entries"
    ):
        write(tmp_path, range(2, 4))
    assert_holds(Store(tmp_path), range(2))


def test_names_of_incomplete_files_contain_the_writer_and_are_not_shard_names(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`remove_leftovers` finds the files of a dead writer by this name."""

    def stop(temporary: Path, path: Path) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("utils.data.cache.shards.replace_file", stop)
    with pytest.raises(KeyboardInterrupt):
        write(tmp_path, range(2), writer="host-1-abc")
    (name,) = files_in(tmp_path)
    assert name.startswith(".")
    assert name.endswith(".host-1-abc.tmp")
    assert len(Store(tmp_path)) == 0


def test_several_writers_write_to_one_folder_at_the_same_time(tmp_path: Path) -> None:
    """Two write the same entries, and so the same file names, like two runs that start together with an empty cache."""
    jobs = [(tmp_path, "one", 0), (tmp_path, "two", 0), (tmp_path, "three", 8)]
    with multiprocessing.get_context("fork").Pool(3) as pool:
        pool.map(_write_often, jobs, chunksize=1)
    store = Store(tmp_path)
    assert len(store) == 16
    assert_holds(store, range(16))
    assert not list(tmp_path.rglob(".*"))


def _write_often(job: tuple[Path, str, int]) -> None:
    folder, writer, first = job
    for _ in range(20):
        write(folder, range(first, first + 8), writer=writer)


# --- damage ------------------------------------------------------------------------------------------------------------


def _foreign(path: Path) -> None:
    save_file({"weight": torch.zeros(3)}, path)


def _with_another_version(path: Path) -> None:
    save_file(load_file(path), path, {"format": "mmdit-pipe cache", "version": "2"})


def _without_checksums(path: Path) -> None:
    path.write_bytes(path.read_bytes().replace(b'"checksums"', b'"checksunk"'))


DAMAGE = {
    "cut off": lambda path: path.write_bytes(path.read_bytes()[:-4]),
    "empty": lambda path: path.write_bytes(b""),
    "zeros": lambda path: path.write_bytes(bytes(path.stat().st_size)),
    "not safetensors": lambda path: path.write_text("plain text, longer than eight bytes"),
    "foreign": _foreign,
    "another version": _with_another_version,
    "without checksums": _without_checksums,
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_a_damaged_shard_is_reported_with_the_command_that_deletes_it(tmp_path: Path, kind: str) -> None:
    folder = tmp_path / "vae-0"
    write(folder, range(2))
    (shard,) = shards_in(folder)
    DAMAGE[kind](shard)
    with pytest.raises(DamagedShard) as caught:
        Store(folder)
    assert str(caught.value).startswith(f"{shard} is damaged (")
    assert f"`python -m utils.data.cache prune {tmp_path}` deletes it; the next run encodes its entries again" in str(
        caught.value
    )


def test_a_shard_with_tensors_of_different_lengths_is_damaged(tmp_path: Path) -> None:
    write(tmp_path, range(2))
    (shard,) = shards_in(tmp_path)
    tensors = load_file(shard)
    save_file({**tensors, "pooled": torch.zeros(3, 2)}, shard, {"format": "mmdit-pipe cache", "version": "1"})
    with pytest.raises(DamagedShard, match="its tensors have different numbers of entries"):
        map_shard(shard)


def test_the_name_of_a_shard_does_not_depend_on_the_order_of_its_keys(tmp_path: Path) -> None:
    write(tmp_path, [2, 0, 1], per_shard=3)
    (shard,) = shards_in(tmp_path)
    assert shard.stem == shard_name(key_of(index) for index in range(3)) != shard_name([key_of(0), key_of(1)])
    tensors = map_shard(shard)
    assert [row.numpy().tobytes() for row in tensors[KEYS]] == [key_of(index) for index in (2, 0, 1)]
    assert [row.numpy().tobytes() for row in tensors[CHECKSUMS]] == [checksum(entry(index)) for index in (2, 0, 1)]
