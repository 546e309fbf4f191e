"""Column storage: round trips, memory mapping and detection of damage."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from safetensors import SafetensorError

from utils.files.atomic import replace_file
from utils.files.columns import FileBlock, Texts, is_intact, map_columns, map_tensors, save_columns, tensor_place

ODD = ["", "fox", "", "Füchse 狐 🦊", "a\nline\0and", os.fsdecode(b"\xff\xfe.png"), "e\u0301", ""]


def test_strings_round_trip() -> None:
    texts = Texts.of(ODD)
    assert len(texts) == len(ODD)
    assert list(texts) == ODD
    assert [texts[index] for index in range(len(ODD))] == ODD
    assert os.fsencode(texts[5]) == b"\xff\xfe.png"


@pytest.mark.parametrize("strings", [[], [""], ["", ""]])
def test_empty_lists_and_empty_strings_round_trip(strings: Sequence[str]) -> None:
    assert list(Texts.of(strings)) == strings


def test_equality_compares_characters_and_boundaries() -> None:
    assert Texts.of(["ab", "c"]) == Texts.of(iter(["ab", "c"]))
    assert Texts.of(["ab", "c"]) != Texts.of(["a", "bc"])
    assert Texts.of(["ab", "c"]) != Texts.of(["ab", "d"])
    assert Texts.of([]) != Texts.of([""])
    assert Texts.of([]) != []


@pytest.mark.parametrize("pattern", [[True], [False], [True, False], [False, True, True]])
def test_selection_keeps_the_order(pattern: list[bool]) -> None:
    chosen = np.resize(np.array(pattern), len(ODD))
    assert Texts.of(ODD).where(chosen) == Texts.of(text for text, keep in zip(ODD, chosen, strict=True) if keep)


def test_selected_parts_can_be_concatenated() -> None:
    some = Texts.of(ODD).where(np.arange(len(ODD)) % 2 == 1)
    assert list(Texts.concatenate([some, Texts.of([]), Texts.of(["last"])])) == [*ODD[1::2], "last"]
    assert list(Texts.concatenate([])) == []


def in_file(strings: Sequence[str], folder: Path) -> Texts:
    """Returns the strings, with their characters left in a file."""
    texts = Texts.of(strings)
    path = folder / "texts.safetensors"
    save_columns(path, {"before": np.arange(3), "block": texts.block[:], "offsets": texts.offsets}, "")
    return Texts(map_columns(path)[0]["offsets"], FileBlock(path, *tensor_place(path, "block")))


@pytest.mark.parametrize("strings", [ODD, [], [""]])
def test_strings_read_from_their_file_on_access_are_equal(tmp_path: Path, strings: list[str]) -> None:
    texts, left = Texts.of(strings), in_file(strings, tmp_path)
    assert list(left) == [left[index] for index in range(len(strings))] == strings
    assert left == texts
    assert texts == left
    chosen = np.arange(len(strings)) % 3 == 1
    assert left.where(chosen) == texts.where(chosen)
    assert Texts.concatenate([left, texts]) == Texts.concatenate([texts, left]) == Texts.of(strings + strings)


def test_short_reads_still_return_complete_strings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Linux reads at most 2 GiB at once; a network drive may return less."""
    real_pread = os.pread
    monkeypatch.setattr(os, "pread", lambda descriptor, length, place: real_pread(descriptor, min(length, 3), place))
    assert list(in_file(ODD, tmp_path)) == ODD


def test_truncated_string_file_raises_an_error(tmp_path: Path) -> None:
    left = in_file(["fox", "owl"], tmp_path)
    path = tmp_path / "texts.safetensors"
    os.truncate(path, path.stat().st_size - 1)
    assert left[0] == "fox"
    with pytest.raises(OSError, match="is truncated"):
        left[1]


def test_strings_in_a_file_use_no_memory_and_close_the_file(tmp_path: Path) -> None:
    before = len(os.listdir("/proc/self/fd"))
    left = in_file(["x" * (1 << 22), "fox"], tmp_path)
    assert left[1] == "fox"
    path = tmp_path / "texts.safetensors"
    assert _resident_kilobytes(path) < 1024
    path.unlink()
    assert left[1] == "fox", "an open file can still be read after it is deleted"
    del left
    assert len(os.listdir("/proc/self/fd")) == before


# --- files -------------------------------------------------------------------------------------------------------------

COLUMNS: dict[str, np.ndarray] = {
    "numbers": np.arange(6, dtype=np.int64).reshape(3, 2),
    "bytes": np.arange(5, dtype=np.uint8),
    "shares": np.array([0.1, 1e300]),
    "nothing": np.zeros((0, 16), np.uint8),
    "turned": np.arange(6, dtype=np.int32).reshape(2, 3).T,
    "every other": np.arange(10, dtype=np.int32)[::2],
}


