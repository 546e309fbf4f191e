"""Loading TOML files: all errors are reported at once, with what to change."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import toml

from tests.utils.config.loading import errors_of, load, only_error, write
from utils.config.load import ConfigError, dump_toml, load_config
from utils.config.schema.dataset import DatasetConfig
from utils.config.schema.optimizer import EmaConfig

ROOT = Path(__file__).resolve().parents[3]
EXAMPLES = sorted((ROOT / "examples").rglob("*.toml"))


# --- values ------------------------------------------------------------------------------------------------------------


def test_values_and_defaults_reach_the_tables(tmp_path: Path) -> None:
    config = load(tmp_path, **{"objective.logit_mean": 1, "pipeline.pipeline_stages": 2})
    experiment = config.experiment
    assert experiment.objective.logit_mean == 1.0
    assert experiment.objective.discrete_flow_shift == 3.0
    assert experiment.pipeline.pipeline_stages == 2
    assert experiment.model.dtype == "float32"
    assert experiment.adapter is None
    assert config.dataset.resolutions == [32]
    assert config.dataset_path == tmp_path / "dataset.toml"


def test_cache_is_in_the_output_folder_by_default(tmp_path: Path) -> None:
    assert load(tmp_path).experiment.cache_folder == tmp_path / "output" / "cache"
    assert load(tmp_path, cache_dir="elsewhere").experiment.cache_folder == Path("elsewhere")


def test_average_is_kept_if_its_table_exists(tmp_path: Path) -> None:
    assert load(tmp_path).experiment.ema is None
    path = write(tmp_path)
    path.write_text(path.read_text() + "\n[ema]\n")
    assert load_config(path).experiment.ema == EmaConfig(decay=0.9999, warmup=True)


MIXED_TARGETS = 'adapter.targets=["attn", { pattern = "mlp", rank = 4 }, { pattern = "attn2", alpha = 1 }]'


def test_targets_are_strings_or_tables(tmp_path: Path) -> None:
    adapter = load(tmp_path, "adapter.type=lora", MIXED_TARGETS).experiment.adapter
    assert adapter is not None
    assert adapter.targets is not None
    found = [(target.pattern, target.rank, target.alpha) for target in adapter.targets]
    assert found == [("attn", None, None), ("mlp", 4, None), ("attn2", None, 1.0)]


@pytest.mark.parametrize("targets", ['["attn", "mlp"]', MIXED_TARGETS.partition("=")[2]])
def test_targets_survive_the_resolved_copy(tmp_path: Path, targets: str) -> None:
    """The toml package cannot write a list that mixes strings and tables."""
    config = load(tmp_path, "adapter.type=lora", f"adapter.targets={targets}")
    copy = tmp_path / "copy.toml"
    copy.write_text(dump_toml(config.experiment), encoding="utf-8")
    assert load_config(copy).experiment.adapter == config.experiment.adapter


@pytest.mark.parametrize(
    ("targets", "key", "message"),
    [
        ("[]", "adapter.targets", "= []: must not be empty"),
        ("attn", "adapter.targets", "= 'attn': must be a valid list"),
        ('["attn", 3]', "adapter.targets[1]", "= 3: must be a string, or a table such as { pattern = "),
        ("[{ rank = 4 }]", "adapter.targets[0].pattern", "is missing"),
        ('[{ pattern = "mlp", rank = 0 }]', "adapter.targets[0].rank", "= 0: must be greater than or equal to 1"),
        ('[{ pattern = "mlp", rnk = 4 }]', "adapter.targets[0].rnk", "unknown key; did you mean `rank`?"),
    ],
)
def test_error_of_a_target_has_its_index(tmp_path: Path, targets: str, key: str, message: str) -> None:
    path = write(tmp_path, adapter={"type": "lora"})
    _, found_key, text = only_error(path, f"adapter.targets={targets}")
    assert found_key == key
    assert text.startswith(message)


@pytest.mark.parametrize("key", ["dora", "rank_stabilized"])
def test_keys_of_low_rank_adapters_are_errors_for_lokr(tmp_path: Path, key: str) -> None:
    message = '= True: is for type = "lora" only; remove the key, or change the type'
    assert only_error(write(tmp_path, adapter={"type": "lokr", key: True}))[1:] == (f"adapter.{key}", message)
    load(tmp_path, adapter={"type": "lora", key: True})
    load(tmp_path, adapter={"type": "lokr", key: False})


def test_tables_are_read_only(tmp_path: Path) -> None:
    with pytest.raises(Exception, match="frozen"):
        load(tmp_path).experiment.seed = 3


# --- unknown keys ------------------------------------------------------------------------------------------------------


def test_misspelt_key_has_a_suggestion(tmp_path: Path) -> None:
    path = write(tmp_path, **{"optimizer.lr_warmup_step": 3})
    assert only_error(path) == (
        "experiment.toml",
        "optimizer.lr_warmup_step",
        "unknown key; did you mean `lr_warmup_steps`?",
    )


def test_misspelt_key_of_the_model_table_has_a_suggestion(tmp_path: Path) -> None:
    path = write(tmp_path, **{"model.t5xxl_max_token_lenght": 3})
    assert only_error(path)[2] == "unknown key; did you mean `t5xxl_max_token_length`?"


def test_misspelt_table_has_a_suggestion(tmp_path: Path) -> None:
    assert only_error(write(tmp_path, monitorin={"tensorboard": True}))[1:] == (
        "monitorin",
        "unknown key; did you mean `monitoring`?",
    )


def test_key_of_another_table_is_an_error_with_its_place(tmp_path: Path) -> None:
    path = write(tmp_path, **{"objective.gradient_clipping": 1.0, "optimizer.max_steps": 3})
    assert {(error.key, error.message) for error in errors_of(path)} == {
        ("objective.gradient_clipping", "unknown key here; it belongs in [optimizer]"),
        ("optimizer.max_steps", "unknown key here; it belongs at the top level, above the first [table]"),
    }


def test_misspelt_key_of_another_table_has_name_and_place(tmp_path: Path) -> None:
    path = write(tmp_path, gradient_cliping=1.0)
    assert only_error(path)[1:] == ("gradient_cliping", "unknown key; did you mean `gradient_clipping`, in [optimizer]?")


def test_key_of_the_dataset_file_is_an_error_with_its_place(tmp_path: Path) -> None:
    path = write(tmp_path, resolutions=[512])
    assert only_error(path) == (
        "experiment.toml",
        "resolutions",
        "unknown key here; it belongs in the dataset file",
    )
    assert only_error(write(tmp_path, num_ar_bucket=5))[2] == (
        "unknown key; did you mean `num_ar_buckets`, in the dataset file?"
    )


def test_key_of_the_experiment_file_is_an_error_with_its_place(tmp_path: Path) -> None:
    path = write(tmp_path, dataset_file={"micro_batch_size_per_gpu": 2})
    assert only_error(path) == (
        "dataset.toml",
        "micro_batch_size_per_gpu",
        "unknown key here; it belongs in the experiment file, in [pipeline]",
    )


def test_misspelt_key_of_a_directory_has_its_index(tmp_path: Path) -> None:
    directories = [{"path": "a"}, {"path": "b", "num_repeat": 2}]
    assert only_error(write(tmp_path, dataset_file={"directory": directories})) == (
        "dataset.toml",
        "directory[1].num_repeat",
        "unknown key; did you mean `num_repeats`?",
    )


def test_unknown_key_without_similar_ones_lists_all_keys(tmp_path: Path) -> None:
    _, key, message = only_error(write(tmp_path, **{"monitoring.xyzzy": 1}))
    assert key == "monitoring.xyzzy"
    assert message == "unknown key; this table has tensorboard, report"


# --- wrong values ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("max_steps", "many", "must be a valid integer"),
        ("max_steps", 2.5, "must be a valid integer"),
        ("max_steps", 0, "must be greater than or equal to 1"),
        ("seed", -1, "must be greater than or equal to 0"),
        ("seed", [1], "must be a valid integer"),
        ("optimizer.learning_rate", 0.0, "must be greater than 0"),
        ("optimizer.learning_rate", float("nan"), "finite"),
        ("optimizer.gradient_clipping", float("inf"), "finite"),
        ("optimizer.lr_scheduler", "cosin", "'constant', 'linear', 'cosine', 'cosine_with_restarts', "),
        ("ema.decay", 1.0, "must be less than 1"),
        ("ema.decay", 0, "must be greater than 0"),
        ("objective.caption_dropout_rate", 1.5, "must be less than or equal to 1"),
        ("objective.timestep_sampling", "uniform", "'sigma', 'logit_normal', 'mode' or 'cosmap'"),
        ("model.dtype", "float16", "'float32' or 'bfloat16'"),
        ("model.clip_max_token_length", 78, "must be less than or equal to 77"),
        ("sampling.prompts", "a fox", "list"),
        ("sampling.cfg", 0.5, "must be greater than or equal to 1"),
        ("monitoring.tensorboard", "sometimes", "must be a valid boolean"),
        ("save.dtype", "float8", "'float32', 'bfloat16' or 'float16'"),
    ],
)
def test_error_of_a_value_shows_it_and_what_is_allowed(tmp_path: Path, key: str, value: Any, message: str) -> None:
    file, named, text = only_error(write(tmp_path, **{key: value}))
    assert (file, named) == ("experiment.toml", key)
    assert text.startswith(f"= {value!r}: ")
    assert message in text
    assert "Input" not in text


@pytest.mark.parametrize(
    ("key", "value", "named"),
    [
        ("resolutions", [32, 8], "resolutions[1]"),
        ("directory", [], "directory"),
        ("directory", [{"path": "a", "num_repeats": 0}], "directory[0].num_repeats"),
        ("directory", [{"path": "a", "min_pixels": -1}], "directory[0].min_pixels"),
        ("directory", [{"path": "a", "image_column": ""}], "directory[0].image_column"),
        ("on_bad_file", "ignore", "on_bad_file"),
        ("min_ar", 0, "min_ar"),
        ("crop", "left", "crop"),
        ("upscale", "maybe", "upscale"),
        ("max_pixels", 0, "max_pixels"),
        ("num_repeats", 0, "num_repeats"),
        ("cache_shuffle_num", 0, "cache_shuffle_num"),
        ("cache_shuffle_delimiter", "", "cache_shuffle_delimiter"),
        ("keep_tokens", -1, "keep_tokens"),
        ("caption_per_line", 1, "caption_per_line"),
        ("recursive", "yes", "recursive"),
    ],
)
def test_error_of_a_dataset_value_has_its_key(tmp_path: Path, key: str, value: Any, named: str) -> None:
    assert only_error(write(tmp_path, dataset_file={key: value}))[:2] == ("dataset.toml", named)


@pytest.mark.parametrize(
    "key",
    [
        "max_steps",
        "seed",
        "optimizer.learning_rate",
        "optimizer.lr_warmup_steps",
        "objective.discrete_flow_shift",
        "pipeline.micro_batch_size_per_gpu",
        "pipeline.pipeline_stages",
        "save.keep_last",
        "sampling.every_n_steps",
        "model.clip_max_token_length",
        "model.t5xxl_max_token_length",
    ],
)
@pytest.mark.parametrize("value", [True, "3"])
def test_booleans_and_strings_are_not_numbers(tmp_path: Path, key: str, value: Any) -> None:
    errors = errors_of(write(tmp_path, **{key: value}))
    assert {error.key for error in errors} == {key}
    assert re.match(f"= {value!r}: must be a valid (integer|number)(, or .*)?$", errors[0].message)


@pytest.mark.parametrize("value", [1, 0, "true", "no"])
def test_numbers_and_strings_are_not_booleans(tmp_path: Path, value: Any) -> None:
    path = write(tmp_path, **{"monitoring.tensorboard": value}, dataset_file={"enable_ar_bucket": value})
    assert [(error.key, error.message) for error in errors_of(path)] == [
        ("monitoring.tensorboard", f"= {value!r}: must be a valid boolean"),
        ("enable_ar_bucket", f"= {value!r}: must be a valid boolean"),
    ]


def test_floats_may_be_written_as_integers(tmp_path: Path) -> None:
    config = load(tmp_path, **{"optimizer.gradient_clipping": 1, "objective.discrete_flow_shift": 3})
    assert config.experiment.optimizer.gradient_clipping == 1.0
    assert isinstance(config.experiment.objective.discrete_flow_shift, float)


def test_error_of_pipeline_stages_shows_both_allowed_types(tmp_path: Path) -> None:
    errors = errors_of(write(tmp_path, **{"pipeline.pipeline_stages": "aut"}))
    assert {error.key for error in errors} == {"pipeline.pipeline_stages"}
    text = "\n".join(error.message for error in errors)
    assert "'auto'" in text
    assert "integer" in text


@pytest.mark.parametrize("key", ["output_dir", "optimizer.learning_rate", "model.mmdit", "model", "optimizer", "dataset"])
def test_missing_key_is_an_error(tmp_path: Path, key: str) -> None:
    assert only_error(write(tmp_path, **{key: None})) == ("experiment.toml", key, "is missing")


def test_missing_key_of_the_dataset_file_is_an_error(tmp_path: Path) -> None:
    assert only_error(write(tmp_path, dataset_file={"directory": None})) == ("dataset.toml", "directory", "is missing")


def test_run_without_an_end_is_an_error(tmp_path: Path) -> None:
    _, key, message = only_error(write(tmp_path, max_steps=None))
    assert key == "max_steps"
    assert "`max_steps`, `epochs` or both" in message
    assert load(tmp_path, max_steps=None, epochs=2).experiment.epochs == 2


def test_minimum_above_maximum_is_an_error(tmp_path: Path) -> None:
    path = write(tmp_path, dataset_file={"min_ar": 2.0, "max_ar": 0.5})
    assert only_error(path) == ("dataset.toml", "min_ar", "= 2.0: must not exceed max_ar, which is 0.5")


@pytest.mark.parametrize(
    ("value", "message"), [("flux", "= 'flux': unknown model type; known: 'sd3'"), (None, "is missing")]
)
def test_unknown_model_type_lists_the_known_ones(tmp_path: Path, value: str | None, message: str) -> None:
    _, key, text = only_error(write(tmp_path, **{"model.type": value}))
    assert key == "model.type"
    assert text.startswith(message)
    assert "known: 'sd3'" in text


@pytest.mark.parametrize("value", ["sd3", 3, ["sd3"]])
def test_model_that_is_not_a_table_is_an_error(tmp_path: Path, value: Any) -> None:
    assert only_error(write(tmp_path, model=value))[1].startswith("model")


# --- files -------------------------------------------------------------------------------------------------------------


def test_all_errors_of_both_files_are_reported_at_once(tmp_path: Path) -> None:
    path = write(
        tmp_path,
        seeed=1,
        max_steps=0,
        **{"optimizer.learning_rate": None, "model.dtype": "half", "adapter": {"type": "lora", "rank": 0}},
        dataset_file={"resolutions": [1], "min_arr": 1.0, "directory": [{"num_repeats": 1}]},
    )
    assert {(error.file.name, error.key) for error in errors_of(path, "save.keep_last=0", "nonsense")} == {
        ("experiment.toml", "seeed"),
        ("experiment.toml", "max_steps"),
        ("experiment.toml", "optimizer.learning_rate"),
        ("experiment.toml", "model.dtype"),
        ("experiment.toml", "adapter.rank"),
        ("experiment.toml", "save.keep_last"),
        ("experiment.toml", ""),
        ("dataset.toml", "resolutions[0]"),
        ("dataset.toml", "min_arr"),
        ("dataset.toml", "directory[0].path"),
    }


def test_missing_files_are_errors_with_their_paths(tmp_path: Path) -> None:
    assert only_error(tmp_path / "none.toml") == ("none.toml", "", "does not exist")
    path = write(tmp_path)
    (tmp_path / "dataset.toml").unlink()
    assert only_error(path) == ("dataset.toml", "", "does not exist")


@pytest.mark.parametrize("content", ["a = = 1", "[table", "a = 1\na = 2", 'a = "open', "a = [1,"])
def test_invalid_toml_is_an_error(tmp_path: Path, content: str) -> None:
    path = tmp_path / "experiment.toml"
    path.write_text(content)
    assert only_error(path)[2].startswith("is not valid TOML: ")


def test_file_in_another_encoding_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "experiment.toml"
    path.write_bytes('output_dir = "Füchse"'.encode("latin-1"))
    assert "utf-8" in only_error(path)[2]


def test_folder_in_place_of_a_file_is_an_error(tmp_path: Path) -> None:
    assert only_error(tmp_path)[2].startswith("cannot be read: ")


def test_lists_may_mix_integers_and_floats(tmp_path: Path) -> None:
    path = write(tmp_path, **{"optimizer.args.betas": [0.5, 0.99]})
    path.write_text(path.read_text().replace("0.5", "0"))
    assert load_config(path).experiment.optimizer.args == {"betas": [0, 0.99]}


# --- examples ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: str(path.relative_to(ROOT)))
def test_example_loads(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    content = toml.loads(path.read_text(encoding="utf-8"))
    if "directory" in content:
        assert DatasetConfig.model_validate(content).directory
    else:
        assert load_config(path).experiment.model.type == "sd3"


def test_model_key_in_the_dataset_file_is_an_error_with_its_place(tmp_path: Path) -> None:
    (error,) = errors_of(write(tmp_path, dataset_file={"clip_l": "somewhere"}))
    assert (error.file.name, error.key) == ("dataset.toml", "clip_l")
    assert "in the experiment file, in [model]" in error.message


def test_number_in_place_of_a_path_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"model\.mmdit: = 5: must be a path"):
        load(tmp_path, "model.mmdit=5")
