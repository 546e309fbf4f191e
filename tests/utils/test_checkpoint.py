"""Which checkpoints are found, and which a run cannot go on from. Saving and loading: tests/distributed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from utils.checkpoint import SavedState, find_checkpoints, identity_problems, step_folder

IDENTITY: dict[str, Any] = {"seed": 7, "global batch": 4, "adapter": "none"}


def make_checkpoint(parent: Path, step: int) -> Path:
    folder = step_folder(parent, step)
    folder.mkdir(parents=True)
    (folder / "state.json").write_text(json.dumps({"format": 1, "step": step, "identity": IDENTITY}))
    return folder


def test_checkpoints_are_found_in_the_order_of_their_steps(tmp_path: Path) -> None:
    for step in (20, 100, 3, 1_234_567):
        make_checkpoint(tmp_path, step)
    found = find_checkpoints(tmp_path)
    assert [saved.step for saved in found] == [3, 20, 100, 1_234_567]
    assert found[0] == SavedState(tmp_path / "step_000003", 3, IDENTITY)


def test_unfinished_and_foreign_folders_are_no_checkpoints(tmp_path: Path) -> None:
    make_checkpoint(tmp_path, 10)
    (tmp_path / "step_000020").mkdir()
    make_checkpoint(tmp_path, 30).rename(tmp_path / ".step_000030.tmp")
    make_checkpoint(tmp_path, 40).rename(tmp_path / "step_000040_copy")
    (tmp_path / "step_000050").write_text("a file")
    assert [saved.step for saved in find_checkpoints(tmp_path)] == [10]


def test_no_folder_has_no_checkpoints(tmp_path: Path) -> None:
    assert find_checkpoints(tmp_path / "none") == []


def test_every_difference_of_identity_is_named_with_both_values(tmp_path: Path) -> None:
    make_checkpoint(tmp_path, 10)
    (saved,) = find_checkpoints(tmp_path)
    assert identity_problems(saved, IDENTITY) == []
    problems = identity_problems(saved, {**IDENTITY, "seed": 8, "adapter": {"rank": 4}})
    assert len(problems) == 2
    assert problems[0].startswith(f"seed was 7 in {saved.folder} and is 8 now")
    assert "adapter was 'none'" in problems[1]
