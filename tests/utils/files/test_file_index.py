"""The file index: unchanged files are read once, changed files again, and a lost or damaged index changes no result."""

from __future__ import annotations

import hashlib
import json
import os
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from utils.files.columns import Texts
from utils.files.file_index import HASHES, FileIndex, FileTable, StoredHashes, are_unchanged, match_rows, stamp_of


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "image.png"
    path.write_bytes(b"old content")
    return path


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """The folder of the index, which does not exist yet."""
    return tmp_path / "cache"


def stored_hash(folder: Path, path: Path) -> str:
    """Hashes a file with an index of its own, and saves the index."""
    index = FileIndex(folder)
    digest = index.hash_of(path)
    index.save()
    return digest


# --- hashes of single files --------------------------------------------------------------------------------------------


def test_a_hash_depends_on_the_content_alone(tmp_path: Path, folder: Path) -> None:
    for name, content in (("a", b"fox"), ("b", b"fox"), ("c", b"owl")):
        (tmp_path / name).write_bytes(content)
    index = FileIndex(folder)
    first, second, third = (index.hash_of(tmp_path / name) for name in "abc")
    assert first == second != third
    assert first == hashlib.blake2b(b"fox", digest_size=16).hexdigest()
    assert index.hash_of(tmp_path / "a", "sha256") == hashlib.sha256(b"fox").hexdigest()


def test_a_file_replaced_in_place_is_hashed_again(image: Path, folder: Path) -> None:
    """Name and size are equal; only mtime differs, by one nanosecond."""
    stamp = image.stat().st_mtime_ns
    index = FileIndex(folder)
    old = index.hash_of(image)
    index.save()
    image.write_bytes(b"new content")
    os.utime(image, ns=(stamp + 1, stamp + 1))
    assert index.hash_of(image) != old
    assert FileIndex(folder).hash_of(image) != old


def test_a_file_of_another_size_is_hashed_again_whatever_its_mtime(image: Path, folder: Path) -> None:
    stamp = image.stat().st_mtime_ns
    index = FileIndex(folder)
    old = index.hash_of(image)
    image.write_bytes(b"newer content")
    os.utime(image, ns=(stamp, stamp))
    assert index.hash_of(image) != old


