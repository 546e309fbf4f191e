"""Compares the network with diffusers' SD3Transformer2DModel.

    OMP_NUM_THREADS=1 python -m tests.benchmarks.diffusers_network

Both have the same weights and get the same inputs; forward and backward passes alternate in one process. A ratio is the
median of our times divided by that of diffusers'.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from models.streams import passed_on
from tests.benchmarks.measuring import worst_ratio_line
from tests.benchmarks.networks import Setup, network_arguments, setup_of
from utils.distributed import group
from utils.pipeline.measure import synchronized_time

LIMIT = 1.0
TOLERANCES = {"float32": 1e-4, "bfloat16": 0.05}


def our_network(setup: Setup) -> tuple[nn.ModuleList, Callable[[], Tensor]]:
    """The layers, and their output for the setup's sample."""
    family = setup.family
    modules = nn.ModuleList(layer.build().to(setup.device) for layer in family.layers)
    sample = setup.samples(family)[0]

    def run() -> Tensor:
        value: Any = dict(sample.tensors)
        for layer, module in zip(family.layers, modules, strict=True):
            value = module(value)
            value = passed_on(value, layer.outputs) if layer.outputs else value
        return family.velocity(value, sample.shape)

    return modules, run


def their_network(setup: Setup, ours: nn.ModuleList) -> tuple[nn.Module, Callable[[], Tensor]]:
    """diffusers' model with our weights, and its output for the setup's sample."""
    from diffusers import SD3Transformer2DModel

    family = setup.family
    settings = {key: value for key, value in family.diffusers_config().items() if not key.startswith("_")}
    model = SD3Transformer2DModel(**settings).to(setup.device, setup.torch_dtype)
    native = {
        layer.prefix + name: tensor
        for layer, module in zip(family.layers, ours, strict=True)
        for name, tensor in module.state_dict().items()
    }
    weights = family.diffusers_weights(native)
    weights["pos_embed.pos_embed"] = weights["pos_embed.pos_embed"].to(setup.device)
    model.load_state_dict(weights)
    sample = setup.samples(family)[0].tensors

    def run() -> Tensor:
        output: Tensor = model(
            hidden_states=sample["noisy_latents"],
            timestep=sample["timestep"],
            encoder_hidden_states=sample["context"],
            pooled_projections=sample["pooled"],
            return_dict=False,
        )[0]
        return output

    return model, run


def measure(setup: Setup, rounds: int) -> tuple[float, float, float]:
    """(our median seconds, theirs, relative difference of the outputs)."""
    ours, run_ours = our_network(setup)
    theirs, run_theirs = their_network(setup, ours)
    times: tuple[list[float], list[float]] = ([], [])
    for _ in range(rounds + 2):
        for module, run, found in ((ours, run_ours, times[0]), (theirs, run_theirs, times[1])):
            began = synchronized_time(setup.device)
            run().float().square().mean().backward()
            found.append(synchronized_time(setup.device) - began)
            module.zero_grad()
    with torch.no_grad():
        one, other = run_ours().float(), run_theirs().float()
    difference = float((one - other).norm() / other.norm())
    return statistics.median(times[0][2:]), statistics.median(times[1][2:]), difference


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    network_arguments(parser)
    parser.add_argument("--batch", type=int, default=1)
    arguments = parser.parse_args()
    setup = replace(setup_of(arguments, group.start()), batch=arguments.batch)
    rounds = arguments.rounds or (5 if arguments.quick else 9)
    print(f"{setup.network}, {setup.pixels} pixels, {setup.batch} images, {rounds} passes of each in turn; ms")
    print(f"{'':10s} {'ours':>8s} {'diffusers':>9s} {'ratio':>6s}  difference of outputs")
    ratios = []
    for dtype in ("bfloat16",) if setup.device.type != "cpu" else ("float32", "bfloat16"):
        one, other, difference = measure(replace(setup, dtype=dtype), rounds)
        assert difference < TOLERANCES[dtype], f"the outputs differ by {difference}"
        ratios.append(one / other)
        print(f"{dtype:10s} {1e3 * one:8.1f} {1e3 * other:9.1f} {one / other:6.3f}  {difference:.1e}", flush=True)
    print(worst_ratio_line(ratios, LIMIT))
    group.finish(0)


if __name__ == "__main__":
    main()
