"""Measures how much of the pipeline's time is lost:  OMP_NUM_THREADS=1 python -m tests.benchmarks.bubble [--quick]

Two processes train a network of two stages with 8 micro-batches a step, once for each kind of `pipeline.partition`; the
steps of all kinds alternate. Each stage records how long its forward and backward passes take. From these durations follow

    ideal   the time of the schedule (one forward, one backward in turn) with exactly these passes, without transfers
    even    the time of the schedule if the same work were divided evenly among the stages: work / 2 * (M + 1) / M

    ratio = ideal / measured: what remains when the engine's transfers and waits are added
    cut   = even / ideal: what remains because stages consist of whole blocks and their costs are not known exactly
    total = even / measured = ratio * cut

The schedule's own bubble, 1 / (M + 1) of the time, is in all three times. `speedup` is the time of the same passes in one
process, the other one idle, over the measured time, and `of bound` is that over 2 M / (M + 1). Numbers are medians over the
steps. The optimizer step is not included. `busy` is CPU time over wall time of the passes: below 1, other programs used the
cores.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from deepspeed.runtime.pipe.schedule import BackwardPass, ForwardPass, TrainSchedule
from safetensors.torch import save_file

from models.streams import Sample
from tests.benchmarks.networks import sample_of
from tests.distributed.launch import child_environment, free_port
from tests.tiny_model import (
    CONTEXT_DIM,
    POOLED_DIM,
    make_tiny_dataset,
    make_tiny_model,
    native_shapes,
    random_weights,
    write_experiment,
)
from utils.distributed import group
from utils.distributed.world import world
from utils.objective.objective import Objective
from utils.pipeline.engine import Pipeline
from utils.pipeline.stage import MicroBatch, Stage, StagePlan
from utils.run.build import build_pipeline
from utils.run.experiment import Experiment
from utils.run.partition import measure_partition
from utils.run.prepare import prepare

NUM_STAGES = 2
PARTITIONS = ("uniform", "cost", "measured")
GOAL = 0.95
"""For the ratio of every partition."""
Passes = list[tuple[str, float, float, float]]
"""("forward" or "backward", begin, end, CPU seconds) of each pass of a stage in a step."""


@dataclass
class Recorder:
    """Records the passes of a pipeline's stage."""

    pipeline: Pipeline
    passes: Passes = field(default_factory=list)
    span: tuple[float, float] = (0.0, 0.0)
    """Begin and end of the passes of the last step."""

    def __post_init__(self) -> None:
        engine: Any = self.pipeline._engine
        for name in ("forward", "backward"):
            setattr(engine.instructions, name, self._timed(name, getattr(engine.instructions, name)))
        run = engine.run

        def timed_run(*arguments: Any) -> Any:
            self.passes.clear()
            dist.barrier()
            began = time.perf_counter()
            losses = run(*arguments)
            self.span = (began, time.perf_counter())
            return losses

        engine.run = timed_run

    def _timed(self, name: str, call: Callable[[int], None]) -> Callable[[int], None]:
        def timed(buffer_id: int) -> None:
            began, cpu = time.perf_counter(), time.thread_time()
            call(buffer_id)
            self.passes.append((name, began, time.perf_counter(), time.thread_time() - cpu))

        return timed


@dataclass(frozen=True)
class Step:
    """Seconds of one step."""

    measured: float
    ideal: float
    even: float
    alone: float
    busy: float
    stages: list[float]
    """Mean seconds of a forward and a backward pass of each stage."""


def ideal_seconds(durations: Sequence[Sequence[float]]) -> float:
    """The end of the schedule's last pass if each pass begins when its inputs are there. `durations`: by stage, in order."""
    num_stages, num_micro_batches = len(durations), len(durations[0]) // 2
    orders = []
    for stage in range(num_stages):
        commands = itertools.chain.from_iterable(TrainSchedule(num_micro_batches, num_stages, stage).steps())
        kinds = [type(command) for command in commands if isinstance(command, ForwardPass | BackwardPass)]
        counts = {ForwardPass: itertools.count(), BackwardPass: itertools.count()}
        orders.append([(kind, next(counts[kind])) for kind in kinds])
    ends: dict[tuple[int, type, int], float] = {}
    positions = [0] * num_stages
    clocks = [0.0] * num_stages
    while any(position < len(order) for position, order in zip(positions, orders, strict=True)):
        for stage, order in enumerate(orders):
            while positions[stage] < len(order):
                kind, index = order[positions[stage]]
                source = stage - 1 if kind is ForwardPass else stage + 1
                if 0 <= source < num_stages and (source, kind, index) not in ends:
                    break
                begin = max(clocks[stage], ends.get((source, kind, index), 0.0))
                clocks[stage] = begin + durations[stage][positions[stage]]
                ends[stage, kind, index] = clocks[stage]
                positions[stage] += 1
    return max(clocks)


