"""The ways to keep float32 weights beside bfloat16 weights, through the optimizer step of one process."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from utils.config.schema.optimizer import OptimizerConfig
from utils.optim.registry import is_separable, make_optimizer
from utils.optim.rounding import split
from utils.optim.schedules import LearningRateSchedule
from utils.pipeline import optimizer_step
from utils.pipeline.optimizer_step import MASTER, Network, OptimizerStep, StepSettings
from utils.pipeline.replicas import Replicas
from utils.trainable.base import ParameterGroup

SHAPES = {"blocks.0.weight": (24, 16), "blocks.0.bias": (24,), "blocks.1.weight": (8, 24), "norm.weight": (16,)}
RATE = 1e-3
NUM_STEPS = 40


pytestmark = pytest.mark.usefixtures("process_group")


def draw(name: str, purpose: int) -> Tensor:
    generator = torch.Generator().manual_seed(1000 * list(SHAPES).index(name) + purpose)
    return torch.randn(SHAPES[name], generator=generator)


def loss_of(name: str, weight: Tensor, step: int) -> Tensor:
    exact = weight.float()
    return (exact - draw(name, 1)).square().sum() / 2 + (draw(name, 2 + step) * exact).sum()


class Training:
    """Weights in bfloat16 with noisy gradients."""

    def __init__(self, optimizer: str = "AdamW", **settings: Any) -> None:
        self.weights = {name: nn.Parameter(0.1 * draw(name, 0).bfloat16()) for name in SHAPES}
        config = OptimizerConfig(type=optimizer, learning_rate=RATE)
        self.step = OptimizerStep(
            [ParameterGroup("all", self.weights, LearningRateSchedule(RATE, "constant", 0, 1.0), None)],
            Network(list(SHAPES), num_losses=0),
            Replicas([0], 0, None),
            make_optimizer=partial(make_optimizer, config),
            settings=StepSettings(is_separable=is_separable(config), **settings),
            device=torch.device("cpu"),
        )

    def run(self, steps: range) -> None:
        for number in steps:
            self.step.begin(number, {"all": RATE})
            self.step.begin_last_micro_batch()
            with torch.enable_grad():
                for name, weight in self.weights.items():
                    loss_of(name, weight, number).backward()
            assert self.step.run([]).is_finite

    def values(self) -> dict[str, Tensor]:
        return {name: weight.detach().clone() for name, weight in self.weights.items()}

    def states(self) -> dict[str, dict[str, Tensor]]:
        return {name: self.step.read_state(weight) for name, weight in self.weights.items()}

    def masters(self) -> dict[str, Tensor]:
        return {name: state[MASTER] for name, state in self.states().items()}


def assert_equal(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> None:
    assert one.keys() == other.keys()
    assert not [name for name in one if not torch.equal(one[name], other[name])]


def reference() -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """(weights, float32 weights) of torch's AdamW on float32 weights that are all kept and rounded as `split` does."""
    masters = {name: nn.Parameter((0.1 * draw(name, 0).bfloat16()).float()) for name in SHAPES}
    weights = {name: nn.Parameter(split(master.detach())[0]) for name, master in masters.items()}
    optimizer = torch.optim.AdamW(masters.values(), lr=RATE)
    for number in range(NUM_STEPS):
        for name, weight in weights.items():
            (gradient,) = torch.autograd.grad(loss_of(name, weight, number), weight)
            masters[name].grad = gradient.float()
        optimizer.step()
        with torch.no_grad():
            for name, weight in weights.items():
                weight.copy_(split(masters[name].detach())[0])
    return {name: one.detach() for name, one in weights.items()}, {name: one.detach() for name, one in masters.items()}


@pytest.mark.parametrize("limit", [2**25, 400, 1])
def test_split_trains_as_with_float32_weights_that_are_kept(monkeypatch: pytest.MonkeyPatch, limit: int) -> None:
    """However many weights are updated at once."""
    monkeypatch.setattr(optimizer_step, "MAX_OPEN_ELEMENTS", limit)
    training = Training(master="split")
    training.run(range(NUM_STEPS))
    weights, masters = reference()
    assert_equal(training.values(), weights)
    assert_equal(training.masters(), masters)
    assert any(bool((masters[name].bfloat16().float() != masters[name]).any()) for name in SHAPES)


