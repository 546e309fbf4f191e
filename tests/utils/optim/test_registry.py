"""utils/optim/registry.py: optimizers by name, the errors of their names and arguments, and their parameter groups."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from utils.config.schema.optimizer import OptimizerConfig
from utils.optim.registry import make_optimizer, optimizer_errors, optimizer_names

RATE = 1e-3


def config_of(**changes: Any) -> OptimizerConfig:
    return OptimizerConfig(**{"learning_rate": RATE, **changes})


@pytest.mark.parametrize("name", optimizer_names())
def test_every_named_optimizer_takes_a_step_on_one_flat_vector(name: str) -> None:
    config = config_of(type=name)
    assert optimizer_errors(config) == []
    parameter = nn.Parameter(torch.ones(8))
    optimizer = make_optimizer(config, [parameter])
    assert optimizer.param_groups[0]["lr"] == RATE
    parameter.grad = torch.ones(8)
    optimizer.step()
    assert (parameter < 1).all()


def test_the_usual_optimizers_are_among_the_names() -> None:
    assert {"AdamW", "Adam", "SGD", "RMSprop", "Adagrad"} <= set(optimizer_names())


@pytest.mark.parametrize("name", ["LBFGS", "SparseAdam", "Adafactor", "Muon"])
def test_the_error_of_an_unsuitable_optimizer_has_the_reason(name: str) -> None:
    assert name not in optimizer_names()
    ((key, text),) = optimizer_errors(config_of(type=name))
    assert key == "optimizer.type"
    assert f"= {name!r}: cannot be used here: it" in text


@pytest.mark.parametrize(
    ("name", "advice"), [("AdamWW", "did you mean 'AdamW'?"), ("Optimizer", "unknown"), ("xyzzy", "torch.optim has ")]
)
def test_the_error_of_an_unknown_optimizer_suggests_names(name: str, advice: str) -> None:
    ((key, text),) = optimizer_errors(config_of(type=name))
    assert key == "optimizer.type"
    assert f"= {name!r}: unknown" in text
    assert advice in text


def test_every_unknown_argument_has_an_error_with_those_allowed() -> None:
    errors = optimizer_errors(config_of(args={"beta": [0.9, 0.95], "momentum": 0.9, "weight_decay": 0.1}))
    assert [key for key, _ in errors] == ["optimizer.args.beta", "optimizer.args.momentum"]
    assert all("not an argument of AdamW" in text and "betas" in text for _, text in errors)


def test_the_learning_rate_is_not_accepted_as_an_argument() -> None:
    ((key, _),) = optimizer_errors(config_of(args={"lr": 1.0}))
    assert key == "optimizer.args.lr"


@pytest.mark.parametrize("args", [{"betas": [2.0, 0.9]}, {"eps": -1.0}, {"weight_decay": "much"}])
def test_the_error_of_an_invalid_value_quotes_the_optimizer(args: dict[str, Any]) -> None:
    ((key, text),) = optimizer_errors(config_of(args=args))
    assert key == "optimizer.args"
    assert "AdamW rejects them: " in text


def test_arguments_reach_the_optimizer_with_lists_as_tuples() -> None:
    optimizer = make_optimizer(config_of(args={"betas": [0.8, 0.9], "weight_decay": 0.5}), [nn.Parameter(torch.zeros(1))])
    assert optimizer.param_groups[0]["betas"] == (0.8, 0.9)
    assert optimizer.param_groups[0]["weight_decay"] == 0.5


def test_a_parameter_group_has_its_own_values_and_the_config_s_for_the_rest() -> None:
    first, second = nn.Parameter(torch.zeros(1)), nn.Parameter(torch.zeros(2))
    groups: list[dict[str, Any]] = [{"params": [first], "lr": 0.5, "weight_decay": 0.0}, {"params": [second]}]
    optimizer = make_optimizer(config_of(args={"weight_decay": 0.1}), groups)
    assert [group["params"] for group in optimizer.param_groups] == [[first], [second]]
    assert [(group["lr"], group["weight_decay"]) for group in optimizer.param_groups] == [(0.5, 0.0), (RATE, 0.1)]
