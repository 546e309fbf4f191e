"""Looking after a cache: damage is found, what is used is kept."""

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
from utils.data.cache.locks import SharedUse
from utils.data.cache.maintenance import look_at_shards
from utils.data.cache.store import Store
from utils.data.columns import map_columns, save_columns

DAY_SECONDS = 86400


def make_old(path: Path, days: float) -> None:
    then = time.time() - days * DAY_SECONDS
    os.utime(path, (then, then))


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    """Two encoders with two shards each, of a cache that a run has used."""
    SharedUse(tmp_path)
    write(tmp_path / "vae-0", range(4))
    write(tmp_path / "clip_l-1", range(4), group="captions")
    return tmp_path


# --- verify ------------------------------------------------------------------------------------------------------------


def test_a_whole_cache_is_verified(cache: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verify", str(cache)]) == 0
    assert "8 entries in " in (said := capsys.readouterr().out)
    assert said.endswith(": 0 damaged shards\n")


@pytest.mark.parametrize("part", ["sequence", "pooled", "checksums", "keys"])
def test_one_flipped_bit_is_found(cache: Path, capsys: pytest.CaptureFixture[str], part: str) -> None:
    """A store does not see it: it reads what it is asked for and no more."""
    shard = shards_in(cache / "vae-0")[0]
    content = bytearray(shard.read_bytes())
    wanted = load_file(shard)[part].numpy().tobytes()
    content[content.index(wanted, len(content) - 300) + len(wanted) - 1] ^= 1
    shard.write_bytes(content)
    assert len(Store(cache / "vae-0")) == 4
    assert main(["verify", str(cache)]) == 1
    said = capsys.readouterr().out
    assert f"damaged: {shard}: " in said
    assert said.count("damaged: ") == 1
    assert f"1 damaged shards\n`python -m utils.data.cache prune {cache}` removes them" in said


def test_a_flipped_bit_is_found_wherever_it_is(tmp_path: Path) -> None:
    write(tmp_path / "vae-0", range(1), per_shard=1)
    (shard,) = shards_in(tmp_path)
    whole = shard.read_bytes()
    for place in range(len(whole)):
        shard.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        (facts,) = look_at_shards(tmp_path, checksums=True)
        assert facts.damage is not None, f"byte {place} of {len(whole)}"


def test_damage_says_how_many_entries(cache: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shard = shards_in(cache / "vae-0")[1]
    sequence = load_file(shard)["sequence"].numpy().tobytes()
    shard.write_bytes(shard.read_bytes().replace(sequence, b"\0" * (len(sequence) - 1) + b"\1"))
    assert main(["verify", str(cache)]) == 1
    assert "2 of 2 entries are not what was written" in capsys.readouterr().out


def test_a_folder_that_is_not_there_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for command in ("verify", "prune", "stats"):
        assert main([command, str(tmp_path / "none")]) == 1
        assert capsys.readouterr().err == f"{tmp_path / 'none'} is no folder\n"
    assert not (tmp_path / "none").exists()


def test_a_folder_that_is_no_cache_is_left_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Models lie in folders like a cache's, and to a cache they are damaged shards."""
    for name in ("sd3/vae/model.safetensors", "files/old.safetensors"):
        (tmp_path / name).parent.mkdir(parents=True)
        (tmp_path / name).write_bytes(b"weights")
        make_old(tmp_path / name, days=100)
    for command in ("verify", "prune", "stats"):
        assert main([command, str(tmp_path)]) == 1
        assert capsys.readouterr() == ("", f"{tmp_path} is no cache: no run has ever used it as its cache_dir\n")
    assert files_in(tmp_path) == ["model.safetensors", "old.safetensors"]


def test_files_of_others_in_a_cache_are_left_alone(cache: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for folder in ("vae-0/32x32", "sd3/vae", "files"):
        (cache / folder).mkdir(parents=True, exist_ok=True)
        (cache / folder / "model.safetensors").write_bytes(b"weights")
        make_old(cache / folder / "model.safetensors", days=100)
    assert_holds(Store(cache / "vae-0"), range(4))
    assert main(["verify", str(cache)]) == main(["prune", str(cache)]) == 0
    assert files_in(cache).count("model.safetensors") == 3
    assert "0 damaged shards" in capsys.readouterr().out


@pytest.mark.parametrize("days", ["-1", "nan", "week"])
def test_days_that_are_none_are_refused(cache: Path, days: str) -> None:
    with pytest.raises(SystemExit):
        main(["prune", "--unused-days", days, str(cache)])
    assert len(shards_in(cache)) == 4


def test_an_empty_cache_is_whole(tmp_path: Path) -> None:
    SharedUse(tmp_path)
    assert main(["verify", str(tmp_path)]) == 0


# --- prune -------------------------------------------------------------------------------------------------------------


def remembered(number: int) -> str:
    """Name of a file in `files` or `datasets`."""
    return f"{number:032x}.safetensors"


def make_prunable(cache: Path) -> list[str]:
    """Damage a shard, make one old and leave an unfinished one; returns the names of what is to go."""
    damaged, old = shards_in(cache / "vae-0")[0], shards_in(cache / "clip_l-1")[1]
    damaged.write_bytes(damaged.read_bytes()[:-1])
    make_old(old, days=31)
    for name, days in (("files", 40), ("datasets", 40), ("files", 20)):
        (cache / name).mkdir(exist_ok=True)
        path = cache / name / remembered(days)
        path.write_bytes(b"remembered")
        make_old(path, days)
    with other_process(cache, WRITES) as dead:
        kill(dead)
    leftovers = [name for name in files_in(cache) if f"-{dead.pid}-" in name]
    return sorted([damaged.name, old.name, remembered(40), remembered(40), *leftovers])


def test_pruning_deletes_what_is_damaged_unused_or_left_over_and_nothing_else(
    cache: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (cache / "files.json").write_text("{}")
    doomed = make_prunable(cache)
    before = files_in(cache)
    assert main(["prune", str(cache)]) == 0
    left = files_in(cache)
    for name in doomed:
        before.remove(name)
    assert sorted(left) == sorted(before)
    said = capsys.readouterr().out
    assert said.count("deleted /") == len(doomed) == 7
    for reason in (": damaged\n", ": not used for 31 days\n", ": left by a run that was killed\n", ": not used any more\n"):
        assert reason in said
    assert said.splitlines()[-1].startswith("7 files, ")
    assert main(["verify", str(cache)]) == 0
    assert len(Store(cache / "vae-0")) + len(Store(cache / "clip_l-1")) == 4


def test_a_dry_run_deletes_nothing_and_says_the_same(cache: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_prunable(cache)
    before = files_in(cache)
    assert main(["prune", "--dry-run", str(cache)]) == 0
    assert files_in(cache) == before
    would = capsys.readouterr().out
    assert main(["prune", str(cache)]) == 0
    did = capsys.readouterr().out
    assert did == would.replace("would delete", "deleted").replace("could be had", "deleted") != would


def test_pruning_deletes_what_verify_calls_damaged(cache: Path) -> None:
    """Also where only the checksums tell."""
    shard = shards_in(cache / "vae-0")[0]
    shard.write_bytes(shard.read_bytes()[:-1] + b"\x99")
    assert main(["verify", str(cache)]) == 1
    assert main(["prune", str(cache)]) == 0
    assert not shard.exists()
    assert len(shards_in(cache)) == 3


def test_how_long_is_long_can_be_said(cache: Path) -> None:
    make_old(shards_in(cache / "vae-0")[0], days=3)
    assert main(["prune", "--unused-days", "4", str(cache)]) == 0
    assert len(shards_in(cache)) == 4
    assert main(["prune", "--unused-days", "2", str(cache)]) == 0
    assert len(shards_in(cache)) == 3


def test_a_run_that_uses_a_shard_keeps_it_from_being_pruned(cache: Path) -> None:
    for shard in shards_in(cache / "vae-0"):
        make_old(shard, days=100)
    store = Store(cache / "vae-0")
    store.mark_used(store.find(np.frombuffer(key_of(2), np.uint8).reshape(1, 16)))
    assert main(["prune", str(cache)]) == 0
    assert key_of(2) in Store(cache / "vae-0")
    assert len(Store(cache / "vae-0")) == 2, "its neighbour in the shard stays with it"


def test_what_is_remembered_of_a_dataset_stays_as_long_as_it_is_looked_at(cache: Path) -> None:
    paths = [cache / "files" / name for name in (remembered(1), remembered(2))]
    for path in paths:
        save_columns(path, {}, "")
        make_old(path, days=40)
    map_columns(paths[0])
    assert main(["prune", str(cache)]) == 0
    assert [path.exists() for path in paths] == [True, False]


@pytest.mark.parametrize("dry", [[], ["--dry-run"]])
def test_nothing_is_pruned_while_another_process_uses_the_cache(
    cache: Path, capsys: pytest.CaptureFixture[str], dry: list[str]
) -> None:
    make_prunable(cache)
    with other_process(cache, USES):
        before = files_in(cache)
        assert main(["prune", *dry, str(cache)]) == 1
        assert files_in(cache) == before
    printed = capsys.readouterr()
    assert printed.err == f"{cache} is in use by a run; try again when it has ended\n"
    assert printed.out == ""


def test_looking_does_not_need_a_cache_alone(cache: Path) -> None:
    use = SharedUse(cache)
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
    assert lines[0] == ["encoder", "of", "shards", "entries", "room", "used"]
    assert [line[:4] for line in lines[1:4]] == [
        ["clip_l-1", "captions", "2", "4"],
        ["vae-0", "16x48", "3", "3"],
        ["vae-0", "32x32", "2", "4"],
    ]
    assert lines[2][-3:] == ["12", "days", "ago"]
    assert lines[1][-1] == lines[3][-1] == "today"
    assert lines[4][:2] == ["3", "groups,"]
