"""What each rank does for test_steps.py, with two stages: a step that is not finite, and many pipelines in a row."""

from __future__ import annotations

import ctypes
import math
import sys
import traceback
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn

from models.family import PipelineLayer
from models.streams import Sample, SampleShape, Streams, StreamSpec
from tests.distributed.pipeline_ranks import CASES, Trained, assert_equal, flat
from tests.distributed.toy_network import no_cost
from utils.distributed import group
from utils.distributed.world import world
from utils.optim.schedules import LearningRateSchedule
from utils.pipeline.engine import EngineSettings, Pipeline
from utils.pipeline.stage import MicroBatch, StagePlan
from utils.trainable.base import ParameterGroup

NUM_PIPELINES = 20
WIDTH = 1024
"""A layer has 4 MiB of weights, and trained with AdamW 16 MiB."""
ALLOWED_GROWTH = 16 * 2**20
"""Bytes by which the resident memory may grow from the third pipeline to the last."""


def check_bad_gradient() -> None:
    """A gradient that is not finite names its layer on every rank and changes nothing; the next step trains."""
    for dtype_case in ("groups", "groups in bfloat16"):
        trained = Trained(CASES[dtype_case], num_stages=2)
        trained.step(0)
        before, bad = flat(trained.states()), "blocks_1.text.weight"
        hooks = [
            parameter.register_hook(lambda gradient: torch.full_like(gradient, math.nan))
            for name, parameter in trained.parameters.items()
            if name == bad
        ]
        result = trained.result(1)
        assert math.isfinite(result.loss) and math.isnan(result.grad_norm)
        assert result.bad_parameter == bad, result.bad_parameter
        assert_equal(flat(trained.states()), before)
        for hook in hooks:
            hook.remove()
        assert math.isfinite(trained.result(1).grad_norm)
        assert flat(trained.states()).keys() == before.keys()
        trained.pipeline.close()


def check_bad_loss() -> None:
    """A micro-batch whose loss is not finite changes nothing either."""
    trained = Trained(CASES["groups"], num_stages=2)
    trained.step(0)
    before = flat(trained.states())
    for layer in trained.pipeline.local_layers():
        if layer.layer.name == "output":
            bias = layer.module.linear.bias
            kept = bias.detach().clone()
            bias.data.fill_(math.inf)
    assert not math.isfinite(trained.result(1).loss)
    if world().rank == 1:
        bias.data.copy_(kept)
    assert_equal(flat(trained.states()), before)


class Linear(nn.Linear):
    def __init__(self) -> None:
        super().__init__(WIDTH, WIDTH)

    def forward(self, streams: Streams) -> Streams:  # type: ignore[override]
        return {"rows": super().forward(streams["rows"])}


class Last(Linear):
    def forward(self, streams: Streams) -> Tensor:  # type: ignore[override]
        return super().forward(streams)["rows"]


def resident() -> int:
    """Resident bytes, without those that the allocator keeps although everything in them was freed."""
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmRSS"))
    return int(line.split()[1]) * 1024


def check_close() -> None:
    """Pipelines that were closed leave no memory and no process groups behind, whose threads would stay."""
    num_groups = len(dist.distributed_c10d._world.pg_map)
    rows = (StreamSpec("rows", lambda shape: 1),)
    layers = [
        PipelineLayer("first", "first.", no_cost, {}, Linear, outputs=rows),
        PipelineLayer("last", "last.", no_cost, {}, Last),
    ]
    shape = SampleShape(2, 1, 1, 0)
    sizes = []
    for _ in range(NUM_PIPELINES):
        pipeline = Pipeline(
            StagePlan(layers, ("rows",), WIDTH, [0, 1, 2]),
            EngineSettings(2, 1, gradient_clipping=1.0, dtype=torch.float32),
            loss=lambda output, _target, _shape: output.square().mean(),
            prepare=lambda _layer, _module: None,
            groups=lambda named: [ParameterGroup("all", named, LearningRateSchedule(1e-3, "constant", 0, 1.0), None)],
            make_optimizer=lambda entries: torch.optim.AdamW(entries),
        )
        sample = Sample({"rows": torch.randn(2, 1, WIDTH)}, shape)
        pipeline.train_step([MicroBatch(sample, ())], [shape], {"all": 1e-3}, ema_decay=0.9, step=0)
        pipeline.close()
        sizes.append(resident())
    assert len(dist.distributed_c10d._world.pg_map) == num_groups
    assert sizes[-1] - sizes[2] < ALLOWED_GROWTH, [size // 2**20 for size in sizes]


CHECKS: dict[str, Callable[[], None]] = {
    "bad gradient": check_bad_gradient,
    "bad loss": check_bad_loss,
    "close": check_close,
}


def main() -> None:
    group.start()
    try:
        CHECKS[sys.argv[1]]()
    except Exception:
        traceback.print_exc()
        group.finish(1)
    group.finish(0)
