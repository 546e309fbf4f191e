"""What each rank does for test_pipeline.py: trains the toy network in some cases, resumes, predicts, and saves the results.

Arguments: the folder for the results, the number of stages, names of CASES.
"""

from __future__ import annotations

import sys
import traceback
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from deepspeed.runtime.pipe import p2p
from torch import Tensor, nn

from models.family import PipelineLayer
from tests.distributed.toy_network import (
    INPUT_NAMES,
    RATES,
    WIDTH,
    group_of,
    loss_of,
    make_groups,
    make_layers,
    one_group,
    sample_of,
    shape_of,
    target_of,
)
from utils.config.schema.optimizer import OptimizerConfig
from utils.distributed import group
from utils.distributed.world import world
from utils.optim.registry import make_optimizer, num_sums
from utils.pipeline.engine import EngineSettings, MakeGroups, Pipeline, StepResult
from utils.pipeline.recompute import Recompute
from utils.pipeline.stage import MicroBatch, StagePlan

BOUNDS = {1: [0, 5], 2: [0, 2, 5], 3: [0, 1, 3, 5]}
BATCH, NUM_MICRO_BATCHES = 2, 4
"""Over all replicas together."""
CLIP = 0.1
STOP, NUM_STEPS = 2, 5
EMA_DECAY = 0.75


@dataclass(frozen=True)
class Case:
    """What is trained, and how."""

    optimizer: str = "AdamW"
    dtype: torch.dtype = torch.float32
    groups: MakeGroups = make_groups
    trained: tuple[str, ...] = tuple(RATES)
    """Parameters of other groups are frozen."""
    recompute: Recompute = Recompute()
    only: str = ""
    """Beginning of the names of the parameters that are trained; others are frozen."""


CASES = {
    "groups": Case(),
    "groups in bfloat16": Case(dtype=torch.bfloat16),
    "groups of Adagrad": Case("Adagrad"),
    "groups of SGD": Case("SGD"),
    "groups of Muon": Case("Muon"),
    "groups of AdamW8bit in bfloat16": Case("AdamW8bit", torch.bfloat16),
    "groups of Prodigy": Case("Prodigy"),
    "tokens alone with Prodigy": Case("Prodigy", trained=("tokens",)),
    "tokens alone, schedule-free": Case("AdamWScheduleFree", trained=("tokens",)),
    "schedule-free": Case("AdamWScheduleFree"),
    "schedule-free in bfloat16": Case("AdamWScheduleFree", torch.bfloat16),
    "groups of SOAP": Case("SOAP"),
    "branch alone": Case(trained=("branch",)),
    "tokens alone": Case(trained=("tokens",)),
    "recomputed": Case(recompute=Recompute("all", 3)),
    "one recomputed in bfloat16": Case(dtype=torch.bfloat16, recompute=Recompute("all", 1)),
    "output alone": Case(only="output."),
    "one group": Case(groups=one_group),
    "groups of equal settings": Case(groups=partial(make_groups, decays=dict.fromkeys(RATES))),
}
EQUAL_RATE = 0.01
"""In the cases without a weight decay of any group."""


def rates_of(case: Case, step: int) -> dict[str, float]:
    """Group -> learning rate of a step."""
    rates = RATES if case.groups is make_groups else dict.fromkeys((*RATES, "all"), EQUAL_RATE)
    return {group: rate * (1 + step / 4) for group, rate in rates.items()}


