"""Atomic file writes: a file is complete or absent."""

from __future__ import annotations

from pathlib import Path

import pytest

from utils.files import atomic
from utils.files.atomic import replace_file, write_text


def test_text_is_written_in_utf8_and_no_temporary_file_remains(tmp_path: Path) -> None:
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


def test_a_temporary_file_is_hidden_from_glob_patterns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    visible: list[str] = []
    real_replace = Path.replace

    def replace(self: Path, target: Path) -> Path:
        visible.extend(path.name for path in tmp_path.glob("[!.]*"))
        return real_replace(self, target)

    monkeypatch.setattr(Path, "replace", replace)
    write_text(tmp_path / "note.txt", "new")
    assert visible == []


def test_processes_with_equal_ids_may_write_one_file_at_the_same_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Processes of two containers that share a folder may have equal ids."""
    path, real_replace = tmp_path / "note.txt", atomic.replace_file

    def meanwhile(temporary: Path, target: Path) -> None:
        monkeypatch.setattr(atomic, "replace_file", real_replace)
        write_text(path, "by the other")
        assert path.read_text() == "by the other"
        real_replace(temporary, target)

    monkeypatch.setattr(atomic, "replace_file", meanwhile)
    write_text(path, "by this one")
    assert path.read_text() == "by this one"
    assert list(tmp_path.iterdir()) == [path]


def test_replace_file_replaces_an_existing_file(tmp_path: Path) -> None:
    (tmp_path / "old").write_text("old")
    (tmp_path / ".new").write_text("new")
    replace_file(tmp_path / ".new", tmp_path / "old")
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("old", "new")]


def test_a_replaced_file_has_the_default_permissions(tmp_path: Path) -> None:
    private, usual = tmp_path / "private", tmp_path / "usual"
    private.write_text("x")
    private.chmod(0o600)
    usual.write_text("x")
    replace_file(private, tmp_path / "final")
    assert (tmp_path / "final").stat().st_mode == usual.stat().st_mode
