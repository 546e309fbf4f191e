"""The program, its documentation and its examples use the field's terms; tests/test_words.py lists what they avoid.

Each entry has a term that was once used here for something the field has a name for. Names of stored files and fields that
users already have on disk are quoted in one module, `STORED_NAMES`, and are exempt there.
"""

from __future__ import annotations

import ast
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
STORED_NAMES = "utils/data/encoding/stored_names.py"
"""Spellings that files of earlier versions have on disk; they are quoted there and nowhere else."""

AVOIDED = {
    r"pictures?": "image",
    r"visit(s|ed|ing)?": "draw of an example, times shown",
    r"answer(s|ed)? of (a|the) network|network('s)? answers?|what the network (answers|says)": "output, prediction",
    r"answers?": "output, prediction, reply",
    r"no numbers?": "NaN or Inf, non-finite",
    r"go(es)? on|going on|went on": "resume, continue",
    r"mirror(s|ed|ing)?": "flip, flipped horizontally",
    r"(to be|is|are|was|were|been) told": "logged, reported, printed, specified",
    r"deviations?": "std",
    r"who is to blame": "cause",
    r"patience": "timeout",
    r"companions?": "mask and control images",
    r"mend(s|ed|ing)?": "fix",
}
PATTERN = re.compile(rf"(?<![a-z])({'|'.join(f'(?:{term})' for term in AVOIDED)})(?![a-z])", re.IGNORECASE)
STANDARD_DEVIATION = re.compile(r"standard\s+deviations?", re.IGNORECASE)
"""The statistical term is the field's own, unlike "deviation" alone."""


def tracked(*endings: str) -> list[str]:
    """Files of the program, its documentation and examples, relative to the root."""
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split("\n")
    return [file for file in listed if file.endswith(endings) and file != "tests/test_words.py" and (ROOT / file).is_file()]


TEXTS = [file for file in tracked(".py", ".md", ".toml", "Makefile", ".cfg", ".html") if file != STORED_NAMES]
SOURCES = tracked(".py")


def avoided_terms(text: str) -> Iterator[tuple[int, str]]:
    """(line number, term) of every avoided term. An identifier's parts, joined by underscores, are words too."""
    plain = STANDARD_DEVIATION.sub(lambda match: "x" * len(match.group()), text)
    for number, line in enumerate(plain.replace("_", " ").split("\n"), start=1):
        for match in PATTERN.finditer(line):
            yield number, match.group()


@pytest.mark.parametrize("file", TEXTS)
def test_file_uses_the_terms_of_the_field(file: str) -> None:
    found = [f"{file}:{number}: {term}" for number, term in avoided_terms((ROOT / file).read_text(encoding="utf-8"))]
    assert not found


@pytest.mark.parametrize("file", SOURCES)
def test_docstrings_begin_with_a_verb_or_a_noun_phrase(file: str) -> None:
    text = (ROOT / file).read_text(encoding="utf-8")
    found = [
        f"{file}:{node.lineno}: {node.value.value[:40]!r}"
        for node in ast.walk(ast.parse(text))
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)
        if re.match(r"\s*Of\b", node.value.value)
    ]
    assert not found


def test_avoided_terms_are_found() -> None:
    text = 'num_pictures = 3  # is told\n"""Mirrored at each visit, with no number."""\nlogit_std: standard deviation\n'
    assert [term.lower() for _, term in avoided_terms(text)] == ["pictures", "is told", "mirrored", "visit", "no number"]