def test_between_steps_split_holds_no_float32_weights() -> None:
    training = Training(master="split")
    training.run(range(2))
    for parameter in training.step._owned:
        assert parameter.owned.parameter.untyped_storage().nbytes() == 4
        assert parameter.owned.parameter.grad is None and parameter.gradient is None


@pytest.mark.parametrize("optimizer", ["AdamW", "AdamW8bit", "Muon", "came", "AdamWScheduleFree"])
@pytest.mark.parametrize("master", ["float32", "split", "stochastic"])
def test_resuming_is_exact(master: str, optimizer: str) -> None:
    whole, resumed = Training(optimizer, master=master), Training(optimizer, master=master)
    whole.run(range(9))
    resumed.step.write_states({resumed.weights[name]: state for name, state in whole.states().items()})
    whole.run(range(9, 20))
    resumed.run(range(9, 20))
    assert_equal(whole.values(), resumed.values())
    assert_equal(whole.masters(), resumed.masters())


def test_stochastic_rounding_depends_on_seed_and_step_and_follows_the_float32_weights() -> None:
    exact = Training(master="float32")
    one, same, other = (Training(master="stochastic", seed=seed) for seed in (0, 0, 1))
    for training in (exact, one, same, other):
        training.run(range(NUM_STEPS))
    assert_equal(one.values(), same.values())
    assert not all(torch.equal(value, other.values()[name]) for name, value in one.values().items())
    moved = torch.cat([(value - 0.1 * draw(name, 0)).flatten() for name, value in exact.masters().items()])
    error = torch.cat([(one.masters()[name] - value).flatten() for name, value in exact.masters().items()])
    assert float(error.norm() / moved.norm()) < 0.15
    assert abs(float(error.mean() / moved.abs().mean())) < 0.02


@pytest.mark.parametrize("master", ["float32", "split", "stochastic"])
def test_updates_in_the_backward_pass_equal_those_after_it(master: str) -> None:
    after, within = Training(master=master), Training(master=master, in_backward=True)
    after.run(range(10))
    within.run(range(10))
    assert_equal(after.values(), within.values())
    assert_equal(after.masters(), within.masters())


def test_within_the_backward_pass_a_bad_gradient_ends_the_run() -> None:
    training = Training(master="split", in_backward=True)
    training.run(range(2))
    training.step.begin(2, {"all": RATE})
    training.step.begin_last_micro_batch()
    for name, weight in training.weights.items():
        (weight * (float("nan") if name == "blocks.1.weight" else 1.0)).sum().backward()
    with pytest.raises(FloatingPointError, match=r"blocks\.1\.weight was not finite.*resume from the last checkpoint"):
        training.step.run([])


@pytest.mark.parametrize("master", ["float32", "split", "stochastic"])
@pytest.mark.parametrize(("optimizer", "ema"), [("AdamW", True), ("AdamWScheduleFree", False)])
def test_evaluated_weights_leave_the_training_as_it_was(master: str, optimizer: str, ema: bool) -> None:
    plain, evaluated = Training(optimizer, master=master), Training(optimizer, master=master)
    for training in (plain, evaluated):
        training.run(range(8))
        if ema:
            training.step.update_averages(0.5)
            training.run(range(8, 10))
    before = evaluated.values()
    with evaluated.step.evaluated_weights(ema=ema):
        shown = evaluated.values()
        exact = {name: evaluated.step.read_weights(weight, ema=ema) for name, weight in evaluated.weights.items()}
    assert any(not torch.equal(shown[name], before[name]) for name in SHAPES)
    assert_equal({name: value.bfloat16() for name, value in exact.items()}, shown)
    assert_equal(evaluated.values(), before)
    plain.run(range(10, 14))
    evaluated.run(range(10, 14))
    assert_equal(plain.values(), evaluated.values())
    assert_equal(plain.masters(), evaluated.masters())
