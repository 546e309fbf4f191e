"""Compares the peak memory of each rank with what it must hold.

    OMP_NUM_THREADS=1 python -m tests.benchmarks.memory [--quick]

A rank must hold its weights, the float32 weights or remainders beside them, the optimizer's state, float32 gradients, and
the activations of the micro-batches in flight. On an accelerator the peak is that of PyTorch's allocator. On a CPU it is
VmHWM of /proc (Linux) above what the process had before it built the network, over two steps after the first; a tiny
network has been trained and closed by then.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from typing import Any

import torch

from tests.benchmarks.measuring import megabytes, peak, reset_peak, worst_ratio_line
from tests.benchmarks.networks import Engine, Setup, network_arguments, setup_of
from tests.benchmarks.ranks import print_result, run_ranks
from utils.distributed import group
from utils.optim.state_tensors import to_tensors
from utils.pipeline.recompute import Recompute

CASES: dict[str, dict[str, Any]] = {
    "full fp32": {"dtype": "float32"},
    "full bf16": {},
    "full bf16, float32 weights kept": {"master": "float32"},
    "full bf16, step in backward": {"step_in_backward": True, "clip": 0.0, "num_micro_batches": 1},
    "LoRA bf16": {"rank": 16},
    "LoRA bf16, recomputed": {"rank": 16, "recompute": Recompute("all", 99)},
}
LAYOUTS = {"1 process": (1, 1), "2 stages": (2, 2), "2 replicas": (2, 1)}
"""Name -> (processes, stages)."""
NUM_MICRO_BATCHES = 2
LIMIT = 1.15


def parts(engine: Engine) -> dict[str, float]:
    """MiB of what this rank must hold."""
    pipeline, step = engine.pipeline, engine.pipeline._optimizer_step
    weights = sum(one.nbytes for layer in pipeline.local_layers() for one in layer.module.parameters())
    beside = {"float32": 4, "split": 2, "stochastic": 0}[engine.setup.master or "split"]
    if engine.setup.rank is not None:
        beside = 4
    masters = 0 if engine.setup.dtype == "float32" else beside * pipeline.num_owned
    states = [step._optimizer.state.get(one.owned.parameter, {}) for one in step._owned] if step._optimizer else []
    optimizer = sum(tensor.nbytes for state in states for tensor in to_tensors(state).values())
    kept = _activations(engine)
    gradients = 4 * pipeline.num_trained
    found = {"weights": weights + masters, "optimizer": optimizer, "gradients": gradients, "activations": kept}
    return {name: size / 2**20 for name, size in found.items()}


def _activations(engine: Engine) -> float:
    """Bytes of the blocks' activations, of all micro-batches in flight."""
    pipeline, recompute = engine.pipeline, engine.setup.recompute
    blocks = pipeline.measure_blocks(engine.sample)
    pipeline._stage.set_recompute(recompute)
    count = min(recompute.num_blocks, len(blocks))
    kept = sum(block[recompute.mode] for block in blocks[:count]) + sum(block[None] for block in blocks[count:])
    again = max((block[None] for block in blocks[:count]), default=0)
    return pipeline._engine.instructions.position.num_in_flight * kept + again


def run_rank(setup: Setup, num_stages: int) -> None:
    """On one rank: trains three steps and prints what they took."""
    device = group.start()
    first = Engine(replace(setup, network="tiny", pixels=64, device=device), num_stages)
    first.step()  # libraries allocate memory when they are first used
    first.pipeline.close()
    before = megabytes("VmRSS") if device.type == "cpu" else 0.0
    engine = Engine(replace(setup, device=device), num_stages)
    engine.step()
    reset_peak(device)
    engine.step()
    engine.step()
    found = peak(device) - before
    print_result({"peak": found, **parts(engine)})
    group.finish(0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    network_arguments(parser)
    parser.add_argument("--cases", nargs="*", choices=sorted(CASES), default=list(CASES))
    parser.add_argument("--layouts", nargs="*", choices=sorted(LAYOUTS), default=list(LAYOUTS))
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--rank-of", nargs=2, metavar=("CASE", "STAGES"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    setup = setup_of(arguments, torch.device("cpu"))
    setup = replace(setup, num_micro_batches=NUM_MICRO_BATCHES, batch=arguments.batch)
    if arguments.rank_of:
        case, stages = arguments.rank_of
        run_rank(replace(setup, **CASES[case]), int(stages))
    ratios = []
    names = ("peak", "weights", "optimizer", "gradients", "activations")
    print(f"{setup.network}, {setup.pixels} pixels, {setup.batch} images, {NUM_MICRO_BATCHES} micro-batches; MiB")
    print(f"{'':32s} {'':12s} rank" + "".join(f" {name:>11s}" for name in names) + "  ratio")
    chosen = ["--network", setup.network, "--pixels", str(setup.pixels), "--batch", str(setup.batch)]
    for case in arguments.cases:
        for layout in arguments.layouts if "in backward" not in case else ("1 process",):
            count, stages = LAYOUTS[layout]
            found = run_ranks("tests.benchmarks.memory", [*chosen, "--rank-of", case, str(stages)], count)
            for rank, result in enumerate(found):
                ratio = result["peak"] / sum(result[name] for name in names[1:])
                ratios.append(ratio)
                numbers = "".join(f" {result[name]:11.1f}" for name in names)
                print(f"{case:32s} {layout:12s} {rank:4d}{numbers} {ratio:6.3f}", flush=True)
    print(worst_ratio_line(ratios, LIMIT))


if __name__ == "__main__":
    main()