def summarise(stages: Sequence[Passes], spans: Sequence[tuple[float, float]], alone: float) -> Step:
    """The numbers of one step from the passes of all stages."""
    durations = [[end - begin for _, begin, end, _ in passes] for passes in stages]
    num_micro_batches, work = len(durations[0]) // 2, sum(map(sum, durations))
    return Step(
        measured=max(end for _, end in spans) - min(begin for begin, _ in spans),
        ideal=ideal_seconds(durations),
        even=work / len(stages) * (num_micro_batches + len(stages) - 1) / num_micro_batches,
        alone=alone,
        busy=sum(cpu for passes in stages for *_, cpu in passes) / work,
        stages=[sum(own) / num_micro_batches for own in durations],
    )


# --- on each rank --------------------------------------------------------------------------------------------------------


def run_alone(stage: Stage, samples: Sequence[Sample]) -> float:
    """Seconds of the same passes through the whole network in one process."""
    began = time.perf_counter()
    for sample in samples:
        output = stage(dict(sample.tensors), sample.shape)
        (output.float().square().mean() / len(samples)).backward()
    seconds = time.perf_counter() - began
    stage.zero_grad()
    return seconds


def measure(config: Path, num_rounds: int, side: int) -> dict[str, Any]:
    """All ranks: for each partition its description, the steps, and the losses."""
    device = group.start()
    opened: dict[str, Experiment] = {}
    recorders: dict[str, Recorder] = {}
    for kind in PARTITIONS:
        experiment = prepare(config, [f'pipeline.partition="{kind}"'], None, world())
        experiment = replace(experiment, partition=group.broadcast(experiment.partition))
        opened[kind] = measure_partition(experiment, device)
        objective = Objective(experiment.config.experiment.objective, experiment.family.shift_at)
        pipeline = build_pipeline(opened[kind], objective)
        pipeline._engine.instructions.loss = lambda output, _target, _shape: output.float().square().mean()
        recorders[kind] = Recorder(pipeline)
    family, dtype = experiment.family, experiment.config.experiment.model.torch_dtype
    whole = StagePlan(family.layers, family.input_names, family.stream_width, [0, len(family.layers)])
    stage = Stage(whole, 0, experiment.trainable.prepare, dtype) if world().is_main else None
    count = experiment.config.experiment.pipeline.gradient_accumulation_steps
    shape = family.sample_shape(1, side, side)
    samples = [sample_of(experiment.family.config, shape, dtype, index) for index in range(count)]
    steps: dict[str, list[Step]] = {kind: [] for kind in PARTITIONS}
    for _ in range(num_rounds + 1):
        alone = group.broadcast(run_alone(stage, samples) if stage is not None else 0.0)
        losses = set()
        for kind, recorder in recorders.items():
            batches = [MicroBatch(sample, ()) for sample in samples]
            shapes = [sample.shape for sample in samples]
            losses.add(recorder.pipeline.train_step(batches, shapes, {"default": 1e-6}, None, step=0).loss)
            found = group.gather((recorder.passes, recorder.span))
            steps[kind].append(summarise([passes for passes, _ in found], [span for _, span in found], alone))
        assert len(losses) == 1, f"the partitions train differently: {losses}"
    return {
        kind: [opened[kind].partition.description, [vars(step) for step in steps[kind][1:]]] for kind in PARTITIONS
    }


# --- the table -----------------------------------------------------------------------------------------------------------


def write_network(folder: Path, *, width: int, depth: int, num_dual: int) -> Path:
    """The tiny model with a network of this size, whose first blocks have a second attention."""
    model = make_tiny_model(folder / "model")
    shapes = native_shapes(
        depth=depth,
        width=width,
        context_dim=CONTEXT_DIM,
        pooled_dim=POOLED_DIM,
        pos_embed_max_size=64,
        qk_norm=True,
        dual_attention_layers=tuple(range(num_dual)),
    )
    save_file(random_weights(shapes), model / "mmdit.safetensors")
    return model


