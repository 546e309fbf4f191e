"""Names by content: what they depend on, and what is remembered of files."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from utils.data.cache.keys import KEY_BYTES, FileHashes, content_key


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
        content_key("a2:bc"),
        content_key("Ab", "c"),
        content_key("\u00e4"),
        content_key("a\u0308"),
    ]
    assert len(set(keys)) == len(keys)
    assert {len(key) for key in keys} == {KEY_BYTES}
    assert content_key("a", "b") == content_key("a", "b")


def test_names_that_are_no_utf8_have_keys() -> None:
    names = [os.fsdecode(name) for name in (b"\xff.png", b"\xfe.png")]
    assert len({content_key(name) for name in names}) == 2


def test_known_keys_stay_what_they_are() -> None:
    """A change here silently encodes every dataset anew."""
    assert content_key("a photo of a red fox", "1024x1024").hex() == GOLDEN_KEY


# python -c "from utils.data.cache.keys import content_key; print(content_key('a photo of a red fox', '1024x1024').hex())"
GOLDEN_KEY = "c823d0bddddc8cf997c8575fcd9bddbc"


# --- hashes of files ---------------------------------------------------------------------------------------------------


def test_a_hash_is_of_the_content_alone(tmp_path: Path) -> None:
    for name, content in (("a", b"fox"), ("b", b"fox"), ("c", b"owl")):
        (tmp_path / name).write_bytes(content)
    hashes = FileHashes(tmp_path / "memory.json")
    first, second, third = (hashes.hash_of(tmp_path / name) for name in "abc")
    assert first == second != third


def test_a_file_replaced_in_place_is_noticed(tmp_path: Path) -> None:
    """Same name, same size: only the time tells, down to its nanoseconds."""
    path = tmp_path / "image.png"
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
    path = tmp_path / "image.png"
    path.write_bytes(b"old content")
    stamp = path.stat().st_mtime_ns
    hashes = FileHashes(tmp_path / "memory.json")
    old = hashes.hash_of(path)
    path.write_bytes(b"newer content")
    os.utime(path, ns=(stamp, stamp))
    assert hashes.hash_of(path) != old


def test_an_unchanged_file_is_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "image.png"
    path.write_bytes(b"content")
    hashes = FileHashes(tmp_path / "cache" / "memory.json")
    digest = hashes.hash_of(path)
    hashes.save()
    again = FileHashes(tmp_path / "cache" / "memory.json")

    def refuse(*_arguments: object, **_keywords: object) -> None:
        raise AssertionError("read again")

    monkeypatch.setattr(Path, "open", refuse)
    assert again.hash_of(path) == hashes.hash_of(path) == digest


@pytest.mark.parametrize("content", ["", '{"/a": [1, 2', "[]", '{"/a": 3}', '{"PATH": 3}', "null"])
def test_a_damaged_memory_is_forgotten(tmp_path: Path, content: str) -> None:
    path = tmp_path / "image.png"
    (tmp_path / "memory.json").write_text(content.replace("PATH", str(path)))
    path.write_bytes(b"content")
    hashes = FileHashes(tmp_path / "memory.json")
    digest = hashes.hash_of(path)
    hashes.save()
    assert FileHashes(tmp_path / "memory.json").hash_of(path) == digest


def test_saving_leaves_nothing_beside_the_memory(tmp_path: Path) -> None:
    (tmp_path / "image.png").write_bytes(b"content")
    hashes = FileHashes(tmp_path / "cache" / "memory.json")
    hashes.save()
    assert not (tmp_path / "cache").exists()
    hashes.hash_of(tmp_path / "image.png")
    hashes.save()
    assert [path.name for path in (tmp_path / "cache").iterdir()] == ["memory.json"]


def test_a_missing_file_is_an_os_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        FileHashes(tmp_path / "memory.json").hash_of(tmp_path / "none.png")


def test_a_file_copied_over_with_its_old_time_is_hashed_again(tmp_path: Path) -> None:
    image = tmp_path / "image.png"
    image.write_bytes(b"old")
    before = image.stat()
    hashes = FileHashes(tmp_path / "files.json")
    first = hashes.hash_of(image)
    image.write_bytes(b"new")
    os.utime(image, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert hashes.hash_of(image) != first
