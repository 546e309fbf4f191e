"""Line numbers in error messages."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.utils.config.loading import errors_of, write
from utils.config.lines import key_lines, line_of

TEXT = '''# a comment = 3
seed = 1

[sampling]   # previews
prompts = [
  "a = b",
]
text = """
[objective]
seed = 5
"""
steps = 3

[[directory]]
path = "a"
[[directory]]
path = "b"
'''


def test_keys_have_lines_and_text_in_strings_has_none() -> None:
    assert key_lines(TEXT) == {
        "seed": 2,
        "sampling": 4,
        "sampling.prompts": 5,
        "sampling.text": 8,
        "sampling.steps": 12,
        "directory[0]": 14,
        "directory[0].path": 15,
        "directory[1]": 16,
        "directory[1].path": 17,
    }


@pytest.mark.parametrize(
    ("key", "line"),
    [
        ("seed", 2),
        ("sampling.prompts[3].width", 5),
        ("sampling.cfg", 4),
        ("directory[1].path", 17),
        ("directory[1].num_repeats", 16),
        ("optimizer.type", None),
        ("", None),
    ],
)
def test_missing_key_has_the_line_of_the_table_around_it(tmp_path: Path, key: str, line: int | None) -> None:
    file = tmp_path / "a.toml"
    file.write_text(TEXT)
    assert line_of(file, key) == line


def test_unusual_headers_and_comments_give_no_wrong_lines() -> None:
    text = 'a = 1  # not """ a string\n# """\n[ b ]\nx = 1\n[c."d"]\nx = 2\n[e]\nx = 3\n'
    lines = key_lines(text)
    assert {key: lines.get(key) for key in ("a", "b.x", "e.x")} == {"a": 1, "b.x": 4, "e.x": 8}
    assert 6 not in {number for key, number in lines.items() if key in ("b.x", "c.x", "c.d.x")}


def test_unreadable_file_has_no_lines(tmp_path: Path) -> None:
    assert line_of(tmp_path / "none.toml", "seed") is None
    (tmp_path / "binary.toml").write_bytes(b"\xff\xfe")
    assert line_of(tmp_path / "binary.toml", "seed") is None


def test_messages_have_the_line_unless_the_key_comes_from_set(tmp_path: Path) -> None:
    path = write(tmp_path, objective={"mode_s_n": 0.0, "logit_std": 1.0})
    lines = path.read_text().splitlines()
    (error,) = errors_of(path)
    assert error.line is not None
    assert lines[error.line - 1] == "mode_s_n = 0.0"
    assert str(error) == f"{path}, line {error.line}: objective.mode_s_n: = 0.0: must be greater than or equal to 0.001"
    (error, other) = errors_of(path, "objective.logit_std=-1.0")
    assert {error.key: error.line is None, other.key: other.line is None} == {
        "objective.mode_s_n": False,
        "objective.logit_std": True,
    }
