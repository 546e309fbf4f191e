"""The dataset file: directories inherit top-level keys that they do not set."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import toml

from tests.tiny_model import write_experiment
from tests.utils.config.loading import NOWHERE, load, only_error, write
from utils.config.load import ConfigError, dump_toml, load_config
from utils.config.schema.dataset import DatasetConfig, ImageConfig

OTHER: dict[str, Any] = {
    "resolutions": [64, 96],
    "enable_ar_bucket": False,
    "min_ar": 0.25,
    "max_ar": 3.0,
    "num_ar_buckets": 5,
    "crop": "random",
    "upscale": "never",
    "min_pixels": 100,
    "max_pixels": 10_000,
    "num_repeats": 2.5,
    "loss_weight": 0.5,
    "horizontal_flip": True,
    "recursive": True,
    "caption_per_line": True,
    "cache_shuffle_num": 4,
    "cache_shuffle_delimiter": "; ",
    "keep_tokens": 2,
    "on_bad_file": "skip",
}
"""A value other than the default for every key that is allowed in both places."""


def dataset_of(**table: Any) -> DatasetConfig:
    return DatasetConfig.model_validate({"resolutions": [32], **table})


def test_every_inherited_key_is_tested() -> None:
    fields = ImageConfig.model_fields
    assert OTHER.keys() == fields.keys()
    assert all(OTHER[name] != field.get_default(call_default_factory=True) for name, field in fields.items())


@pytest.mark.parametrize("key", OTHER)
def test_top_level_key_applies_to_directories_that_do_not_set_it(key: str) -> None:
    default = ImageConfig.model_fields[key].get_default(call_default_factory=True)
    own = [32] if key == "resolutions" else default
    dataset = dataset_of(**{key: OTHER[key]}, directory=[{"path": "a"}, {"path": "b", key: own}])
    first, second = dataset.directory
    assert (getattr(dataset, key), getattr(first, key), getattr(second, key)) == (OTHER[key], OTHER[key], own)
    for name in OTHER.keys() - {key}:
        assert getattr(first, name) == getattr(dataset, name), "and no other key with it"


@pytest.mark.parametrize("key", OTHER)
def test_key_of_a_directory_applies_to_it_only(key: str) -> None:
    first, second = dataset_of(directory=[{"path": "a", key: OTHER[key]}, {"path": "b"}]).directory
    default = [32] if key == "resolutions" else ImageConfig.model_fields[key].default
    assert (getattr(first, key), getattr(second, key)) == (OTHER[key], default)


def test_resolved_copy_has_inherited_keys(tmp_path: Path) -> None:
    directories = [{"path": "a"}, {"path": "b", **OTHER, "num_repeats": 1}]
    config = load(tmp_path, dataset_file={**OTHER, "directory": directories}).dataset
    again = DatasetConfig.model_validate(toml.loads(dump_toml(config)))
    assert again == config
    assert [entry.num_repeats for entry in again.directory] == [2.5, 1.0]


MISSING = "resolutions is missing; set it at the top level, or in every [[directory]]"


@pytest.mark.parametrize(
    "table",
    [
        {"resolutions": None},
        {"resolutions": []},
        {"resolutions": None, "directory": [{"path": "a", "resolutions": [32]}, {"path": "b"}]},
        {"directory": [{"path": "a", "resolutions": []}]},
    ],
)
def test_resolutions_are_required(tmp_path: Path, table: dict[str, Any]) -> None:
    assert only_error(write(tmp_path, dataset_file=table)) == ("dataset.toml", "", MISSING)


def test_resolutions_of_every_directory_are_enough(tmp_path: Path) -> None:
    directories = [{"path": "a", "resolutions": [32]}, {"path": "b", "resolutions": [64]}]
    config = load(tmp_path, dataset_file={"resolutions": None, "directory": directories})
    assert [entry.resolutions for entry in config.dataset.directory] == [[32], [64]]


@pytest.mark.parametrize(
    ("table", "key", "message"),
    [
        ({"min_pixels": 9, "max_pixels": 8}, "min_pixels", "= 9: must not exceed max_pixels, which is 8"),
        (
            {"max_pixels": 8, "directory": [{"path": "a"}, {"path": "b", "min_pixels": 9}]},
            "directory[1].min_pixels",
            "= 9: must not exceed max_pixels, which is 8",
        ),
        (
            {"directory": [{"path": "a", "max_ar": 0.25}]},
            "directory[0].min_ar",
            "= 0.5: must not exceed max_ar, which is 0.25",
        ),
    ],
)
def test_minimum_above_maximum_is_an_error_at_its_place(
    tmp_path: Path, table: dict[str, Any], key: str, message: str
) -> None:
    assert only_error(write(tmp_path, dataset_file=table)) == ("dataset.toml", key, message)


def test_bounds_that_apply_to_no_directory_are_allowed(tmp_path: Path) -> None:
    table = {"min_pixels": 9, "max_pixels": 8, "directory": [{"path": "a", "max_pixels": 10}]}
    assert load(tmp_path, dataset_file=table).dataset.directory[0].max_pixels == 10


# --- evaluation sets ---------------------------------------------------------------------------------------------------


def eval_set_error(folder: Path, **table: Any) -> tuple[str, str]:
    """(key, message) of the only error of an evaluation set's dataset file."""
    other = folder / "other.toml"
    other.write_text(toml.dumps({"resolutions": [32], "directory": [{"path": "a"}], **table}))
    path = write_experiment(folder, NOWHERE, NOWHERE, eval={"sets": [{"name": "other", "dataset": str(other)}]})
    with pytest.raises(ConfigError) as caught:
        load_config(path)
    (error,) = caught.value.errors
    assert error.file == other
    return error.key, error.message


@pytest.mark.parametrize("number", [2.5, 0.5])
def test_fractional_repeats_are_an_error_in_an_evaluation_set(tmp_path: Path, number: float) -> None:
    message = f"= {number}: must be a whole number in an evaluation set"
    assert eval_set_error(tmp_path, num_repeats=number) == ("directory[0].num_repeats", message)
    directories = [{"path": "a"}, {"path": "b", "num_repeats": number}]
    assert eval_set_error(tmp_path, directory=directories) == ("directory[1].num_repeats", message)


@pytest.mark.parametrize("key", ["horizontal_flip", "loss_weight", "cache_shuffle_num"])
def test_keys_of_training_are_errors_in_an_evaluation_set(tmp_path: Path, key: str) -> None:
    found, message = eval_set_error(tmp_path, **{key: OTHER[key]})
    assert (found, message.partition(",")[0]) == (f"directory[0].{key}", "cannot be used in an evaluation set")


def test_other_keys_are_allowed_in_an_evaluation_set(tmp_path: Path) -> None:
    rest = {key: value for key, value in OTHER.items() if key not in ("horizontal_flip", "loss_weight", "cache_shuffle_num")}
    other = tmp_path / "other.toml"
    other.write_text(toml.dumps({**rest, "num_repeats": 3, "directory": [{"path": "a"}]}))
    config = load(tmp_path, eval={"sets": [{"name": "other", "dataset": str(other)}]})
    assert config.eval_sets["other"].directory[0].num_repeats == 3
