"""docs/formats.md names a test for every row of its tables, and all of these tests exist."""

from __future__ import annotations

import re
from pathlib import Path

from tests.models.sd3.test_public_forms import FORMS

ROOT = Path(__file__).resolve().parent.parent
PAGE = (ROOT / "docs" / "formats.md").read_text(encoding="utf-8")
TESTS = "\n".join(path.read_text(encoding="utf-8") for path in sorted((ROOT / "tests").rglob("test_*.py")))


def rows(section: str) -> list[str]:
    """Returns the table rows of a section without header and separator."""
    text = PAGE.split(f"## {section}\n")[1].split("\n## ")[0].split("\n### ")[0]
    lines = [line for line in text.splitlines() if line.startswith("|")]
    return [line for line in lines[2:] if line.strip("|- ")]


def test_every_test_and_file_named_exists() -> None:
    files = set(re.findall(r"`(tests/[\w/]+\.(?:py|txt))", PAGE))
    names = set(re.findall(r"\b(test_\w+)\b", PAGE)) - {Path(file).stem for file in files}
    assert len(files) >= 6
    assert len(names) >= 20
    assert [file for file in files if not (ROOT / file).is_file()] == []
    assert [name for name in names if f"def {name}(" not in TESTS] == []


def test_every_row_of_weights_in_names_tested_forms() -> None:
    table = rows("Weights in")
    assert len(table) >= 13
    for row in table:
        forms = re.findall(r"`\[(\w+)\]`", row)
        assert forms, row
        assert [form for form in forms if form not in FORMS] == [], row


def test_every_row_of_weights_out_and_of_adapters_names_a_test() -> None:
    for row in [*rows("Weights out"), *rows("Adapters in")]:
        assert re.search(r"test_\w+|`…?\[[\w-]+…?\]`", row), row
