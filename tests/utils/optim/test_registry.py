"""utils/optim/registry.py: optimizers by name, the errors of their names and arguments, and their parameter groups."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from docs import list_optimizers
from utils.config.schema.optimizer import OptimizerConfig
from utils.optim.muon import MuonWithAdamW
from utils.optim.registry import (
    COLLECTION,
    OWN,
    SCHEDULE_FREE,
    TORCH,
    canonical_name,
    find,
    make_optimizer,
    optimizer_errors,
)

RATE = 1e-3


def config_of(**changes: Any) -> OptimizerConfig:
    return OptimizerConfig(**{"learning_rate": RATE, **changes})


def entry_of(*parameters: nn.Parameter, **changes: Any) -> dict[str, Any]:
    return {"params": list(parameters), "names": [f"blocks.{index}.w" for index in range(len(parameters))], **changes}


@pytest.mark.parametrize(
    ("name", "package", "found"),
    [
        ("AdamW", TORCH, "AdamW"),
        ("adamw", TORCH, "AdamW"),
        ("AdaFactor", TORCH, "Adafactor"),
        ("AdamW8bit", OWN, "AdamW8bit"),
        ("prodigy", OWN, "Prodigy"),
        ("Lion", COLLECTION, "lion"),
        ("CAME", COLLECTION, "came"),
        ("pytorch_optimizer.adamw", COLLECTION, "adamw"),
        ("schedulefree_adamw", COLLECTION, "schedulefreeadamw"),
        ("RAdamScheduleFree", SCHEDULE_FREE, "RAdamScheduleFree"),
    ],
)
def test_names_are_found_without_regard_to_case(name: str, package: str, found: str) -> None:
    kind = find(name)
    assert kind is not None
    assert (kind.package, kind.name) == (package, found)
    assert canonical_name(name) == canonical_name(name.upper() if "." not in name else name)


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("LBFGS", "evaluates the network several times"),
        ("SparseAdam", "sparse gradients"),
        ("DAdaptAdam", "use Prodigy"),
        ("DAdaptation", "use Prodigy"),
        ("kron", "random numbers"),
        ("AdamMini", "whole network"),
        ("SophiaH", "second derivatives"),
    ],
)
def test_the_error_of_an_unsuitable_optimizer_has_the_reason(name: str, reason: str) -> None:
    ((key, text),) = optimizer_errors(config_of(type=name))
    assert key == "optimizer.type"
    assert f"= {name!r}: cannot be used here: it" in text
    assert reason in text


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


@pytest.mark.parametrize(
    ("args", "text"),
    [
        ({"betas": [2.0, 0.9]}, "each must be from 0 to 1"),
        ({"betas": [0.9, 0.9, 0.9]}, "must be a list of 2 numbers"),
        ({"betas": 0.9}, "must be a list of 2 numbers"),
        ({"betas": [0.9, "0.99"]}, "each must be a number"),
        ({"eps": -1.0}, "must not be negative"),
        ({"eps": float("inf")}, "must be a finite number"),
        ({"eps": True}, "must be a number"),
        ({"weight_decay": "much"}, "must be a number"),
        ({"weight_decay": -0.1}, "must not be negative"),
        ({"amsgrad": "false"}, "must be true or false, without quotes"),
        ({"maximize": "false"}, "the loss is minimized"),
        ({"maximize": True}, "the loss is minimized"),
    ],
)
def test_every_argument_is_checked(args: dict[str, Any], text: str) -> None:
    ((key, message),) = optimizer_errors(config_of(args=args))
    assert key == f"optimizer.args.{next(iter(args))}"
    assert text in message


def test_what_only_the_optimizer_knows_to_be_wrong_is_quoted() -> None:
    ((key, text),) = optimizer_errors(config_of(type="SGD", args={"nesterov": True}))
    assert key == "optimizer.args"
    assert "SGD rejects them: Nesterov momentum requires" in text


def test_arguments_reach_the_optimizer_with_lists_as_tuples() -> None:
    entry = entry_of(nn.Parameter(torch.zeros(1)))
    optimizer = make_optimizer(config_of(args={"betas": [0.8, 0.9], "weight_decay": 0.5}), [entry])
    assert optimizer.param_groups[0]["betas"] == (0.8, 0.9)
    assert optimizer.param_groups[0]["weight_decay"] == 0.5


def test_a_parameter_group_has_its_own_values_and_the_config_s_for_the_rest() -> None:
    first, second = nn.Parameter(torch.zeros(1)), nn.Parameter(torch.zeros(2))
    groups = [entry_of(first, lr=0.5, weight_decay=0.0), entry_of(second)]
    optimizer = make_optimizer(config_of(args={"weight_decay": 0.1}), groups)
    assert [group["params"] for group in optimizer.param_groups] == [[first], [second]]
    assert [(group["lr"], group["weight_decay"]) for group in optimizer.param_groups] == [(0.5, 0.0), (RATE, 0.1)]


def test_muon_updates_the_matrices_of_blocks_and_adamw_the_rest() -> None:
    shapes = {"joint_blocks.0.attn.qkv.weight": (6, 4), "joint_blocks.0.attn.qkv.bias": (6,), "final_layer.weight": (4, 4)}
    parameters = {name: nn.Parameter(torch.zeros(shape)) for name, shape in shapes.items()}
    entry = {"params": list(parameters.values()), "names": list(parameters), "lr": 0.5}
    optimizer = make_optimizer(config_of(type="Muon", args={"weight_decay": 0.3}), [entry])
    assert isinstance(optimizer, MuonWithAdamW)
    muon, adamw = optimizer.param_groups
    assert (muon["names"], adamw["names"]) == (list(shapes)[:1], list(shapes)[1:])
    assert [(group["lr"], group["weight_decay"]) for group in optimizer.param_groups] == [(0.5, 0.3)] * 2
    assert muon["adjust_lr_fn"] == "match_rms_adamw"
    for parameter in parameters.values():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    assert optimizer.state.get(parameters["final_layer.weight"], {}).keys() == {"step", "exp_avg", "exp_avg_sq"}
    assert all(parameter.abs().max() > 0 for parameter in parameters.values())


@pytest.mark.parametrize("which", list_optimizers.PACKAGES)
def test_the_documented_tables_are_current(which: str) -> None:
    """`python -m docs.list_optimizers` writes them."""
    if not list_optimizers.is_complete(which):
        pytest.skip("pip install --no-deps bitsandbytes==0.50.2 torchao==0.18.0")
    assert list_optimizers.table(which) in list_optimizers.PAGE.read_text(encoding="utf-8")
