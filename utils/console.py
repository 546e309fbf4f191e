"""Text for the user's terminal: single lines, tables, sizes, and how often a progress bar is drawn."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from tqdm import tqdm


def print_line(text: str, *, is_main: bool = True) -> None:
    """Prints a line above the progress bar; nothing where `is_main` is false, so that a run prints it once."""
    if is_main:
        tqdm.write(text, file=sys.stdout)
        sys.stdout.flush()


def format_table(rows: Sequence[tuple[str, str]]) -> str:
    """Two aligned columns of text, indented by two spaces."""
    width = max(len(name) for name, _ in rows)
    return "\n".join(f"  {name:<{width}}  {value}" for name, value in rows)


def format_bytes(count: int) -> str:
    """A size in MB, or in GB from 1 GB on: "1.23 GB"."""
    return f"{count / 1e9:,.2f} GB" if count >= 1e9 else f"{count / 1e6:,.1f} MB"


def bar_interval_seconds() -> float:
    """Time between updates of a progress bar: longer where each update is a new line of a file."""
    return 0.2 if sys.stderr.isatty() else 15.0
