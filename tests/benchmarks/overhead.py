"""Measures what the engine adds to a plain training loop:  OMP_NUM_THREADS=1 python -m tests.benchmarks.overhead [--quick]

One process trains the same network with `Pipeline.train_step` and with a loop of forward, backward, clipping and optimizer
step that uses nothing of utils/pipeline. Their steps alternate, so that both see the same machine. A ratio is the median of
the times of one divided by that of the other.
"""

from __future__ import annotations

import argparse
import statistics
from dataclasses import replace

from tests.benchmarks.measuring import worst_ratio_line
from tests.benchmarks.networks import Engine, PlainLoop, Setup, network_arguments, setup_of
from utils.distributed import group
from utils.pipeline.measure import synchronized_time

CASES = {
    "full fp32": {"dtype": "float32"},
    "full bf16": {},
    "full bf16, float32 weights kept": {"master": "float32"},
    "LoRA bf16": {"rank": 16},
}
MICRO_BATCHES = (1, 4, 8)
LIMIT = 1.02
"""The goal for every ratio."""


def measure(setup: Setup, rounds: int) -> tuple[float, float]:
    """Median seconds of a step of the engine and of the plain loop, after two steps of each."""
    engine, plain = Engine(setup), PlainLoop(setup)
    times: tuple[list[float], list[float]] = ([], [])
    losses = []
    for _ in range(rounds + 2):
        began = synchronized_time(setup.device)
        one = engine.step().loss
        middle = synchronized_time(setup.device)
        losses.append((one, plain.step()))
        times[0].append(middle - began)
        times[1].append(synchronized_time(setup.device) - middle)
    assert all(abs(one / other - 1) < 0.05 for one, other in losses), f"they do not train alike: {losses}"
    engine.pipeline.close()
    return statistics.median(times[0][2:]), statistics.median(times[1][2:])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    network_arguments(parser)
    parser.add_argument("--cases", nargs="*", choices=sorted(CASES), default=list(CASES))
    parser.add_argument("--micro-batches", nargs="*", type=int, default=MICRO_BATCHES)
    arguments = parser.parse_args()
    setup = setup_of(arguments, group.start())
    rounds = arguments.rounds or (5 if arguments.quick else 9)
    ratios = []
    print(f"{setup.network}, {setup.pixels} pixels, {rounds} steps of each in turn; ms")
    print(f"{'':32s} {'M':>2s} {'engine':>8s} {'plain':>8s} {'ratio':>6s}")
    for case in arguments.cases:
        for count in arguments.micro_batches:
            engine, plain = measure(replace(setup, num_micro_batches=count, **CASES[case]), rounds)
            ratios.append(engine / plain)
            print(f"{case:32s} {count:2d} {1e3 * engine:8.1f} {1e3 * plain:8.1f} {engine / plain:6.3f}", flush=True)
    print(worst_ratio_line(ratios, LIMIT))
    group.finish(0)


if __name__ == "__main__":
    main()