class Trained:
    """A pipeline of the toy network."""

    def __init__(self, case: Case, num_stages: int) -> None:
        self._case = case
        self._num_replicas = world().size // num_stages
        config = OptimizerConfig(type=case.optimizer, learning_rate=1.0)

        def prepare(layer: PipelineLayer, module: nn.Module) -> None:
            for name, parameter in module.named_parameters():
                is_chosen = (layer.prefix + name).startswith(case.only)
                parameter.requires_grad_(is_chosen and group_of(layer.prefix + name) in case.trained)

        self.pipeline = Pipeline(
            StagePlan(make_layers(case.dtype), INPUT_NAMES, WIDTH, BOUNDS[num_stages], case.recompute),
            EngineSettings(BATCH, NUM_MICRO_BATCHES // self._num_replicas, CLIP, case.dtype, num_sums(config)),
            loss=loss_of,
            prepare=prepare,
            groups=case.groups,
            make_optimizer=partial(make_optimizer, config),
        )
        self.parameters = {
            layer.layer.prefix + name: parameter
            for layer in self.pipeline.local_layers()
            for name, parameter in layer.trainable().items()
        }

    def step(self, step: int) -> tuple[float, float]:
        """(loss, gradient norm)."""
        result = self.result(step)
        return result.loss, result.grad_norm

    def result(self, step: int) -> StepResult:
        indices = range(self.pipeline.replica, NUM_MICRO_BATCHES, self._num_replicas)
        shapes = [shape_of(step, index, BATCH) for index in indices]
        rates = rates_of(self._case, step)
        return self.pipeline.train_step(self._micro_batches(step, indices), shapes, rates, EMA_DECAY, step=step)

    def _micro_batches(self, step: int, indices: range) -> Iterator[MicroBatch]:
        is_first = self.pipeline.stage == 0
        for index in indices:
            sample = sample_of(step, index, BATCH, self._case.dtype) if is_first else None
            yield MicroBatch(sample, (target_of(step, index, BATCH),))

    def predictions(self, skipped_blocks: frozenset[int] = frozenset()) -> list[Tensor]:
        """The outputs for two samples; empty off the last stage."""
        samples = [sample_of(1, index, BATCH, self._case.dtype) for index in range(2)]
        shapes = [sample.shape for sample in samples]
        return self.pipeline.predict(shapes, samples if self.pipeline.stage == 0 else [], skipped_blocks) or []

    def weights(self) -> dict[str, Tensor]:
        return {name: self.pipeline.read_weights(parameter) for name, parameter in self.parameters.items()}

    def states(self) -> dict[str, dict[str, Tensor]]:
        return {name: self.pipeline.read_state(parameter) for name, parameter in self.parameters.items()}

    def set_states(self, states: dict[str, dict[str, Tensor]]) -> None:
        self.pipeline.write_states({self.parameters[name]: state for name, state in states.items()})


_SENT: set[str] = set()
"""What this rank has sent to neighbouring stages."""


def record_sends() -> None:
    send = p2p.send

    def recording(tensor: Tensor, stage: int) -> None:
        _SENT.add("activation" if stage > p2p._grid.get_stage_id() else "gradient")
        send(tensor, stage)

    p2p.send = recording


def flat(states: dict[str, dict[str, Tensor]]) -> dict[str, Tensor]:
    return {f"{name}//{state}": tensor for name, tensors in states.items() for state, tensor in tensors.items()}


def assert_equal(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert one.keys() == other.keys(), f"{sorted(one)} {sorted(other)}"
    different = [name for name in one if not torch.equal(one[name], other[name])]
    assert not different, different


def run(case: Case, num_stages: int) -> dict[str, Any]:
    """Trains, and resumes half-way from saved states; both must end alike."""
    straight, resumed = Trained(case, num_stages), Trained(case, num_stages)
    start = straight.weights()
    metrics = []
    _SENT.clear()
    for step in range(NUM_STEPS):
        metrics.append(straight.step(step))
        if step + 1 == STOP:
            resumed.set_states(straight.states())
            assert_equal(flat(resumed.states()), flat(straight.states()))
        elif step + 1 > STOP:
            assert resumed.step(step) == metrics[-1]
    sent = sorted(_SENT)
    states = flat(straight.states())
    assert_equal(flat(resumed.states()), states)
    predicted = {"plain": straight.predictions(), "without block 1": straight.predictions(frozenset({1}))}
    for name, ema in (("evaluated", False), ("averaged", True)):
        with straight.pipeline.evaluated_weights(ema=ema):
            predicted[name] = straight.predictions()
    assert_equal(flat(straight.states()), states)
    groups = [group.name for group in straight.pipeline.groups]
    straight.pipeline.close()
    resumed.pipeline.close()
    return {"metrics": metrics, "start": start, "states": states, "predicted": predicted, "groups": groups, "sent": sent}


def main() -> None:
    folder, num_stages = Path(sys.argv[1]), int(sys.argv[2])
    group.start()
    record_sends()
    results = {}
    for name in sys.argv[3:]:
        try:
            results[name] = run(CASES[name], num_stages)
        except Exception:
            print(f"{name}:\n{traceback.format_exc()}", file=sys.stderr)
            group.finish(1)
    torch.save(results, folder / f"rank_{world().rank}.pt")
    group.finish(0)
