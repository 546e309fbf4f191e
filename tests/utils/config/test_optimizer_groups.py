"""utils/config/schema/optimizer.py: parameter groups, `[[optimizer.groups]]`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import toml

from tests.utils.config.loading import load, only_error, write
from utils.config.load import dump_toml
from utils.config.schema.optimizer import OptimizerConfig
from utils.optim.group_checks import group_key_errors

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
        ({"lr_mult": 0.0}, "lr_mult", "= 0.0: must be greater than 0"),
        ({"lr_mult": float("inf")}, "lr_mult", "= inf: must be a finite number"),
        ({"lr_mult": 2.0, "learning_rate": 1e-4}, "lr_mult", "= 2.0: learning_rate is set too, and both define the peak"),
        ({"lr_cycles": 0}, "lr_cycles", "= 0: must be greater than or equal to 1"),
        ({"lr_power": 0.0}, "lr_power", "= 0.0: must be greater than 0"),
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
    assert group_key_errors(OptimizerConfig(learning_rate=1e-3, groups=groups)) == []
    (error,) = group_key_errors(OptimizerConfig(type="Rprop", learning_rate=1e-3, groups=groups))
    assert error == ("optimizer.groups[1].weight_decay", "= 0.0: Rprop has no weight decay; remove the key")
    (error,) = group_key_errors(OptimizerConfig(type="Rprop", learning_rate=1e-3, decay_norms_and_biases=False))
    assert error == ("optimizer.decay_norms_and_biases", "= false: Rprop has no weight decay; remove the key")


@pytest.mark.parametrize("value", [0.0, -1.0, float("inf"), float("nan"), True, "16"])
def test_the_ratio_of_loraplus_is_a_finite_number_above_zero(tmp_path: Path, value: Any) -> None:
    assert only_error(write(tmp_path, **{"optimizer.loraplus_lr_ratio": value}))[1] == "optimizer.loraplus_lr_ratio"


def test_prodigy_needs_one_learning_rate_for_all_parameters() -> None:
    own = {"name": "own", "pattern": ".*"}
    alike = [{**own, "weight_decay": 0.1}, {**own, "name": "same", "lr_mult": 1.0}]
    assert group_key_errors(OptimizerConfig(type="Prodigy", learning_rate=1.0, groups=alike, loraplus_lr_ratio=1)) == []
    groups = [*alike, {**own, "name": "faster", "lr_mult": 2.0}, {**own, "name": "later", "lr_warmup_steps": 5}]
    errors = group_key_errors(OptimizerConfig(type="Prodigy", learning_rate=1.0, groups=groups, loraplus_lr_ratio=4.0))
    assert [key for key, _ in errors] == ["optimizer.groups[2]", "optimizer.groups[3]", "optimizer.loraplus_lr_ratio"]
    assert all("for all parameters, which must have the same learning rate" in text for _, text in errors)


def test_optimizers_that_ignore_the_learning_rate_have_no_groups_with_their_own() -> None:
    settings: dict[str, Any] = {"type": "pytorch_optimizer.adafactor", "learning_rate": 1e-3}
    groups = [{**BIASES, "lr_mult": 0.5}]
    ((key, text),) = group_key_errors(OptimizerConfig(**settings, groups=groups))
    assert key == "optimizer.groups[0]"
    assert "adafactor does not use the learning rate with these arguments; remove" in text
    used = {"relative_step": False, "scale_parameter": False}
    assert group_key_errors(OptimizerConfig(**settings, args=used, groups=groups)) == []
    ((key, _),) = group_key_errors(OptimizerConfig(type="a2grad", learning_rate=1e-3, loraplus_lr_ratio=4.0))
    assert key == "optimizer.loraplus_lr_ratio"