def run_ranks(arguments: Sequence[str]) -> dict[str, Any]:
    """Starts every rank as a launcher would; returns what rank 0 printed."""
    port = str(free_port())
    processes = []
    for rank in range(NUM_STAGES):
        variables = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": NUM_STAGES, "LOCAL_WORLD_SIZE": NUM_STAGES}
        environment = {**child_environment(), **{key: str(value) for key, value in variables.items()}}
        environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        command = [sys.executable, "-m", "tests.benchmarks.bubble", *arguments]
        processes.append(subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True))
    outputs = [process.communicate()[0] for process in processes]
    if any(process.returncode for process in processes):
        raise RuntimeError("".join(outputs))
    found: dict[str, Any] = json.loads(outputs[0].splitlines()[-1])
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a smaller network and fewer steps")
    parser.add_argument("--micro-batches", type=int, default=8)
    parser.add_argument("--rank-of", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    width, depth, num_dual, side, num_rounds = (192, 24, 13, 16, 5) if arguments.quick else (256, 24, 13, 24, 9)
    if arguments.rank_of is not None:
        print(json.dumps(measure(arguments.rank_of, num_rounds, side)), flush=True)
        group.finish(0)
    with tempfile.TemporaryDirectory() as name:
        folder, count = Path(name), arguments.micro_batches
        model, dataset = write_network(folder, width=width, depth=depth, num_dual=num_dual), folder / "images"
        settings = {
            "pipeline.pipeline_stages": NUM_STAGES,
            "pipeline.micro_batch_size_per_gpu": 1,
            "pipeline.gradient_accumulation_steps": count,
            "model.t5xxl_max_token_length": 64,
        }
        make_tiny_dataset(dataset)
        squares = {"resolutions": [8 * side], "enable_ar_bucket": False}
        squares |= dict.fromkeys(("min_ar", "max_ar", "num_ar_buckets"))
        config = write_experiment(folder, model, dataset, dataset_file=squares, **settings)
        own = ["--rank-of", str(config), *(["--quick"] if arguments.quick else [])]
        table = run_ranks(own)
    print(f"width {width}, depth {depth}, {num_dual} blocks with a second attention, {side * 8} pixels, M = {count}")
    print(f"{num_rounds} steps of each in turn; ms; load {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores")
    heading = ("stages", "measured", "ideal", "ratio", "cut", "total", "speedup", "of bound", "busy")
    print(f"{'':10s} {heading[0]:>13s}" + "".join(f"{title:>9s}" for title in heading[1:]))
    worst = 1.0
    for kind, (description, found) in table.items():
        steps = [Step(**step) for step in found]
        worst = min(worst, _print_row(kind, steps, 2 * count / (count + 1)))
        print(f"{'':10s} {description}")
    print(f"worst ratio {worst:.3f}" + (f" (goal: at least {GOAL})" if worst < GOAL else ""))


def _print_row(kind: str, steps: Sequence[Step], bound: float) -> float:
    """Prints the medians over the steps; returns the ratio."""

    def median(value: Callable[[Step], float]) -> float:
        return statistics.median(map(value, steps))

    each = [statistics.median(step.stages[stage] for step in steps) for stage in range(NUM_STAGES)]
    stages = " + ".join(f"{1e3 * seconds:.1f}" for seconds in each)
    ratio = median(lambda step: step.ideal / step.measured)
    numbers = [
        f"{1e3 * median(lambda step: step.measured):9.1f}",
        f"{1e3 * median(lambda step: step.ideal):9.1f}",
        f"{ratio:9.3f}",
        f"{median(lambda step: step.even / step.ideal):9.3f}",
        f"{median(lambda step: step.even / step.measured):9.3f}",
        f"{median(lambda step: step.alone / step.measured):9.3f}",
        f"{median(lambda step: step.alone / step.measured) / bound:9.3f}",
        f"{median(lambda step: step.busy):9.3f}",
    ]
    print(f"{kind:10s} {stages:>13s}" + "".join(numbers), flush=True)
    return ratio


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
