"""Files that are whole whenever they are there."""

from __future__ import annotations

from pathlib import Path

import pytest

from utils.files import atomic
from utils.files.atomic import replace_file, write_text


def test_text_is_written_in_utf8_and_nothing_is_left_beside_it(tmp_path: Path) -> None:
    write_text(tmp_path / "note.txt", "Füchse 狐狸\n")
    assert (tmp_path / "note.txt").read_bytes() == "Füchse 狐狸\n".encode()
    assert [path.name for path in tmp_path.iterdir()] == ["note.txt"]


def test_an_interrupted_write_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "note.txt"
    write_text(path, "old")

    def write_half(self: Path, text: str, **_keywords: object) -> int:
        self.write_bytes(text.encode()[: len(text) // 2])
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "write_text", write_half)
    with pytest.raises(KeyboardInterrupt):
        write_text(path, "new and longer")
    assert path.read_bytes() == b"old"


def test_an_unfinished_file_is_hidden_from_patterns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str] = []
    real_replace = Path.replace

    def replace(self: Path, target: Path) -> Path:
        seen.extend(path.name for path in tmp_path.glob("[!.]*"))
        return real_replace(self, target)

    monkeypatch.setattr(Path, "replace", replace)
    write_text(tmp_path / "note.txt", "new")
    assert seen == []


def test_processes_of_one_number_write_one_file_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As those of two containers do that share a folder."""
    path, real_replace = tmp_path / "note.txt", atomic.replace_file

    def meanwhile(temporary: Path, target: Path) -> None:
        monkeypatch.setattr(atomic, "replace_file", real_replace)
        write_text(path, "the other's")
        assert path.read_text() == "the other's"
        real_replace(temporary, target)

    monkeypatch.setattr(atomic, "replace_file", meanwhile)
    write_text(path, "this one's")
    assert path.read_text() == "this one's"
    assert list(tmp_path.iterdir()) == [path]


def test_a_finished_file_takes_the_place_of_an_old_one(tmp_path: Path) -> None:
    (tmp_path / "old").write_text("old")
    (tmp_path / ".new").write_text("new")
    replace_file(tmp_path / ".new", tmp_path / "old")
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("old", "new")]


def test_a_file_may_be_read_by_whom_any_new_file_may(tmp_path: Path) -> None:
    private, usual = tmp_path / "private", tmp_path / "usual"
    private.write_text("x")
    private.chmod(0o600)
    usual.write_text("x")
    replace_file(private, tmp_path / "final")
    assert (tmp_path / "final").stat().st_mode == usual.stat().st_mode
