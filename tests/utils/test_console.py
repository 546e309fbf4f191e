"""Lines, tables and sizes for the user's terminal."""

from __future__ import annotations

import pytest

from utils.console import format_bytes, format_table, print_line


def test_two_columns_are_aligned() -> None:
    assert format_table([("a", "1"), ("long", "2")]) == "  a     1\n  long  2"


def test_line_is_printed_by_the_main_rank_only(capsys: pytest.CaptureFixture[str]) -> None:
    print_line("hello", is_main=True)
    print_line("again", is_main=False)
    assert capsys.readouterr().out == "hello\n"


@pytest.mark.parametrize(
    ("count", "text"), [(0, "0.0 MB"), (1_540_000, "1.5 MB"), (999_900_000, "999.9 MB"), (1_230_000_000, "1.23 GB")]
)
def test_sizes_are_given_in_mb_or_gb(count: int, text: str) -> None:
    assert format_bytes(count) == text
