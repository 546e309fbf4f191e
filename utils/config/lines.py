"""Line numbers of keys in a TOML file, which TOML parsers do not report."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path

_TABLE = re.compile(r"\s*\[\s*([\w.-]+)\s*\]\s*(#.*)?")
_ARRAY_TABLE = re.compile(r"\s*\[\[\s*([\w.-]+)\s*\]\]\s*(#.*)?")
_KEY = re.compile(r"\s*([\w.-]+)\s*=")
_LAST_PART = re.compile(r"(\[\d+\]|\.?[^.\[\]]+)$")


def key_lines(text: str) -> dict[str, int]:
    """Key path, such as `directory[1].path`, or table -> line number. Finds bare keys only, not quoted ones."""
    lines: dict[str, int] = {}
    counts: Counter[str] = Counter()
    table, in_string = "", False
    for number, whole_line in enumerate(text.splitlines(), start=1):
        line = whole_line if in_string else whole_line.split(" #")[0]
        if not in_string and line.lstrip().startswith("#"):
            continue
        if not in_string:
            if match := _ARRAY_TABLE.fullmatch(line):
                table = f"{match[1]}[{counts[match[1]]}]"
                counts[match[1]] += 1
                lines.setdefault(table, number)
            elif match := _TABLE.fullmatch(line):
                table = match[1]
                lines.setdefault(table, number)
            elif line.startswith("["):  # a header in another notation: its keys are not found
                table = line
            elif match := _KEY.match(line):
                lines.setdefault(f"{table}.{match[1]}" if table else match[1], number)
        if (line.count('"""') + line.count("'''")) % 2:
            in_string = not in_string
    return lines


def line_of(file: Path, key: str) -> int | None:
    """The line of a key, or of the innermost table around it that is in the file; None if there is none."""
    try:
        lines = key_lines(file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError):
        return None
    while key and key not in lines:
        key = _LAST_PART.sub("", key) if _LAST_PART.search(key) else ""
    return lines.get(key)
