"""Errors of the tables [objective], [eval] and [sampling]: key, value and what is allowed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import toml

from tests.utils.config.loading import errors_of, load, only_error, write
from utils.config.load import dump_toml
from utils.config.schema.dataset import DatasetConfig
from utils.config.schema.evaluation import EvalConfig
from utils.config.schema.sampling import SamplingConfig


@pytest.mark.parametrize(
    ("changes", "key", "message"),
    [
        (
            {"weighting_scheme": "sigma"},
            "objective.weighting_scheme",
            "= 'sigma': must be 'none', 'sigma_sqrt', 'logit_normal', 'mode' or 'cosmap'",
        ),
        (
            {"timestep_sampling": "uniform"},
            "objective.timestep_sampling",
            "= 'uniform': must be 'sigma', 'logit_normal', 'mode' or 'cosmap'",
        ),
        (
            {"preset": "kohya"},
            "objective.preset",
            "= 'kohya': must be 'sd3_paper', 'sd_scripts', 'diffusers' or 'simpletuner'",
        ),
        ({"mode_s_n": 0.0}, "objective.mode_s_n", "= 0.0: must be greater than or equal to 0.001"),
        ({"mode_s_n": -0.2}, "objective.mode_s_n", "= -0.2: must be greater than or equal to 0.001"),
        ({"logit_std": 0}, "objective.logit_std", "= 0: must be greater than or equal to 0.01"),
        ({"mode_scale": 1.76}, "objective.mode_scale", "= 1.76: must be less than or equal to 1.7519383938841089"),
        ({"mode_scale": -1.1}, "objective.mode_scale", "= -1.1: must be greater than or equal to -1"),
        ({"min_t": 0.6, "max_t": 0.4}, "objective.max_t", "= 0.4: must be above min_t, 0.6"),
        ({"min_t": 0.5, "max_t": 0.5}, "objective.max_t", "= 0.5: must be above min_t, 0.5"),
        ({"max_t": 1.5}, "objective.max_t", "= 1.5: must be less than or equal to 1"),
        ({"discrete_flow_shift": 0.0}, "objective.discrete_flow_shift", "= 0.0: must be greater than or equal to 0.01"),
        ({"huber_c": 0.0}, "objective.huber_c", "= 0.0: must be greater than 0"),
        ({"loss_type": "l1"}, "objective.loss_type", "= 'l1': must be 'l2', 'huber' or 'smooth_l1'"),
        (
            {"model_prediction_type": "epsilon"},
            "objective.model_prediction_type",
            "= 'epsilon': must be 'raw', 'sigma_scaled' or 'additive'",
        ),
        ({"encoder_dropout_rate": 1.5}, "objective.encoder_dropout_rate", "= 1.5: 1.5 is not a number from 0 to 1"),
        (
            {"encoder_dropout_rate": {"clip_l": "often"}},
            "objective.encoder_dropout_rate",
            "clip_l = 'often' is not a number from 0 to 1",
        ),
        (
            {"timestep_sampling": "mode", "weighting_scheme": "mode"},
            "objective.weighting_scheme",
            "= 'mode': timestep_sampling is also 'mode', so the density would be applied twice; set timestep_sampling = "
            '"sigma", or weighting_scheme = "none"',
        ),
    ],
)
def test_invalid_objective_is_an_error(tmp_path: Path, changes: dict[str, Any], key: str, message: str) -> None:
    assert only_error(write(tmp_path, objective=changes)) == ("experiment.toml", key, message)


def test_all_errors_of_the_objective_are_reported_at_once(tmp_path: Path) -> None:
    wrong = {"weighting_scheme": "sech", "mode_s_n": 0.0, "discrete_flow_shft": 3.0, "min_t": 0.5, "max_t": 0.25}
    sets = [{"name": "gone", "dataset": str(tmp_path / "gone.toml")}]
    errors = errors_of(write(tmp_path, objective=wrong, eval={"sets": sets}))
    found = {error.key or error.file.name: error.message for error in errors}
    keys = {f"objective.{key}" for key in ("weighting_scheme", "mode_s_n", "discrete_flow_shft", "max_t")}
    assert set(found) == keys | {"gone.toml"}
    assert "did you mean `discrete_flow_shift`?" in found["objective.discrete_flow_shft"]


def test_explicit_key_takes_precedence_over_its_preset_on_the_command_line_too(tmp_path: Path) -> None:
    config = load(tmp_path, "objective.discrete_flow_shift=1.5", objective={"preset": "diffusers"})
    objective = config.experiment.objective
    assert objective.discrete_flow_shift == 1.5
    assert objective.model_prediction_type == "sigma_scaled"


@pytest.mark.parametrize(
    ("table", "key", "message"),
    [
        ({}, "eval", "has no images; set holdout_images, such as holdout_images = 16, or add sets"),
        ({"holdout_images": -1}, "eval.holdout_images", "= -1: must be greater than or equal to 0"),
        ({"holdout_images": 2, "num_t_bands": 0}, "eval.num_t_bands", "= 0: must be greater than or equal to 1"),
        ({"holdout_images": 2, "weights": "best"}, "eval.weights", "= 'best': must be 'last' or 'ema'"),
    ],
)
def test_invalid_evaluation_is_an_error(tmp_path: Path, table: dict[str, Any], key: str, message: str) -> None:
    path = write(tmp_path)
    path.write_text(path.read_text() + "\n[eval]\n" + toml.dumps(table))
    assert only_error(path) == ("experiment.toml", key, message)


def test_names_of_evaluation_sets_are_unique(tmp_path: Path) -> None:
    other = str(tmp_path / "dataset.toml")
    for names in (["a", "a"], ["holdout"]):
        sets = [{"name": name, "dataset": other} for name in names]
        assert "each set needs a unique name" in only_error(write(tmp_path, eval={"sets": sets}))[2]


def test_errors_of_an_evaluation_set_are_reported_with_the_others(tmp_path: Path) -> None:
    other = tmp_path / "other.toml"
    other.write_text('resolutions = [32]\n[[directory]]\npath = "x"\nhorizontal_flip = true\nloss_weight = 2.0\n')
    sets = [{"name": "other", "dataset": str(other)}, {"name": "gone", "dataset": str(tmp_path / "gone.toml")}]
    found = errors_of(write(tmp_path, eval={"sets": sets}, dataset_file={"min_ar": 3.0}))
    assert [(error.file.name, error.key) for error in found] == [
        ("dataset.toml", "min_ar"),
        ("other.toml", "directory[0].horizontal_flip"),
        ("other.toml", "directory[0].loss_weight"),
        ("gone.toml", ""),
    ]


def test_prompts_are_strings_with_flags_or_tables(tmp_path: Path) -> None:
    prompts = load(tmp_path, **{"sampling.prompts": ["a fox --w 512 --d 7", "an owl"]}).experiment.sampling.prompts
    assert [(prompt.prompt, prompt.width, prompt.seed) for prompt in prompts] == [("a fox", 512, 7), ("an owl", None, None)]
    tables = [{"prompt": "a fox", "cfg": 3.0, "negative_prompt": "blur"}]
    (prompt,) = load(tmp_path, **{"sampling.prompts": tables}).experiment.sampling.prompts
    assert (prompt.prompt, prompt.cfg, prompt.negative_prompt) == ("a fox", 3.0, "blur")


@pytest.mark.parametrize(
    ("prompt", "key", "part"),
    [
        ("a fox --q 3", "sampling.prompts[0]", "unknown flag --q; the flags are --w (width), --h (height), "),
        ("a fox --w 12", "sampling.prompts[0].width", "must be greater than or equal to 16"),
        ("a fox --d -1", "sampling.prompts[0].seed", "must be greater than or equal to 0"),
    ],
)
def test_invalid_prompt_is_an_error(tmp_path: Path, prompt: str, key: str, part: str) -> None:
    file, found, message = only_error(write(tmp_path, **{"sampling.prompts": [prompt]}))
    assert (file, found) == ("experiment.toml", key)
    assert part in message


def test_resolved_copy_preserves_evaluation_and_sampling(tmp_path: Path) -> None:
    sampling = {
        "prompts": ["a fox --w 512 --n blur", "an owl"],
        "skip_layer_guidance": {"scale": 2.8},
        "prompts_file": "p.txt",
    }
    sets = [{"name": "other", "dataset": str(tmp_path / "dataset.toml")}]
    objective = {"preset": "sd3_paper", "encoder_dropout_rate": {"clip_l": 0.2}}
    config = load(tmp_path, sampling=sampling, objective=objective, eval={"holdout_images": 3, "sets": sets}).experiment
    other = DatasetConfig.model_validate(toml.loads((tmp_path / "dataset.toml").read_text()))
    (tmp_path / "dataset.toml").write_text(dump_toml(other))
    assert load(tmp_path, eval={"sets": sets}, dataset_file=toml.loads(dump_toml(other))).eval_sets == {"other": other}
    copied = toml.loads(dump_toml(config))
    assert SamplingConfig(**copied["sampling"]) == config.sampling
    assert EvalConfig(**copied["eval"]) == config.eval
    assert type(config.objective)(**copied["objective"]) == config.objective
    assert config.objective.encoder_dropout_rate == {"clip_l": 0.2}
