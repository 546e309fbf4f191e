"""utils/config/schema/optimizer.py: parameter groups, `[[optimizer.groups]]`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import toml

from tests.utils.config.loading import load, only_error, write
from utils.config.load import dump_toml
from utils.config.schema.optimizer import OptimizerConfig
from utils.optim.registry import optimizer_errors

BIASES = {"name": "biases", "pattern": r".*\.bias", "weight_decay": 0.0}
ATTENTION = {"name": "attention", "pattern": r".*attn\.qkv.*", "learning_rate": 2e-5, "lr_scheduler": "cosine"}


def test_without_groups_the_resolved_copy_has_no_such_key(tmp_path: Path) -> None:
    experiment = load(tmp_path).experiment
    assert experiment.optimizer.groups is None
    assert "groups" not in toml.loads(dump_toml(experiment))["optimizer"]


def test_groups_survive_the_resolved_copy(tmp_path: Path) -> None:
    experiment = load(tmp_path, **{"optimizer.groups": [BIASES, ATTENTION]}).experiment
    copied = toml.loads(dump_toml(experiment))["optimizer"]
    assert copied["groups"] == [BIASES, ATTENTION]
    assert OptimizerConfig(**copied) == experiment.optimizer


@pytest.mark.parametrize(
    ("changes", "key", "message"),
    [
        ({"name": "no spaces"}, "name", "= 'no spaces': must match '^[A-Za-z0-9_-]+$'"),
        (
            {"name": "default"},
            "name",
            "= 'default': is reserved for the parameters that no pattern matches; choose another name",
        ),
        ({"pattern": "(attn"}, "pattern", "= '(attn': is not a regular expression: "),
        ({"learning_rate": 0.0}, "learning_rate", "= 0.0: must be greater than 0"),
        ({"weight_decay": -0.1}, "weight_decay", "= -0.1: must be greater than or equal to 0"),
        ({"lr_scheduler": "step"}, "lr_scheduler", "= 'step': must be 'constant', 'linear', 'cosine', "),
        ({"lr_min_ratio": 2.0}, "lr_min_ratio", "= 2.0: must be less than or equal to 1"),
        ({"lr": 1e-4}, "lr", "unknown key"),
    ],
)
def test_error_of_a_group_has_its_index(tmp_path: Path, changes: dict[str, Any], key: str, message: str) -> None:
    path = write(tmp_path, **{"optimizer.groups": [ATTENTION, {**BIASES, **changes}]})
    _, found_key, text = only_error(path)
    assert found_key == f"optimizer.groups[1].{key}"
    assert text.startswith(message)


def test_repeated_name_of_a_group_is_an_error(tmp_path: Path) -> None:
    path = write(tmp_path, **{"optimizer.groups": [BIASES, {**ATTENTION, "name": "biases"}]})
    message = "each group needs a unique name; used more than once: 'biases'"
    assert only_error(path) == ("experiment.toml", "optimizer.groups", message)


def test_empty_list_of_groups_is_an_error(tmp_path: Path) -> None:
    assert only_error(write(tmp_path, **{"optimizer.groups": []}))[1:] == ("optimizer.groups", "= []: must not be empty")


def test_weight_decay_of_a_group_needs_an_optimizer_with_weight_decay() -> None:
    groups = [ATTENTION, BIASES]
    assert optimizer_errors(OptimizerConfig(learning_rate=1e-3, groups=groups)) == []
    (error,) = optimizer_errors(OptimizerConfig(type="Rprop", learning_rate=1e-3, groups=groups))
    assert error == ("optimizer.groups[1].weight_decay", "= 0.0: Rprop has no weight decay; remove the key")
