"""The run's report: one page, report.html in the run folder."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from pathlib import Path

from utils.atomic import write_text
from utils.objective import Objective

REPORT = "report.html"


def write_report(
    folder: Path, summary: Sequence[tuple[str, str]], objective_rows: Sequence[tuple[str, str]], objective: Objective
) -> None:
    """Write the page anew from the run folder's files and these rows. Rank 0 only."""
    rows = "".join(
        f"<tr><th>{escape(name)}</th><td>{escape(value)}</td></tr>" for name, value in (*summary, *objective_rows)
    )
    write_text(folder / REPORT, f"<!doctype html><title>{escape(folder.name)}</title><table>{rows}</table>")
