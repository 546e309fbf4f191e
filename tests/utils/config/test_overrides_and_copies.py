"""Overrides on the command line, and the resolved copy of a configuration."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import toml

from tests.utils.config.loading import load, only_error, write
from utils.config.load import dump_toml, load_config, parse_override
from utils.config.schema.dataset import DatasetConfig
from utils.config.schema.sampling import SamplingConfig

# --- overrides ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("a=1", 1),
        ("a=1e-4", 1e-4),
        ("a=true", True),
        ("a=[1, 2]", [1, 2]),
        ('a="1"', "1"),
        ("a=auto", "auto"),
        ("a=runs/of today", "runs/of today"),
        ("a=b=c", "b=c"),
        ("a=", ""),
    ],
)
def test_override_is_parsed_as_toml_or_else_a_string(text: str, value: Any) -> None:
    keys, parsed = parse_override(text)
    assert keys == ["a"]
    assert parsed == value
    assert type(parsed) is type(value)


def test_overrides_take_precedence_and_may_add_tables(tmp_path: Path) -> None:
    config = load(
        tmp_path,
        "max_steps=9",
        "optimizer.learning_rate=2e-5",
        "optimizer.args.betas=[0.8, 0.9]",
        "adapter.type=lora",
        "adapter.rank=8",
        "pipeline.pipeline_stages=auto",
        "monitoring.tensorboard=true",
        "objective.discrete_flow_shift=1",
    )
    experiment = config.experiment
    assert experiment.max_steps == 9
    assert experiment.optimizer.learning_rate == 2e-5
    assert experiment.optimizer.args == {"betas": [0.8, 0.9]}
    assert experiment.adapter is not None
    assert experiment.adapter.rank == 8
    assert experiment.pipeline.pipeline_stages == "auto"
    assert experiment.monitoring.tensorboard is True
    assert experiment.objective.discrete_flow_shift == 1.0


def test_later_override_takes_precedence(tmp_path: Path) -> None:
    assert load(tmp_path, "max_steps=5", "max_steps=6").experiment.max_steps == 6


def test_overrides_are_checked_like_the_file(tmp_path: Path) -> None:
    path = write(tmp_path)
    assert only_error(path, "max_step=3")[2] == "unknown key; did you mean `max_steps`?"
    assert only_error(path, "max_steps=often")[2].startswith("= 'often': ")
    assert only_error(path, "seed=true")[1] == "seed"


@pytest.mark.parametrize("text", ["max_steps", "=3", " =3"])
def test_malformed_override_shows_the_syntax(tmp_path: Path, text: str) -> None:
    message = only_error(write(tmp_path), text)[2]
    assert message.startswith(f"--set {text}: must be KEY=VALUE")


def test_override_inside_a_value_is_an_error(tmp_path: Path) -> None:
    _, key, message = only_error(write(tmp_path), "seed.extra=3")
    assert key == "seed.extra"
    assert message == "seed is not a table, so it cannot have the key extra"


def test_the_dataset_can_be_overridden(tmp_path: Path) -> None:
    path = write(tmp_path)
    (tmp_path / "dataset.toml").rename(tmp_path / "other.toml")
    assert load_config(path, [f"dataset={tmp_path / 'other.toml'}"]).dataset.resolutions == [32]


# --- the resolved copy -------------------------------------------------------------------------------------------------

AWKWARD = [
    "plain",
    "",
    'quotes " and \' and """',
    "back\\slash \\d+ \\u0041 \\",
    "back\\slash before x: \\x41",
    "new\nline\ttab",
    "Füchse 狐狸 🦊",
    "# no comment",
    "[table] = 3",
    " spaces ",
    "non-breaking\xa0space,\xa0twice",
    "\x7f\x01",
]


def test_resolved_copy_loads_to_an_equal_configuration(tmp_path: Path) -> None:
    config = load(
        tmp_path,
        cache_dir="somewhere",
        epochs=3,
        adapter={
            "type": "lora",
            "rank": 8,
            "targets": [r"joint_blocks\.\d+\.(x_block|context_block)\.attn\.qkv", "final.*"],
        },
        optimizer={"learning_rate": 1e-7, "args": {"betas": [0.9, 0.95], "eps": 1e-08, "weight_decay": 0}},
        sampling={"prompts": ["a fox", 'a "quoted" owl'], "every_n_steps": 2},
        seed=2**63 - 1,
        dataset_file={"directory": [{"path": "a"}, {"path": "b", "num_repeats": 3}]},
    )
    copy = tmp_path / "copy"
    copy.mkdir()
    (copy / "config.toml").write_text(dump_toml(config.experiment), encoding="utf-8")
    (copy / "other.toml").write_text(dump_toml(config.dataset), encoding="utf-8")
    again = load_config(copy / "config.toml")
    assert again.experiment.model_dump() == config.experiment.model_dump()
    assert again.dataset == config.dataset
    assert DatasetConfig.model_validate(toml.loads((copy / "other.toml").read_text())) == config.dataset


@pytest.mark.parametrize("text", AWKWARD)
def test_resolved_copy_preserves_any_string(text: str) -> None:
    table = SamplingConfig(prompts=[text], negative_prompt=text)
    assert SamplingConfig(**toml.loads(dump_toml(table))) == table


@pytest.mark.parametrize("number", [1e-7, 1e-05, 0.1, 3.0, 1e22, 1 / 3])
def test_resolved_copy_preserves_any_number(number: float) -> None:
    table = SamplingConfig(cfg=1 + number)
    assert SamplingConfig(**toml.loads(dump_toml(table))) == table
