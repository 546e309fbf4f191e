"""Time and memory of every recompute mode:  OMP_NUM_THREADS=1 python -m tests.benchmarks.recompute [--quick]

One process trains with learning rate 0 in one mode after the other, from the least memory to the most, so that loss and
gradient norm must be equal in all. Time is the least of the measured steps. Memory is the peak of PyTorch's allocator; on a
CPU that of the process (VmHWM, Linux) above what it had before. Ratios are to no recompute.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
from dataclasses import replace
from typing import Any

from tests.benchmarks.measuring import megabytes, peak, reset_peak
from tests.benchmarks.networks import Engine, Setup, network_arguments, setup_of
from utils.distributed import group
from utils.pipeline.measure import synchronized_time
from utils.pipeline.recompute import Recompute

KINDS: dict[str, dict[str, Any]] = {"LoRA bf16": {"rank": 16}, "full bf16": {}}


def modes(num_blocks: int) -> dict[str, Recompute]:
    """Name -> mode, from the least memory to the most."""
    return {
        "all": Recompute("all", num_blocks),
        "half of the blocks": Recompute("all", num_blocks // 2),
        "matmuls": Recompute("matmuls", num_blocks),
        "norms": Recompute("norms", num_blocks),
        "none": Recompute(),
    }


def measure(setup: Setup, rounds: int) -> dict[str, tuple[float, float, list[float]]]:
    """Mode -> (seconds of a step, MiB, loss and gradient norm)."""
    first = Engine(replace(setup, network="tiny", pixels=64))
    first.step()  # libraries allocate memory when they are first used
    first.pipeline.close()
    before = megabytes("VmRSS") if setup.device.type == "cpu" else 0.0
    engine = Engine(setup)
    found = {}
    for name, mode in modes(engine.family.num_blocks).items():
        engine.pipeline._stage.set_recompute(mode)
        engine.step(rate=0.0)
        gc.collect()
        if setup.device.type == "cpu":
            ctypes.CDLL("libc.so.6").malloc_trim(0)
        reset_peak(setup.device)
        times = []
        for _ in range(rounds):
            began = synchronized_time(setup.device)
            result = engine.step(rate=0.0)
            times.append(synchronized_time(setup.device) - began)
        found[name] = min(times), peak(setup.device) - before, [result.loss, result.grad_norm]
    engine.pipeline.close()
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    network_arguments(parser)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--kinds", nargs="*", choices=sorted(KINDS), default=list(KINDS))
    arguments = parser.parse_args()
    setup = replace(setup_of(arguments, group.start()), batch=arguments.batch)
    rounds = arguments.rounds or (3 if arguments.quick else 7)
    print(f"{setup.network}, {setup.pixels} pixels, {setup.batch} images, the best of {rounds} steps")
    print(f"{'':10s} {'':20s} {'ms':>8s} {'ratio':>6s} {'peak MiB':>9s} {'ratio':>6s}  loss and gradient norm")
    for kind in arguments.kinds:
        found = measure(replace(setup, **KINDS[kind]), rounds)
        seconds, most, numbers = found["none"]
        for mode, (time, memory, others) in found.items():
            same = "equal" if others == numbers else f"differ: {others} from {numbers}"
            times = f"{1e3 * time:8.1f} {time / seconds:6.3f} {memory:9.0f} {memory / most:6.3f}"
            print(f"{kind:10s} {mode:20s} {times}  {same}", flush=True)
    group.finish(0)


if __name__ == "__main__":
    main()
