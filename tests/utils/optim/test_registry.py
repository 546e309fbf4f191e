"""Optimizers by name, the course of the learning rate and of the average's decay."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch import nn

from utils.config.schema.tables import EmaConfig, OptimizerConfig
from utils.optim.registry import ema_decay, learning_rate, make_optimizer, optimizer_errors, optimizer_names

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
def test_an_optimizer_that_cannot_work_here_says_why(name: str) -> None:
    assert name not in optimizer_names()
    ((key, text),) = optimizer_errors(config_of(type=name))
    assert key == "optimizer.type"
    assert f"= {name!r}: cannot be used here: it" in text


@pytest.mark.parametrize(
    ("name", "advice"), [("AdamWW", "did you mean 'AdamW'?"), ("Optimizer", "unknown"), ("xyzzy", "torch.optim has ")]
)
def test_an_unknown_optimizer_is_answered_with_names(name: str, advice: str) -> None:
    ((key, text),) = optimizer_errors(config_of(type=name))
    assert key == "optimizer.type"
    assert f"= {name!r}: unknown" in text
    assert advice in text


def test_every_unknown_argument_is_named_with_those_allowed() -> None:
    errors = optimizer_errors(config_of(args={"beta": [0.9, 0.95], "momentum": 0.9, "weight_decay": 0.1}))
    assert [key for key, _ in errors] == ["optimizer.args.beta", "optimizer.args.momentum"]
    assert all("AdamW takes no such argument" in text and "betas" in text for _, text in errors)


def test_the_learning_rate_is_no_argument() -> None:
    ((key, _),) = optimizer_errors(config_of(args={"lr": 1.0}))
    assert key == "optimizer.args.lr"


@pytest.mark.parametrize("args", [{"betas": [2.0, 0.9]}, {"eps": -1.0}, {"weight_decay": "much"}])
def test_a_refused_value_is_told_in_the_optimizer_s_words(args: dict[str, Any]) -> None:
    ((key, text),) = optimizer_errors(config_of(args=args))
    assert key == "optimizer.args"
    assert "AdamW refuses them: " in text


def test_arguments_reach_the_optimizer_with_lists_as_tuples() -> None:
    optimizer = make_optimizer(config_of(args={"betas": [0.8, 0.9], "weight_decay": 0.5}), [nn.Parameter(torch.zeros(1))])
    assert optimizer.param_groups[0]["betas"] == (0.8, 0.9)
    assert optimizer.param_groups[0]["weight_decay"] == 0.5


@pytest.mark.parametrize("scheduler", ["constant", "linear", "cosine"])
def test_warm_up_rises_in_equal_steps_to_the_full_rate(scheduler: str) -> None:
    config = config_of(lr_warmup_steps=4, lr_scheduler=scheduler)
    rates = [learning_rate(config, step, 20) for step in range(5)]
    assert rates == pytest.approx([RATE * share / 5 for share in (1, 2, 3, 4, 5)])


@pytest.mark.parametrize("scheduler", ["linear", "cosine"])
@pytest.mark.parametrize("minimum", [0.0, 0.1])
@pytest.mark.parametrize(("warmup", "num_steps"), [(0, 10), (3, 10), (0, 2), (5, 7)])
def test_decay_ends_exactly_at_the_last_step(scheduler: str, minimum: float, warmup: int, num_steps: int) -> None:
    config = config_of(lr_scheduler=scheduler, lr_min_ratio=minimum, lr_warmup_steps=warmup)
    rates = [learning_rate(config, step, num_steps) for step in range(num_steps)]
    assert rates[-1] == pytest.approx(minimum * RATE, abs=1e-18)
    assert rates[warmup] == pytest.approx(RATE)
    falling = rates[warmup:]
    assert all(before > after for before, after in zip(falling[:-1], falling[1:], strict=True))
    if num_steps > 2:
        assert rates[-2] > minimum * RATE


def test_cosine_is_half_way_down_in_the_middle() -> None:
    config = config_of(lr_scheduler="cosine", lr_min_ratio=0.2)
    assert learning_rate(config, 5, 11) == pytest.approx(RATE * 0.6)
    assert learning_rate(config, 2, 11) > RATE * (1 - 0.8 * 0.2)  # flatter than linear at the start


@pytest.mark.parametrize("minimum", [0.0, 0.5])
def test_a_constant_rate_is_constant(minimum: float) -> None:
    config = config_of(lr_scheduler="constant", lr_min_ratio=minimum)
    assert {learning_rate(config, step, 10) for step in range(10)} == {RATE}


@pytest.mark.parametrize("scheduler", ["constant", "linear", "cosine"])
@pytest.mark.parametrize(("warmup", "num_steps"), [(0, 1), (10, 5), (5, 5), (4, 5)])
def test_rates_of_very_short_runs_stay_within_bounds(scheduler: str, warmup: int, num_steps: int) -> None:
    config = config_of(lr_scheduler=scheduler, lr_warmup_steps=warmup)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        rates = [learning_rate(config, step, num_steps) for step in range(num_steps)]
    assert all(0 < rate <= RATE for rate in rates)


# --- the average's decay -----------------------------------------------------------------------------------------------


def test_decay_warms_up_to_its_height_and_stays_there() -> None:
    decays = [ema_decay(EmaConfig(decay=0.5), step) for step in range(1, 12)]
    assert decays[:8] == [2 / 11, 3 / 12, 4 / 13, 5 / 14, 6 / 15, 7 / 16, 8 / 17, 9 / 18]
    assert decays[7:] == [0.5] * 4


def test_default_decay_is_reached_after_ninety_thousand_steps() -> None:
    assert ema_decay(EmaConfig(), 89_980) < 0.9999
    assert ema_decay(EmaConfig(), 90_000) == 0.9999


@pytest.mark.parametrize("step", [1, 2, 10, 1_000_000])
def test_decay_without_warm_up_is_the_same_in_every_step(step: int) -> None:
    assert ema_decay(EmaConfig(decay=0.99, warmup=False), step) == 0.99
