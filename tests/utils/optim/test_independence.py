"""Every allowed optimizer updates a parameter alike whether or not it has others, and resumes exactly from its state."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from docs.list_optimizers import ARGUMENTS, full_name
from utils.config.schema.optimizer import OptimizerConfig
from utils.optim.registry import COLLECTION, OptimizerKind, all_kinds, make_optimizer, optimizer_errors
from utils.optim.schedules import LearningRateSchedule
from utils.pipeline.optimizer_step import Network, OptimizerStep, StepSettings
from utils.pipeline.replicas import Replicas
from utils.trainable.base import ParameterGroup

NUM_STEPS, STOP = 60, 25
"""With few steps, optimizers that estimate their step size from all parameters look independent."""
SHAPES = {
    "embedder.weight": (8, 4, 2, 2),
    "blocks.0.attn.weight": (24, 16),
    "blocks.0.attn.bias": (16,),
    "blocks.0.mlp.weight": (72, 64),
    "blocks.1.down.weight": (4, 30),
    "blocks.1.up.weight": (30, 4),
    "norm.weight": (1,),
}
PARTS = (
    ("blocks.0.attn.weight", "blocks.0.attn.bias", "norm.weight"),
    ("embedder.weight", "blocks.0.mlp.weight"),
    ("blocks.1.down.weight", "blocks.1.up.weight"),
)
KINDS = {full_name(kind): kind for kind in all_kinds() if kind.refusal is None and not kind.num_sums}
"""Those of bitsandbytes and torchao are tested where these packages are installed."""


pytestmark = pytest.mark.usefixtures("process_group")


def draw(name: str, purpose: int) -> Tensor:
    generator = torch.Generator().manual_seed(1000 * list(SHAPES).index(name) + purpose)
    return torch.randn(SHAPES[name], generator=generator)


class Weights:
    """Some of the parameters on a quadratic loss with noise, and their optimizer."""

    def __init__(self, type_name: str, names: Sequence[str] = tuple(SHAPES)) -> None:
        self._weights = {name: nn.Parameter(0.1 * draw(name, 0)) for name in names}
        config = OptimizerConfig(type=type_name, learning_rate=1e-2, args=ARGUMENTS.get(type_name, {}))
        self._step = OptimizerStep(
            list(self._groups()),
            Network(list(SHAPES), num_losses=0),
            Replicas([0], 0, None),
            make_optimizer=partial(make_optimizer, config),
            settings=StepSettings(),
            device=torch.device("cpu"),
        )

    def _groups(self) -> Iterator[ParameterGroup]:
        """Two groups with unequal learning rates, of which a part may have one only."""
        for is_block, rate in ((True, 1e-2), (False, 2e-2)):
            members = {name: weight for name, weight in self._weights.items() if name.startswith("blocks") == is_block}
            if members:
                yield ParameterGroup(str(is_block), members, LearningRateSchedule(rate, "constant", 0, 1.0), None)

    def run(self, steps: range) -> None:
        for step in steps:
            for name, weight in self._weights.items():
                noise = 0.05 * draw(name, 2 + step)
                with torch.enable_grad():
                    loss = 0.5 * (weight - 0.1 * draw(name, 1)).square().sum() + (noise * weight).sum()
                loss.backward()
            torch.manual_seed(step)
            report = self._step.run([])
            assert report.is_finite

    def values(self) -> dict[str, Tensor]:
        return {name: weight.detach().clone() for name, weight in self._weights.items()}

    def states(self) -> dict[str, dict[str, Tensor]]:
        return {name: self._step.read_state(weight) for name, weight in self._weights.items()}

    def set_states(self, states: Mapping[str, Mapping[str, Tensor]]) -> None:
        self._step.write_states({self._weights[name]: state for name, state in states.items()})


def assert_equal(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> None:
    assert one.keys() == other.keys()
    assert not [name for name in one if not torch.equal(one[name], other[name])]


@pytest.mark.parametrize("type_name", KINDS)
def test_optimizer_is_independent_of_the_layout_and_resumes_exactly(type_name: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        whole, resumed, parts = Weights(type_name), Weights(type_name), [Weights(type_name, part) for part in PARTS]
        start = whole.values()
        whole.run(range(STOP))
        resumed.set_states(whole.states())
        whole.run(range(STOP, NUM_STEPS))
        resumed.run(range(STOP, NUM_STEPS))
        for part in parts:
            part.run(range(NUM_STEPS))
    assert all((whole.values()[name] - start[name]).abs().max() > 1e-6 for name in SHAPES), "it moves every parameter"
    assert_equal(whole.values(), resumed.values())
    together = {name: value for part in parts for name, value in part.values().items()}
    assert_equal(whole.values(), {name: together[name] for name in SHAPES})


def test_the_usual_names_of_other_trainers_are_known() -> None:
    wanted = ("AdamW", "adamw8bit", "prodigy", "Lion", "CAME", "AdaFactor", "Muon", "AdamWScheduleFree", "RAdamScheduleFree")
    for name in (*wanted, "SGD", "SOAP", "StableAdamW"):
        assert optimizer_errors(OptimizerConfig(type=name, learning_rate=1e-3)) == [], name


def test_every_optimizer_of_the_packages_is_allowed_or_refused_with_a_reason() -> None:
    kinds: list[OptimizerKind] = list(all_kinds())
    collection = [kind for kind in kinds if kind.package == COLLECTION]
    assert len(collection) > 120
    assert sum(kind.refusal is None for kind in collection) >= 85


def test_state_of_a_parameter_goes_to_a_file_and_back(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    from utils.optim.state_tensors import from_tensors, to_tensors

    state = {"step": 3, "rate": 0.1, "on": True, "none": None, "empty": [], "holes": [[], [1.5]]}
    state["lists"] = [torch.ones(2), [torch.zeros(1), None]]
    save_file(to_tensors(state), tmp_path / "state.safetensors")
    found = from_tensors(load_file(tmp_path / "state.safetensors"))
    assert found.keys() == state.keys()
    assert (found["step"], found["rate"], found["on"], found["none"], found["empty"]) == (3, 0.1, True, None, [])
    assert found["holes"] == [[], [1.5]]
    assert torch.equal(found["lists"][0], torch.ones(2))
    assert torch.equal(found["lists"][1][0], torch.zeros(1)) and found["lists"][1][1] is None
    by_columns = torch.randn(3, 4).t()
    stored = to_tensors({"matrix": by_columns})
    assert all(tensor.is_contiguous() for tensor in stored.values())
    found = from_tensors(stored)
    assert torch.equal(found["matrix"], by_columns) and found["matrix"].stride() == by_columns.stride()
    with pytest.raises(TypeError, match="no checkpoint"):
        to_tensors({"object": object()})
