"""The pipeline on a network unlike any of this program's: two branches, integer inputs, several parameter groups.

See toy_network.py and pipeline_ranks.py. Each rank also checks that training resumed from saved states is exact.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.distributed.launch import start_ranks
from tests.distributed.pipeline_ranks import BATCH, CASES, CLIP, NUM_MICRO_BATCHES, NUM_STEPS, rates_of
from tests.distributed.toy_network import PlainNetwork, group_of, loss_of, make_groups, sample_of, target_of
from utils.pipeline.optimizer_step import EMA, MASTER

pytestmark = pytest.mark.distributed

REPLICA_TOLERANCE = 1e-5
FEW_CASES = {
    (3, 1): ("groups", "tokens alone", "output alone", "groups of Prodigy"),
    (2, 2): ("groups of SGD", "groups of Prodigy"),
}
"""(stages, replicas) -> cases that are run, where not all are."""


@dataclass(frozen=True)
class Outcome:
    """One case of one layout, put together from its stages."""

    metrics: list[tuple[float, float]]
    start: dict[str, Tensor]
    states: dict[str, Tensor]
    """"parameter//state" -> tensor after the last step, in the order of the layers."""
    predicted: dict[str, list[Tensor]]
    groups: list[list[str]]
    """The groups of each stage."""

    def weights(self) -> dict[str, Tensor]:
        return {name.removesuffix(f"//{MASTER}"): value for name, value in self.states.items() if name.endswith(MASTER)}


class Layouts:
    """Runs each layout once, when it is first needed."""

    def __init__(self, factory: pytest.TempPathFactory) -> None:
        self._factory = factory
        self._results: dict[tuple[int, int], list[dict[str, Any]]] = {}

    def stages(self, case: str, num_stages: int, num_replicas: int = 1) -> list[dict[str, Any]]:
        """What the first replica of each stage has saved."""
        layout = (num_stages, num_replicas)
        if layout not in self._results:
            folder, num_ranks = self._factory.mktemp("pipeline"), num_stages * num_replicas
            module = "tests.distributed.pipeline_ranks"
            arguments = [str(folder), str(num_stages), *FEW_CASES.get(layout, CASES)]
            finished = start_ranks(num_ranks, arguments, folder / "log.txt", module=module).wait()
            assert finished.exit_code == 0, finished.output
            self._results[layout] = [torch.load(folder / f"rank_{rank}.pt") for rank in range(num_ranks)]
        return [results[case] for results in self._results[layout][::num_replicas]]

    def outcome(self, case: str, num_stages: int, num_replicas: int = 1) -> Outcome:
        stages = self.stages(case, num_stages, num_replicas)
        assert all(stage["metrics"] == stages[0]["metrics"] for stage in stages)
        return Outcome(
            metrics=stages[0]["metrics"],
            start={name: value for stage in stages for name, value in stage["start"].items()},
            states={name: value for stage in stages for name, value in stage["states"].items()},
            predicted=stages[-1]["predicted"],
            groups=[stage["groups"] for stage in stages],
        )


@pytest.fixture(scope="module")
def layouts(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Layouts]:
    yield Layouts(tmp_path_factory)


def assert_equal(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> None:
    assert list(one) == list(other)
    assert not [name for name in one if not torch.equal(one[name], other[name])]


# --- stages ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("case", "num_stages"), [*((case, 2) for case in CASES), *((case, 3) for case in FEW_CASES[3, 1])])
def test_stages_do_not_change_a_bit(layouts: Layouts, case: str, num_stages: int) -> None:
    """Losses, norms, weights, moments, averages and predictions, of shapes that differ from step to step."""
    one, other = layouts.outcome(case, 1), layouts.outcome(case, num_stages)
    assert one.metrics == other.metrics
    assert_equal(one.start, other.start)
    assert_equal(one.states, other.states)
    for kind, tensors in one.predicted.items():
        assert all(torch.equal(*pair) for pair in zip(tensors, other.predicted[kind], strict=True)), kind


def test_norms_are_clipped_in_every_case(layouts: Layouts) -> None:
    """Otherwise a wrong norm would not show in the weights."""
    assert all(max(norm for _, norm in layouts.outcome(case, 1).metrics) > CLIP for case in CASES)


def test_predictions_differ_without_a_block_and_with_the_averaged_weights(layouts: Layouts) -> None:
    plain, skipped, evaluated, averaged = layouts.outcome("groups", 2).predicted.values()
    for one, other, third, fourth in zip(plain, skipped, evaluated, averaged, strict=True):
        assert not torch.equal(one, other)
        assert torch.equal(one, third)
        assert not torch.equal(one, fourth)


@pytest.mark.parametrize("case", ["schedule-free", "schedule-free in bfloat16"])
def test_schedule_free_weights_are_evaluated_at_their_average(layouts: Layouts, case: str) -> None:
    """With the weights y of the last step and z, it is x with y = 0.1 z + 0.9 x."""
    outcome = layouts.outcome(case, 1)
    plain, _, evaluated, _ = outcome.predicted.values()
    assert not torch.equal(plain[0], evaluated[0])
    network = PlainNetwork(CASES[case].dtype)
    with torch.no_grad():
        for name, parameter in network.named().items():
            y, z = outcome.states[f"{name}//{MASTER}"], outcome.states[f"{name}//z"]
            parameter.copy_((y - 0.1 * z) / 0.9)
    expected = network(sample_of(1, 0, BATCH, CASES[case].dtype))
    torch.testing.assert_close(evaluated[0], expected, rtol=1e-2 if "bfloat16" in case else 1e-5, atol=1e-2)


def test_a_stage_has_the_groups_of_its_own_parameters(layouts: Layouts) -> None:
    assert layouts.outcome("groups", 2).groups == [["tokens", "base", "branch"], ["branch", "base"]]
    assert layouts.outcome("tokens alone", 3).groups == [["tokens"], [], []]


@pytest.mark.parametrize(
    ("case", "plain"), [("recomputed", "groups"), ("one recomputed in bfloat16", "groups in bfloat16")]
)
def test_recomputed_blocks_do_not_change_a_bit(layouts: Layouts, case: str, plain: str) -> None:
    for num_stages in (1, 2):
        one, other = layouts.outcome(plain, num_stages), layouts.outcome(case, num_stages)
        assert one.metrics == other.metrics
        assert_equal(one.states, other.states)


# --- groups ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("case", "optimizer"), [("groups", torch.optim.AdamW), ("groups of SGD", torch.optim.SGD)])
def test_groups_train_as_in_a_plain_loop(layouts: Layouts, case: str, optimizer: type[torch.optim.Optimizer]) -> None:
    """Learning rates, weight decays and the norm over all groups, against torch alone."""
    network = PlainNetwork(torch.float32)
    groups = make_groups(network.named())
    entries: list[dict[str, Any]] = [
        {"params": list(group.parameters.values())}
        | ({} if group.weight_decay is None else {"weight_decay": group.weight_decay})
        for group in groups
    ]
    plain, metrics = optimizer(entries, lr=1.0), []
    for parameter in network.parameters():  # the step has zeros, and so weight decay, where torch has no gradient
        parameter.grad = torch.zeros_like(parameter)
    for step in range(NUM_STEPS):
        for group, entry in zip(groups, plain.param_groups, strict=True):
            entry["lr"] = rates_of(CASES[case], step)[group.name]
        plain.zero_grad(set_to_none=False)
        total = 0.0
        for index in range(NUM_MICRO_BATCHES):
            sample = sample_of(step, index, BATCH, torch.float32)
            loss = loss_of(network(sample), (target_of(step, index, BATCH),), sample.shape) / NUM_MICRO_BATCHES
            loss.backward()
            total += float(loss.detach())
        metrics.append((total, float(torch.nn.utils.clip_grad_norm_(network.parameters(), CLIP))))
        plain.step()
    outcome = layouts.outcome(case, 1)
    torch.testing.assert_close(torch.tensor(outcome.metrics), torch.tensor(metrics), rtol=1e-5, atol=0)
    wanted = {name: parameter.detach() for name, parameter in network.named().items()}
    torch.testing.assert_close(outcome.weights(), wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("case", ["groups", "groups in bfloat16", "groups of Adagrad"])
def test_weights_move_in_proportion_to_the_learning_rate_of_their_group(layouts: Layouts, case: str) -> None:
    """The rates are 25 : 5 : 1, and these optimizers move a weight by about the rate in each step."""
    outcome = layouts.outcome(case, 2)
    moved: dict[str, float] = {}
    for name, weights in outcome.weights().items():
        distance = (weights - outcome.start[name]).abs().max()
        moved[group_of(name)] = max(moved.get(group_of(name), 0.0), float(distance))
    assert moved["tokens"] > 2 * moved["branch"] > 4 * moved["base"] > 0


def test_groups_of_equal_settings_train_as_one_group(layouts: Layouts) -> None:
    one, other = layouts.outcome("one group", 2), layouts.outcome("groups of equal settings", 2)
    assert one.metrics == other.metrics
    assert_equal(one.states, other.states)


@pytest.mark.parametrize(("case", "trained"), [("branch alone", "branch"), ("tokens alone", "tokens")])
def test_only_the_parameters_of_the_groups_are_trained(layouts: Layouts, case: str, trained: str) -> None:
    names = set(layouts.outcome(case, 2).weights())
    assert names == {name for name in PlainNetwork(torch.float32).named() if group_of(name) == trained}


def test_every_parameter_of_every_group_has_moments_and_an_average(layouts: Layouts) -> None:
    states: dict[str, set[str]] = {}
    for name in layouts.outcome("groups", 2).states:
        parameter, _, state = name.partition("//")
        states.setdefault(parameter, set()).add(state)
    assert set(map(frozenset, states.values())) == {frozenset({MASTER, EMA, "step", "exp_avg", "exp_avg_sq"})}


# --- what a step sends and refuses -----------------------------------------------------------------------------------------


def test_no_gradient_is_sent_to_stages_that_need_none(layouts: Layouts) -> None:
    """Cut into three stages, of which only the first or only the last is trained."""
    sent = [stage["sent"] for stage in layouts.stages("tokens alone", 3)]
    assert sent == [["activation"], ["activation", "gradient"], ["gradient"]]
    assert [stage["sent"] for stage in layouts.stages("output alone", 3)] == [["activation"], ["activation"], []]


# --- replicas ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_stages", [1, 2])
def test_two_replicas_equal_one_to_reduction_order(layouts: Layouts, num_stages: int) -> None:
    """With SGD, whose steps differ by no more than the gradients."""
    one, two = layouts.outcome("groups of SGD", 1), layouts.outcome("groups of SGD", num_stages, 2)
    torch.testing.assert_close(torch.tensor(two.metrics), torch.tensor(one.metrics), rtol=REPLICA_TOLERANCE, atol=0)
    torch.testing.assert_close(two.states, one.states, rtol=1e-4, atol=1e-6)
