"""verify, prune and stats: damage is found, unused shards are deleted, used ones are kept."""

from __future__ import annotations

import os
import time
from pathlib import Path

import numpy as np
import pytest
from safetensors.torch import load_file

from tests.utils.data.cache.entries import assert_holds, files_in, key_of, shards_in, write
from tests.utils.data.cache.test_locks import USES, WRITES, kill, other_process
from utils.data.cache.__main__ import main
from utils.data.cache.locks import SharedLock
from utils.data.cache.maintenance import inspect_shards
from utils.data.cache.store import Store
from utils.files.columns import map_columns, save_columns

DAY_SECONDS = 86400


def make_old(path: Path, days: float) -> None:
    then = time.time() - days * DAY_SECONDS
    os.utime(path, (then, then))


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    """A cache that a run has used, with two encoders of two shards each."""
    SharedLock(tmp_path)
    write(tmp_path / "vae-0", range(4))
    write(tmp_path / "clip_l-1", range(4), group="captions")
    return tmp_path


# --- verify ------------------------------------------------------------------------------------------------------------


def test_verify_accepts_an_intact_cache(cache: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verify", str(cache)]) == 0
    output = capsys.readouterr().out
    assert output.startswith("8 entries, ")
    assert output.endswith(": 0 damaged shards\n")


@pytest.mark.parametrize("part", ["sequence", "pooled", "checksums", "keys"])
def test_verify_finds_one_flipped_bit(cache: Path, capsys: pytest.CaptureFixture[str], part: str) -> None:
    """Opening a store does not detect it, because a store reads keys only."""
    shard = shards_in(cache / "vae-0")[0]
    content = bytearray(shard.read_bytes())
    part_bytes = load_file(shard)[part].numpy().tobytes()
    content[content.index(part_bytes, len(content) - 300) + len(part_bytes) - 1] ^= 1
    shard.write_bytes(content)
    assert len(Store(cache / "vae-0")) == 4
    assert main(["verify", str(cache)]) == 1
    output = capsys.readouterr().out
    assert f"damaged: {shard}: " in output
    assert output.count("damaged: ") == 1
    assert f"1 damaged shards\n`python -m utils.data.cache prune {cache}` deletes them" in output


def test_a_flipped_bit_is_found_in_every_byte_of_a_shard(tmp_path: Path) -> None:
    write(tmp_path / "vae-0", range(1), per_shard=1)
    (shard,) = shards_in(tmp_path)
    whole = shard.read_bytes()
    for place in range(len(whole)):
        shard.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        (facts,) = inspect_shards(tmp_path, checksums=True)
        assert facts.damage is not None, f"byte {place} of {len(whole)}"


def test_damage_is_reported_with_the_number_of_entries(cache: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shard = shards_in(cache / "vae-0")[1]
    sequence = load_file(shard)["sequence"].numpy().tobytes()
    shard.write_bytes(shard.read_bytes().replace(sequence, b"\0" * (len(sequence) - 1) + b"\1"))
    assert main(["verify", str(cache)]) == 1
    assert "2 of 2 entries differ from their checksums" in capsys.readouterr().out


def test_a_missing_folder_is_reported(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for command in ("verify", "prune", "stats"):
        assert main([command, str(tmp_path / "none")]) == 1
        assert capsys.readouterr().err == f"{tmp_path / 'none'} is not a folder\n"
    assert not (tmp_path / "none").exists()


def test_a_folder_that_is_not_a_cache_is_not_touched(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Folders of models look like a cache whose shards are all damaged."""
    for name in ("sd3/vae/model.safetensors", "files/old.safetensors"):
        (tmp_path / name).parent.mkdir(parents=True)
        (tmp_path / name).write_bytes(b"weights")
        make_old(tmp_path / name, days=100)
    for command in ("verify", "prune", "stats"):
        assert main([command, str(tmp_path)]) == 1
        assert capsys.readouterr() == ("", f"{tmp_path} is not a cache: no run has used it as its cache_dir\n")
    assert files_in(tmp_path) == ["model.safetensors", "old.safetensors"]


def test_foreign_files_in_a_cache_are_kept(cache: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for folder in ("vae-0/32x32", "sd3/vae", "files"):
        (cache / folder).mkdir(parents=True, exist_ok=True)
        (cache / folder / "model.safetensors").write_bytes(b"weights")
        make_old(cache / folder / "model.safetensors", days=100)
    assert_holds(Store(cache / "vae-0"), range(4))
    assert main(["verify", str(cache)]) == main(["prune", str(cache)]) == 0
    assert files_in(cache).count("model.safetensors") == 3
    assert "0 damaged shards" in capsys.readouterr().out


@pytest.mark.parametrize("days", ["-1", "nan", "week"])
def test_invalid_numbers_of_days_are_rejected(cache: Path, days: str) -> None:
    with pytest.raises(SystemExit):
        main(["prune", "--unused-days", days, str(cache)])
    assert len(shards_in(cache)) == 4


def test_verify_accepts_an_empty_cache(tmp_path: Path) -> None:
    SharedLock(tmp_path)
    assert main(["verify", str(tmp_path)]) == 0


# --- prune -------------------------------------------------------------------------------------------------------------


def rebuilt_file(number: int) -> str:
    """Returns the name of a file in `files` or `datasets`."""
    return f"{number:032x}.safetensors"


def make_prunable(cache: Path) -> list[str]:
    """Damages a shard, ages one and leaves an incomplete one; returns the names of the files that `prune` must delete."""
    damaged, old = shards_in(cache / "vae-0")[0], shards_in(cache / "clip_l-1")[1]
    damaged.write_bytes(damaged.read_bytes()[:-1])
    make_old(old, days=31)
    for name, days in (("files", 40), ("datasets", 40), ("files", 20)):
        (cache / name).mkdir(exist_ok=True)
        path = cache / name / rebuilt_file(days)
        path.write_bytes(b"rebuilt when missing")
        make_old(path, days)
    with other_process(cache, WRITES) as dead:
        kill(dead)
    leftovers = [name for name in files_in(cache) if f"-{dead.pid}-" in name]
    return sorted([damaged.name, old.name, rebuilt_file(40), rebuilt_file(40), *leftovers])


def test_prune_deletes_damaged_unused_and_leftover_files_and_nothing_else(
    cache: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (cache / "files.json").write_text("{}")
    expected = make_prunable(cache)
    before = files_in(cache)
    assert main(["prune", str(cache)]) == 0
    remaining = files_in(cache)
    for name in expected:
        before.remove(name)
    assert sorted(remaining) == sorted(before)
    output = capsys.readouterr().out
    assert output.count("deleted /") == len(expected) == 7
    for reason in ("damaged", "not used for 31 days", "left by a run that was killed", "not used for 40 days"):
        assert f": {reason}\n" in output
    assert output.splitlines()[-1].startswith("7 files, ")
    assert main(["verify", str(cache)]) == 0
    assert len(Store(cache / "vae-0")) + len(Store(cache / "clip_l-1")) == 4


def test_a_dry_run_prints_the_same_files_and_deletes_nothing(cache: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_prunable(cache)
    before = files_in(cache)
    assert main(["prune", "--dry-run", str(cache)]) == 0
    assert files_in(cache) == before
    would = capsys.readouterr().out
    assert main(["prune", str(cache)]) == 0
    did = capsys.readouterr().out
    assert did == would.replace("would delete", "deleted").replace("would be freed", "freed") != would


def test_prune_deletes_what_verify_reports_as_damaged(cache: Path) -> None:
    """Including damage that only the checksums show."""
    shard = shards_in(cache / "vae-0")[0]
    shard.write_bytes(shard.read_bytes()[:-1] + b"\x99")
    assert main(["verify", str(cache)]) == 1
    assert main(["prune", str(cache)]) == 0
    assert not shard.exists()
    assert len(shards_in(cache)) == 3


def test_unused_days_is_an_option(cache: Path) -> None:
    make_old(shards_in(cache / "vae-0")[0], days=3)
    assert main(["prune", "--unused-days", "4", str(cache)]) == 0
    assert len(shards_in(cache)) == 4
    assert main(["prune", "--unused-days", "2", str(cache)]) == 0
    assert len(shards_in(cache)) == 3


def test_a_shard_that_a_run_has_used_is_not_pruned(cache: Path) -> None:
    for shard in shards_in(cache / "vae-0"):
        make_old(shard, days=100)
    store = Store(cache / "vae-0")
    store.mark_used(store.find(np.frombuffer(key_of(2), np.uint8).reshape(1, 16)))
    assert main(["prune", str(cache)]) == 0
    assert key_of(2) in Store(cache / "vae-0")
    assert len(Store(cache / "vae-0")) == 2, "the other entry of the same shard is kept as well"


def test_a_directory_scan_is_kept_as_long_as_it_is_read(cache: Path) -> None:
    paths = [cache / "files" / name for name in (rebuilt_file(1), rebuilt_file(2))]
    for path in paths:
        save_columns(path, {}, "")
        make_old(path, days=40)
    map_columns(paths[0])
    assert main(["prune", str(cache)]) == 0
    assert [path.exists() for path in paths] == [True, False]


@pytest.mark.parametrize("dry", [[], ["--dry-run"]])
def test_prune_deletes_nothing_while_another_process_uses_the_cache(
    cache: Path, capsys: pytest.CaptureFixture[str], dry: list[str]
) -> None:
    make_prunable(cache)
    with other_process(cache, USES):
        before = files_in(cache)
        assert main(["prune", *dry, str(cache)]) == 1
        assert files_in(cache) == before
    printed = capsys.readouterr()
    assert printed.err == f"{cache} is in use by a run; try again when the run has ended\n"
    assert printed.out == ""


def test_verify_and_stats_need_no_exclusive_lock(cache: Path) -> None:
    use = SharedLock(cache)
    assert main(["verify", str(cache)]) == main(["stats", str(cache)]) == 0
    assert_holds(Store(cache / "vae-0"), range(4))
    assert use


# --- stats -------------------------------------------------------------------------------------------------------------


def test_stats_count_by_encoder_and_group(cache: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(cache / "vae-0", range(4, 7), group="16x48", per_shard=1)
    for shard in shards_in(cache / "vae-0" / "16x48"):
        make_old(shard, days=12)
    assert main(["stats", str(cache)]) == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert lines[0] == ["encoder", "group", "shards", "entries", "size", "last", "used"]
    assert [line[:4] for line in lines[1:4]] == [
        ["clip_l-1", "captions", "2", "4"],
        ["vae-0", "16x48", "3", "3"],
        ["vae-0", "32x32", "2", "4"],
    ]
    assert lines[2][-3:] == ["12", "days", "ago"]
    assert lines[1][-1] == lines[3][-1] == "today"
    assert lines[4][:2] == ["3", "groups,"]
