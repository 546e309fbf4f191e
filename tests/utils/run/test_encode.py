"""What train.py leaves out of a run after the caching pass, and what it refuses to go on without."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import toml

from tests.tiny_model import make_tiny_dataset, write_experiment
from utils.config.load import ConfigError
from utils.data.encoding.precompute import CachedDataset, UnusableExamples
from utils.data.sources.decoding import BadFile
from utils.data.sources.readers import Readers
from utils.distributed.world import World
from utils.run import datasets
from utils.run.datasets import BAD_FILE_ADVICE
from utils.run.encode import without_unusable
from utils.run.experiment import Experiment
from utils.run.prepare import prepare


class Desk:
    """An experiment on two directories, the second of which leaves bad files out, and an evaluation set that does not."""

    def __init__(self, folder: Path, model: Path) -> None:
        self.folder = folder
        paths = [str(make_tiny_dataset(folder / name, 3)) for name in ("strict", "lenient", "other")]
        directories = [{"path": paths[0]}, {"path": paths[1], "on_bad_file": "skip"}]
        (folder / "other.toml").write_text(toml.dumps({"resolutions": [32], "directory": [{"path": paths[2]}]}))
        changes: dict[str, Any] = {
            "dataset_file": {"directory": directories, "resolutions": [32, 48]},
            "eval": {"sets": [{"name": "other", "dataset": str(folder / "other.toml")}]},
        }
        file = write_experiment(folder / "experiment", model, folder, **changes)
        self.experiment = prepare(file, [], None, World(0, 0, 1, 1))

    def leave_out(self, *keys: str) -> Experiment:
        """After a pass in which the examples of these keys could not be encoded."""
        tables = [self.experiment.dataset.examples, *self.experiment.eval_sets.values()]
        chosen = [np.array([example.key in keys for example in table]) for table in tables]
        unusable = UnusableExamples(chosen, [BadFile(Path(key), "is bad") for key in keys])
        any_data: Any = None
        return without_unusable(self.experiment, CachedDataset(any_data, tables, unusable, True))

    def errors(self, *keys: str) -> list[tuple[str, str, str]]:
        """(Name of the file, key, message) of each."""
        with pytest.raises(ConfigError) as caught:
            self.leave_out(*keys)
        return [(error.file.name, error.key, error.message) for error in caught.value.errors]


@pytest.fixture
def desk(tmp_path: Path, tiny_model: Path, readers: Readers, monkeypatch: pytest.MonkeyPatch) -> Desk:
    monkeypatch.setattr(datasets, "Readers", lambda _: nullcontext(readers))  # one for all tests
    return Desk(tmp_path, tiny_model)


def test_without_bad_files_everything_stays(desk: Desk) -> None:
    left = desk.leave_out()
    assert list(left.dataset.examples) == list(desk.experiment.dataset.examples)
    assert list(left.eval_sets["other"]) == list(desk.experiment.eval_sets["other"])


def test_bad_files_of_a_lenient_directory_are_left_out_and_named(desk: Desk, capsys: pytest.CaptureFixture[str]) -> None:
    bad = "1/image_001.png@32"
    left = desk.leave_out(bad)
    before = [example.key for example in desk.experiment.dataset.examples]
    assert [example.key for example in left.dataset.examples] == [key for key in before if key != bad]
    assert list(left.eval_sets) == ["other"]
    assert capsys.readouterr().out == f"skipped: {bad}: is bad\n"


def test_bad_files_of_a_strict_directory_end_the_run_and_all_are_named(desk: Desk) -> None:
    keys = ("0/image_000.png@32", "1/image_001.png@32")
    assert desk.errors(*keys) == [
        ("image_000.png@32", "", "is bad"),
        ("image_001.png@32", "", "is bad"),
        ("dataset.toml", "on_bad_file", BAD_FILE_ADVICE),
    ]


def test_bad_files_of_a_strict_evaluation_set_are_told_with_its_file(desk: Desk) -> None:
    assert desk.errors("eval/other/0/image_002.png@32")[-1] == ("other.toml", "on_bad_file", BAD_FILE_ADVICE)


def test_a_dataset_of_which_nothing_is_left_ends_the_run(desk: Desk) -> None:
    table = desk.experiment.dataset.examples
    lenient = np.array([example.key.startswith("1/") for example in table])
    desk.experiment = replace(desk.experiment, dataset=replace(desk.experiment.dataset, examples=table.where(lenient)))
    keys = [example.key for example in table if example.key.startswith("1/")]
    assert desk.errors(*keys)[-1] == ("dataset.toml", "directory", "no image could be encoded")
