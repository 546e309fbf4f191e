"""Checkpoints and caches of commit 36bf8e5 remain usable: runs resume from them, and nothing is encoded again.

tests/golden/old_run has the files; tests/golden/make_old_run.py made them.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from tests.distributed.launch import Finished, newest_run, read_metrics, start_ranks
from tests.golden.make_old_run import CHECKPOINT_STEP, CONFIGS, FOLDER, LAST_STEP, MADE_IN, write_models
from tests.golden.make_runs import header, result_lines
from tests.golden.records import differences, other_platform, without_metadata

pytestmark = pytest.mark.distributed

TOLERANCE = 1e-4
LISTINGS = ("files", "datasets")
"""Folders of the cache with file indices; all others have encoded data."""


@pytest.fixture
def old_run(tiny_model: Path, tmp_path: Path) -> Path:
    """A copy of the folder in a temporary place, with the models of its runs."""
    folder = tmp_path / "old_run"
    shutil.copytree(FOLDER, folder)
    write_models(folder / "model", tiny_model)
    for name in CONFIGS:
        config = folder / "model" / name / "config.json"
        config.unlink()  # it is a link to a file of the tiny model
        shutil.copy(FOLDER / "model_configs" / name / "config.json", config)
    for path in folder.rglob("*.toml"):
        path.write_text(path.read_text(encoding="utf-8").replace(MADE_IN, str(folder)), encoding="utf-8")
    return folder


def resume(folder: Path, kind: str, num_processes: int) -> Finished:
    run = newest_run(folder / kind / "output")
    arguments = ["--config", str(folder / kind / "experiment.toml"), "--resume", str(run)]
    finished = start_ranks(num_processes, arguments, folder / "log.txt").wait()
    assert finished.exit_code == 0, finished.output
    return finished


def encoded_files(folder: Path) -> dict[str, tuple[int, str]]:
    """Inode and hash of every cache file with encoded data, by path; a rewritten file has another inode."""
    cache = folder / "cache"
    files = [path for path in cache.rglob("*.safetensors") if path.relative_to(cache).parts[0] not in LISTINGS]
    return {str(path): (path.stat().st_ino, hashlib.sha256(path.read_bytes()).hexdigest()) for path in files}


def evaluations(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "evaluations.jsonl").read_text(encoding="utf-8").splitlines()]


@pytest.mark.parametrize(
    ("kind", "num_processes"), [("lora", 1), ("lora", 2), ("full", 1)], ids=["lora", "lora, 2 stages", "full"]
)
def test_resumed_run_equals_uninterrupted_run(old_run: Path, kind: str, num_processes: int) -> None:
    """The metrics, evaluations and weights are those that the same commit gave without a stop; nothing is encoded anew."""
    run = newest_run(old_run / kind / "output")
    before, encoded = read_metrics(run), encoded_files(old_run)
    assert len(encoded) > len(CONFIGS)
    resume(old_run, kind, num_processes)

    expected = (FOLDER / f"expected_{kind}.txt").read_text(encoding="utf-8")
    lines = [f"# {key}: {value}" for key, value in header().items()]
    lines += result_lines(run, first_step=CHECKPOINT_STEP + 1, exports=(LAST_STEP,))
    found = "\n".join(lines) + "\n"
    reason = other_platform(expected, found)
    rule = f"compared within {TOLERANCE:g}, because {reason}" if reason else "compared bit for bit on the same platform"
    different = differences(without_metadata(expected), without_metadata(found), TOLERANCE if reason else None)
    assert not different, f"{rule}:\n" + "\n".join(different)
    assert read_metrics(run)[:CHECKPOINT_STEP] == before[:CHECKPOINT_STEP]
    assert [line["step"] for line in read_metrics(run)] == list(range(1, LAST_STEP + 1))
    assert encoded_files(old_run) == encoded


def test_earlier_evaluations_are_compared_with(old_run: Path) -> None:
    """The evaluations before the checkpoint are kept, and the new one is compared with them."""
    run = newest_run(old_run / "lora" / "output")
    before = evaluations(run)
    resume(old_run, "lora", 1)
    after = evaluations(run)
    assert [evaluation["step"] for evaluation in after] == [0, CHECKPOINT_STEP, LAST_STEP]
    assert after[:2] == before
    assert after[-1]["panel"] == before[0]["panel"]
    assert after[-1]["summary"]["groups"][0]["to_start"]["to_step"] == 0
