"""utils/evaluation/results.py: the file evaluations.jsonl."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.utils.evaluation.measurements import compared, measured
from utils.evaluation.results import EVALUATIONS, EvaluationResult, keep_until, read_evaluations, to_line


def results() -> list[EvaluationResult]:
    """Returns three evaluations of a run, with numbers that have no short decimal form."""
    made = [measured(2 * index, [x / 3 - index / 7 for x in range(6)]) for index in range(3)]
    return [compared(now, *made[:index]) for index, now in enumerate(made)]


def test_results_are_read_back_exactly(tmp_path: Path) -> None:
    (tmp_path / EVALUATIONS).write_text("".join(map(to_line, results())))
    assert read_evaluations(tmp_path / EVALUATIONS) == results()
    assert read_evaluations(tmp_path / "nothing.jsonl") == []


def test_a_line_has_the_stored_names_of_earlier_versions() -> None:
    line = json.loads(to_line(results()[1]))
    assert list(line) == ["step", "weights", "panel", "losses", "summary"]
    assert set(line["summary"]) == {"groups", "to_previous", "is_best", "unchanged_since"}


@pytest.mark.parametrize("rest", ['{"step": 6, "losses": [0.', "\x00\x00\x00"])
def test_an_incomplete_last_line_is_dropped(tmp_path: Path, rest: str) -> None:
    path = tmp_path / EVALUATIONS
    path.write_text("".join(map(to_line, results())) + rest)
    assert read_evaluations(path) == results()
    keep_until(path, 100)
    assert path.read_text() == "".join(map(to_line, results()))


def test_resuming_drops_later_evaluations_and_starting_anew_drops_all(tmp_path: Path) -> None:
    path = tmp_path / EVALUATIONS
    path.write_text("".join(map(to_line, results())))
    assert keep_until(path, 3) == results()[:2]
    assert keep_until(path, 2) == results()[:2]
    assert path.read_text() == "".join(map(to_line, results()[:2]))
    assert keep_until(path, 0) == []
    assert path.read_text() == ""
    assert keep_until(tmp_path / "nothing.jsonl", 3) == []


def test_a_file_of_commit_36bf8e5_is_read_and_written_back_identically() -> None:
    path = Path(__file__).with_name("evaluations_36bf8e5.jsonl")
    stored = read_evaluations(path)
    assert [result.step for result in stored] == [0, 2, 4, 6]
    assert [group.num_images for group in stored[0].groups] == [12, 12]
    assert "".join(map(to_line, stored)) == path.read_text(encoding="utf-8")
