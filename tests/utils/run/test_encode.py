"""Examples that could not be encoded: skipped with a message, or an error of the run."""

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


class EncodedExperiment:
    """An experiment on two directories, of which the second skips bad files, and an evaluation set that does not."""

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

    def without(self, *keys: str) -> Experiment:
        """The experiment after caching in which the examples of these keys could not be encoded."""
        tables = [self.experiment.dataset.examples, *self.experiment.eval_sets.values()]
        chosen = [np.array([example.key in keys for example in table]) for table in tables]
        unusable = UnusableExamples(chosen, [BadFile(Path(key), "is bad") for key in keys])
        any_data: Any = None
        return without_unusable(self.experiment, CachedDataset(any_data, tables, unusable, True))

    def errors(self, *keys: str) -> list[tuple[str, str, str]]:
        """(name of the file, key, message) of each error."""
        with pytest.raises(ConfigError) as caught:
            self.without(*keys)
        return [(error.file.name, error.key, error.message) for error in caught.value.errors]


@pytest.fixture
def encoded(tmp_path: Path, tiny_model: Path, readers: Readers, monkeypatch: pytest.MonkeyPatch) -> EncodedExperiment:
    monkeypatch.setattr(datasets, "Readers", lambda _: nullcontext(readers))  # all tests share one process
    return EncodedExperiment(tmp_path, tiny_model)


def test_without_bad_files_nothing_is_skipped(encoded: EncodedExperiment) -> None:
    left = encoded.without()
    assert list(left.dataset.examples) == list(encoded.experiment.dataset.examples)
    assert list(left.eval_sets["other"]) == list(encoded.experiment.eval_sets["other"])


def test_bad_files_of_a_lenient_directory_are_skipped_and_logged(
    encoded: EncodedExperiment, capsys: pytest.CaptureFixture[str]
) -> None:
    bad = "1/image_001.png@32"
    left = encoded.without(bad)
    before = [example.key for example in encoded.experiment.dataset.examples]
    assert [example.key for example in left.dataset.examples] == [key for key in before if key != bad]
    assert list(left.eval_sets) == ["other"]
    assert capsys.readouterr().out == f"skipped: {bad}: is bad\n"


def test_bad_files_of_a_strict_directory_are_errors(encoded: EncodedExperiment) -> None:
    keys = ("0/image_000.png@32", "1/image_001.png@32")
    assert encoded.errors(*keys) == [
        ("image_000.png@32", "", "is bad"),
        ("image_001.png@32", "", "is bad"),
        ("dataset.toml", "on_bad_file", BAD_FILE_ADVICE),
    ]


def test_error_of_a_strict_evaluation_set_has_its_file(encoded: EncodedExperiment) -> None:
    assert encoded.errors("eval/other/0/image_002.png@32")[-1] == ("other.toml", "on_bad_file", BAD_FILE_ADVICE)


def test_dataset_without_usable_examples_is_an_error(encoded: EncodedExperiment) -> None:
    table = encoded.experiment.dataset.examples
    lenient = np.array([example.key.startswith("1/") for example in table])
    encoded.experiment = replace(
        encoded.experiment, dataset=replace(encoded.experiment.dataset, examples=table.where(lenient))
    )
    keys = [example.key for example in table if example.key.startswith("1/")]
    assert encoded.errors(*keys)[-1] == ("dataset.toml", "directory", "no image could be encoded")
