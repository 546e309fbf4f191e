"""What each rank does for test_ema.py: trains a small layer with each optimizer, and checks the average of its weights.

All ranks are replicas. With two, a parameter is divided between them, and the second's partition has padding.
"""

from __future__ import annotations

import itertools
import sys
import traceback
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from models.family import PipelineLayer
from models.streams import Sample, SampleShape, Streams
from tests.distributed.toy_network import no_cost
from utils.config.schema.optimizer import OptimizerConfig
from utils.distributed import group
from utils.distributed.world import world
from utils.optim.registry import make_optimizer
from utils.optim.schedules import LearningRateSchedule
from utils.pipeline.engine import EngineSettings, Pipeline
from utils.pipeline.optimizer_step import EMA
from utils.pipeline.stage import MicroBatch, StagePlan
from utils.trainable.base import ParameterGroup

DECAY = 0.75
STOP, NUM_STEPS = 2, 4
IN_FLOAT32 = ("AdamW", "Adam", "SGD", "RMSprop", "Adagrad", "NAdam", "RAdam", "Adamax", "ASGD", "Rprop")
IN_BFLOAT16 = ("AdamW", "SGD")
"""Few, because constructing DeepSpeed's optimizer takes a second."""
CASES: list[tuple[str, dict[str, Any], torch.dtype]] = [
    *((name, {}, torch.float32) for name in IN_FLOAT32),
    ("SGD", {"momentum": 0.9}, torch.float32),
    *((name, {}, torch.bfloat16) for name in IN_BFLOAT16),
]


class Layer(nn.Module):
    """21 weights in three parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.full((1,), 0.5))
        self.weight = nn.Parameter(torch.linspace(-1, 1, 15).view(5, 3))
        self.bias = nn.Parameter(torch.linspace(1, 2, 5))

    def forward(self, inputs: Streams) -> Tensor:
        return nn.functional.linear(inputs["rows"], self.weight, self.bias) * self.scale


SHAPE = SampleShape(batch=2, height=1, width=1, num_text_tokens=0)
SCHEDULE = LearningRateSchedule(peak=0.01, course="constant", warmup_steps=0, min_ratio=1.0)


class Trained:
    """A pipeline with this one layer."""

    def __init__(self, optimizer: str, arguments: dict[str, Any], dtype: torch.dtype) -> None:
        config = OptimizerConfig(type=optimizer, learning_rate=1.0, args=arguments)
        self._dtype = dtype
        self._pipeline = Pipeline(
            StagePlan([PipelineLayer("layer", "layer.", no_cost, {}, Layer)], ("rows",), 5, [0, 1]),
            EngineSettings(micro_batch_size=2, num_micro_batches=1, gradient_clipping=0.0, dtype=dtype),
            loss=lambda output, target, shape: nn.functional.mse_loss(output, target[0]),
            prepare=lambda layer, module: None,
            groups=lambda named: [ParameterGroup("all", named, SCHEDULE, None)],
            make_optimizer=partial(make_optimizer, config),
        )
        (layer,) = self._pipeline.local_layers()
        self._parameters = list(layer.trainable().values())

    def step(self, step: int, decay: float | None) -> None:
        self._pipeline.train_step(self._micro_batches(step), [SHAPE], {"all": SCHEDULE.peak}, decay, step=step)

    def _micro_batches(self, step: int) -> Iterator[MicroBatch]:
        return itertools.repeat(MicroBatch(self._sample(step), (torch.zeros(2, 5, dtype=self._dtype),)))

    def _sample(self, step: int) -> Sample:
        rows = torch.linspace(-1, 1 + step + world().rank, 6).view(2, 3)
        return Sample({"rows": rows.to(self._dtype)}, SHAPE)

    def weights(self, *, ema: bool = False) -> list[Tensor]:
        return [self._pipeline.read_weights(parameter, ema=ema) for parameter in self._parameters]

    def state(self) -> list[dict[str, Tensor]]:
        return [self._pipeline.read_state(parameter) for parameter in self._parameters]

    def working(self) -> list[Tensor]:
        """Copies of the parameters the layer computes with."""
        return [parameter.detach().clone() for parameter in self._parameters]

    def output(self) -> Tensor:
        (output,) = self._pipeline.predict([SHAPE], [self._sample(0)]) or []
        return output

    def check_averaged_weights(self) -> None:
        """Within the context the layer computes with the average; before and after it with the same weights, bit for bit."""
        weights, working, output, state = self.weights(), self.working(), self.output(), self.state()
        average = [tensor.to(self._dtype) for tensor in self.weights(ema=True)]
        with self._pipeline.evaluated_weights(ema=True):
            assert_equal(self.working(), average, "working weights")
            assert_equal(self.weights(), weights, "the optimizer's weights within the context")
            averaged_output = self.output()
        assert not torch.equal(averaged_output, output)
        assert_equal(self.working(), working, "working weights afterwards")
        assert_equal([self.output()], [output], "output afterwards")
        for after, before in zip(self.state(), state, strict=True):
            assert_equal(list(after.values()), list(before.values()), "optimizer state afterwards")

    def set_state(self, state: list[dict[str, Tensor]]) -> None:
        self._pipeline.write_states(dict(zip(self._parameters, state, strict=True)))


def assert_equal(one: list[Tensor], other: list[Tensor], what: str) -> None:
    assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True)), f"{what}: {one} {other}"


def check(optimizer: str, arguments: dict[str, Any], dtype: torch.dtype) -> None:
    """The average follows the weights and can be used for a while, it does not change training, and resuming from a saved
    state is exact."""
    averaged, plain, resumed = (Trained(optimizer, arguments, dtype) for _ in range(3))
    average = averaged.weights()
    for step in range(NUM_STEPS):
        before = averaged.weights()
        averaged.step(step, DECAY)
        if step:  # after the first step the average equals the weights
            averaged.check_averaged_weights()
        plain.step(step, None)
        now = averaged.weights()
        assert not any(torch.equal(a, b) for a, b in zip(before, now, strict=True)), "a parameter was not changed"
        assert_equal(now, plain.weights(), "trained with an average")
        average = [torch.lerp(a, w, 1 - DECAY) for a, w in zip(average, now, strict=True)] if step else now
        assert_equal(averaged.weights(ema=True), average, f"average after step {step + 1}")
        if step + 1 == STOP:
            saved = averaged.state()
            assert_equal([tensors[EMA] for tensors in saved], average, "saved average")
            resumed.set_state(saved)
        if step + 1 >= STOP:
            assert_equal(resumed.weights(ema=True), average, f"average of the resumed run after step {step + 1}")
            assert_equal(resumed.weights(), now, f"weights of the resumed run after step {step + 1}")
            resumed.check_averaged_weights()
            resumed.step(step + 1, DECAY)


def main() -> None:
    group.start()
    for case in CASES:
        try:
            check(*case)
        except Exception:
            print(f"{case}:\n{traceback.format_exc()}", file=sys.stderr)
            group.finish(1)
    print(f"{len(CASES)} cases")
    group.finish(0)