def test_a_file_whose_mtime_was_set_back_is_hashed_again(image: Path, folder: Path) -> None:
    before = image.stat()
    index = FileIndex(folder)
    old = index.hash_of(image)
    image.write_bytes(b"new content")
    os.utime(image, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert index.hash_of(image) != old


def refuse(*_arguments: object, **_keywords: object) -> None:
    raise AssertionError("read again")


@pytest.mark.parametrize("algorithm", ["blake2b", "sha256"])
def test_an_unchanged_file_is_read_once(image: Path, folder: Path, monkeypatch: pytest.MonkeyPatch, algorithm: Any) -> None:
    index = FileIndex(folder)
    digest = index.hash_of(image, algorithm)
    index.save()
    again = FileIndex(folder)
    monkeypatch.setattr(Path, "open", refuse)
    assert again.hash_of(image, algorithm) == index.hash_of(image, algorithm) == digest


def test_each_algorithm_has_its_own_hash(image: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    index = FileIndex(folder)
    first = index.hash_of(image)
    second = index.hash_of(image, "sha256")
    index.save()
    again = FileIndex(folder)
    monkeypatch.setattr(Path, "open", refuse)
    assert (again.hash_of(image), again.hash_of(image, "sha256")) == (first, second)


def test_hashes_of_earlier_versions_are_used(image: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder.mkdir()
    (folder / "files.json").write_text(json.dumps({str(image): [*stamp_of(image), "0123"]}))
    index = FileIndex(folder)
    monkeypatch.setattr(Path, "open", refuse)
    assert index.hash_of(image) == "0123"


DAMAGED = ["", '{"/a": [1, 2', "[]", '{"/a": 3}', '{"PATH": 3}', "null", '{"PATH": {"stamp": [1], "hashes": {}}}', "\xff"]


@pytest.mark.parametrize("content", DAMAGED)
def test_a_damaged_index_is_ignored_and_replaced(image: Path, folder: Path, content: str) -> None:
    folder.mkdir()
    (folder / "files.json").write_bytes(content.replace("PATH", str(image)).encode("latin-1"))
    digest = stored_hash(folder, image)
    assert FileIndex(folder).hash_of(image) == digest == hashlib.blake2b(b"old content", digest_size=16).hexdigest()
    assert json.loads((folder / "files.json").read_text()).keys() == {str(image)}


def test_saving_leaves_no_other_file(image: Path, folder: Path) -> None:
    index = FileIndex(folder)
    index.save()
    assert not folder.exists(), "there is nothing to save"
    index.hash_of(image)
    index.save()
    assert [path.name for path in folder.iterdir()] == ["files.json"]


def test_hashes_of_changed_and_missing_files_are_dropped(tmp_path: Path, folder: Path) -> None:
    paths = [tmp_path / name for name in ("kept", "changed", "missing", "new")]
    for path in paths:
        path.write_bytes(b"content")
    for path in paths[:3]:
        stored_hash(folder, path)
    paths[1].write_bytes(b"other content")
    paths[2].unlink()
    stored_hash(folder, paths[3])
    assert json.loads((folder / "files.json").read_text()).keys() == {str(paths[0]), str(paths[3])}


def test_two_indexes_of_one_folder_keep_the_hashes_of_both(tmp_path: Path, folder: Path) -> None:
    """Two runs that share a cache each save what they have hashed."""
    paths = [tmp_path / "a", tmp_path / "b"]
    indexes = [FileIndex(folder), FileIndex(folder)]
    for path, index in zip(paths, indexes, strict=True):
        path.write_bytes(b"content")
        index.hash_of(path)
    for index in indexes:
        index.save()
    assert json.loads((folder / "files.json").read_text()).keys() == {str(path) for path in paths}


def test_threads_may_share_an_index(tmp_path: Path, folder: Path) -> None:
    paths = [tmp_path / str(number) for number in range(32)]
    for path in paths:
        path.write_bytes(path.name.encode() * 1000)
    index, barrier = FileIndex(folder), threading.Barrier(8)

    def work(number: int) -> None:
        barrier.wait()
        for path in paths[number % 4 :: 2]:
            assert index.hash_of(path) == hashlib.blake2b(path.read_bytes(), digest_size=16).hexdigest()
            index.save()

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(work, range(8)))
    assert json.loads((folder / "files.json").read_text()).keys() == {str(path) for path in paths}


@pytest.mark.parametrize("may_write", [True, False])
def test_an_index_without_folder_or_write_access_writes_nothing(image: Path, folder: Path, may_write: bool) -> None:
    index = FileIndex(None if may_write else folder, may_write=may_write)
    assert index.hash_of(image) == index.hash_of(image)
    index.save()
    table = index.table("0" * 32)
    table.save({"names": Texts.of(["a"])}, {})
    assert table.load() is None
    assert not folder.exists()


def test_a_missing_file_raises_an_os_error(tmp_path: Path, folder: Path) -> None:
    with pytest.raises(FileNotFoundError):
        FileIndex(folder).hash_of(tmp_path / "none.png")


# --- tables ------------------------------------------------------------------------------------------------------------


def make_table(folder: Path, count: int = 4) -> FileTable:
    """A table of `count` files without hashes."""
    table = FileIndex(folder).table("0" * 32)
    columns: dict[str, Any] = {
        "names": Texts.of(f"{number}.png" for number in range(count)),
        "stamps": np.arange(3 * count).reshape(count, 3),
        HASHES: np.zeros((count, 16), np.uint8),
    }
    table.save(columns, {"version": 1})
    return table


def test_columns_and_header_are_read_back(folder: Path) -> None:
    loaded = make_table(folder).load()
    assert loaded is not None
    columns, header = loaded
    assert header == {"version": 1}
    assert columns.keys() == {"names", "stamps", HASHES}
    assert list(columns["names"]) == ["0.png", "1.png", "2.png", "3.png"]
    assert columns["stamps"].tolist() == np.arange(12).reshape(4, 3).tolist()  # type: ignore[union-attr]


def test_tables_of_different_names_are_separate(folder: Path) -> None:
    make_table(folder)
    assert FileIndex(folder).table("1" * 32).load() is None


@pytest.mark.parametrize("place", [0, 100, -1])
def test_a_damaged_table_is_ignored(folder: Path, place: int) -> None:
    table = make_table(folder)
    assert table.path is not None
    content = bytearray(table.path.read_bytes())
    content[place] ^= 1
    table.path.write_bytes(content)
    assert table.load() is None


def test_stored_hashes_belong_to_the_chosen_rows(folder: Path) -> None:
    table = make_table(folder)
    hashes = np.arange(5 * 16, dtype=np.uint8).reshape(5, 16)
    StoredHashes(hashes, 3, table, np.array([True, False, False, True])).save()
    loaded = table.load()
    assert loaded is not None
    assert np.array_equal(loaded[0][HASHES], np.stack([hashes[3], 0 * hashes[0], 0 * hashes[0], hashes[4]]))


def test_hashes_are_not_stored_in_a_table_that_has_changed_or_is_missing(folder: Path) -> None:
    """Another run may have scanned the directory again."""
    table = make_table(folder, count=3)
    StoredHashes(np.ones((4, 16), np.uint8), 0, table, np.ones(4, bool)).save()
    loaded = table.load()
    assert loaded is not None
    assert not loaded[0][HASHES].any()  # type: ignore[union-attr]
    missing = FileIndex(folder).table("1" * 32)
    StoredHashes(np.ones((4, 16), np.uint8), 0, missing, np.ones(4, bool)).save()
    assert missing.load() is None


def test_rows_are_matched_by_name_and_unchanged_by_stamp() -> None:
    old_names, names = Texts.of(["a", "b", "c"]), Texts.of(["b", "c", "d"])
    old_stamps = np.array([[1, 1, 1], [2, 2, 2], [3, 3, 3]])
    rows = match_rows(names, old_names)
    assert rows.tolist() == [1, 2, -1]
    assert match_rows(names, names).tolist() == [0, 1, 2]
    stamps = np.array([[2, 2, 2], [3, 3, 4], [3, 3, 3]])
    assert are_unchanged(stamps, old_stamps, rows).tolist() == [True, False, False]
    assert are_unchanged(stamps, old_stamps[:0], match_rows(names, Texts.of([]))).tolist() == [False, False, False]