def assert_equal(columns: dict[str, np.ndarray]) -> None:
    assert columns.keys() == COLUMNS.keys()
    for name, column in columns.items():
        assert column.dtype == COLUMNS[name].dtype
        assert column.shape == COLUMNS[name].shape
        assert np.array_equal(column, COLUMNS[name])


def test_columns_and_header_round_trip(tmp_path: Path) -> None:
    path = tmp_path / "new folder" / "table.safetensors"
    save_columns(path, COLUMNS, '{"name": "Füchse"}')
    columns, header = map_columns(path)
    assert_equal(columns)
    assert header == '{"name": "Füchse"}'
    assert [file.name for file in path.parent.iterdir()] == [path.name]


def test_read_only_and_overlapping_columns_are_saved(tmp_path: Path) -> None:
    """Such as columns mapped from another file, and slices of one array."""
    path = tmp_path / "table.safetensors"
    save_columns(path, COLUMNS, "")
    mapped, _ = map_columns(path)
    fixed = np.arange(5)
    fixed.flags.writeable = False
    save_columns(tmp_path / "other.safetensors", {**mapped, "fixed": fixed, "part": fixed[1:], "again": fixed}, "")
    columns, _ = map_columns(tmp_path / "other.safetensors")
    assert columns.pop("fixed").tolist() == columns.pop("again").tolist() == [0, 1, 2, 3, 4]
    assert columns.pop("part").tolist() == [1, 2, 3, 4]
    assert_equal(columns)


def test_mapped_file_can_be_overwritten_with_its_own_columns(tmp_path: Path) -> None:
    path = tmp_path / "table.safetensors"
    save_columns(path, COLUMNS, "old")
    columns, _ = map_columns(path)
    save_columns(path, {**columns, "bytes": columns["bytes"] + 1}, "new")
    assert_equal(columns)
    again, header = map_columns(path)
    assert header == "new"
    assert again["bytes"].tolist() == [1, 2, 3, 4, 5]


def test_failed_write_keeps_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "table.safetensors"
    save_columns(path, COLUMNS, "old")

    def stop(temporary: Path, target: Path) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("utils.files.columns.replace_file", stop)
    with pytest.raises(KeyboardInterrupt):
        save_columns(path, {}, "new")
    columns, header = map_columns(path)
    assert_equal(columns)
    assert header == "old"


def test_concurrent_writers_with_the_same_process_id_do_not_conflict(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "table.safetensors"

    def meanwhile(temporary: Path, target: Path) -> None:
        monkeypatch.setattr("utils.files.columns.replace_file", replace_file)
        save_columns(path, {}, "the other's")
        assert map_columns(path) == ({}, "the other's")
        replace_file(temporary, target)

    monkeypatch.setattr("utils.files.columns.replace_file", meanwhile)
    save_columns(path, COLUMNS, "this one's")
    assert map_columns(path)[1] == "this one's"
    assert list(tmp_path.iterdir()) == [path]


def test_mapped_table_is_read_lazily_and_keeps_no_file_open(tmp_path: Path) -> None:
    path = tmp_path / "table.safetensors"
    save_columns(path, {"large": np.zeros(1 << 22, np.uint8)}, "")
    before = len(os.listdir("/proc/self/fd"))
    columns, _ = map_columns(path)
    assert len(os.listdir("/proc/self/fd")) == before
    assert _resident_kilobytes(path) < 1024
    assert columns["large"].sum() == 0
    assert _resident_kilobytes(path) > 4000
    del columns
    assert str(path) not in Path("/proc/self/maps").read_text()


def _resident_kilobytes(path: Path) -> int:
    """Returns the resident memory of this process's mappings of the file, in KiB."""
    lines = iter(Path("/proc/self/smaps").read_text().splitlines())
    found = 0
    for line in lines:
        if line.endswith(str(path)):
            found += next(int(fact.split()[1]) for fact in lines if fact.startswith("Rss:"))
    return found


def test_mapping_a_table_updates_its_modification_time_once_a_day(tmp_path: Path) -> None:
    """Otherwise `prune` would delete unchanged files that are still in use."""
    path = tmp_path / "table.safetensors"
    save_columns(path, COLUMNS, "")
    for age_seconds, is_marked in ((40 * 86400, True), (3600, False)):
        then = time.time() - age_seconds
        os.utime(path, (then, then))
        map_columns(path)
        assert (path.stat().st_mtime > then + 1) == is_marked


def test_any_flipped_bit_is_detected(tmp_path: Path) -> None:
    path = tmp_path / "table.safetensors"
    assert not is_intact(path)
    save_columns(path, COLUMNS, "header")
    assert is_intact(path)
    content = path.read_bytes()
    for place in range(len(content)):
        path.write_bytes(content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :])
        assert not is_intact(path), f"byte {place} of {len(content)}"


@pytest.mark.parametrize("content", [b"", b"nothing", b"\0" * 1000])
def test_invalid_table_file_raises_an_error(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "table.safetensors"
    path.write_bytes(content)
    with pytest.raises((SafetensorError, OSError)):
        map_tensors(path)
