"""Measures what the engine adds to a plain training loop:  OMP_NUM_THREADS=1 python -m tests.benchmarks.overhead [--quick]

One process trains the same network with `Pipeline.train_step` and with a loop of forward, backward, clipping and optimizer
step that uses nothing of utils/pipeline. Their steps alternate, so that both see the same machine. A ratio is the median of
the times of one divided by that of the other. The plain loop in bfloat16 keeps float32 weights, as the engine does, and sums
the gradients of micro-batches in bfloat16, which the engine does in float32.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from models.streams import Sample, passed_on
from tests.tiny_model import (
    CONTEXT_DIM,
    LATENT_CHANNELS,
    POOLED_DIM,
    make_tiny_dataset,
    make_tiny_model,
    native_shapes,
    random_weights,
    write_experiment,
)
from utils.distributed import group
from utils.distributed.world import World
from utils.objective.objective import Objective
from utils.pipeline.stage import MicroBatch
from utils.run.build import build_pipeline
from utils.run.experiment import Experiment
from utils.run.prepare import prepare

CASES: dict[str, dict[str, Any]] = {
    "full fp32": {},
    "full bf16": {"model.dtype": "bfloat16"},
    "LoRA bf16": {"model.dtype": "bfloat16", "adapter": {"type": "lora", "rank": 16}},
}
MICRO_BATCHES = (1, 4, 8)
LATENT_SIDE = 24
"""Latent pixels per side: 144 image tokens."""
LIMIT = 1.02
"""The goal for every ratio."""


def write_network(folder: Path, *, width: int, depth: int) -> Path:
    """The tiny model with a network of this size."""
    model = make_tiny_model(folder / "model")
    shapes = native_shapes(
        depth=depth,
        width=width,
        context_dim=CONTEXT_DIM,
        pooled_dim=POOLED_DIM,
        pos_embed_max_size=16,
        qk_norm=True,
        dual_attention_layers=(0,),
    )
    save_file(random_weights(shapes), model / "mmdit.safetensors")
    return model


def open_experiment(folder: Path, model: Path, dataset: Path, changes: dict[str, Any]) -> Experiment:
    """The checked experiment of one process."""
    return prepare(write_experiment(folder, model, dataset, **changes), [], None, World(0, 0, 1, 1))


def random_sample(experiment: Experiment, index: int, side: int = LATENT_SIDE) -> Sample:
    """A micro-batch of one image; `side` in latent pixels."""
    family, dtype = experiment.family, experiment.config.experiment.model.torch_dtype
    generator = torch.Generator().manual_seed(index)
    shape = family.sample_shape(1, side, side)
    tensors = {
        "noisy_latents": torch.randn(1, LATENT_CHANNELS, side, side, generator=generator).to(dtype),
        "timestep": 1000 * torch.rand(1, generator=generator),
        "context": torch.randn(1, shape.num_text_tokens, CONTEXT_DIM, generator=generator).to(dtype),
        "pooled": torch.randn(1, POOLED_DIM, generator=generator).to(dtype),
    }
    return Sample(tensors, shape)


class PlainLoop:
    """The network's layers, float32 weights and torch's AdamW."""

    def __init__(self, experiment: Experiment) -> None:
        self._family, self._clip = experiment.family, experiment.config.experiment.optimizer.gradient_clipping
        dtype = experiment.config.experiment.model.torch_dtype
        self._layers = []
        for layer in experiment.family.layers:
            module = layer.build()
            experiment.trainable.prepare(layer, module)
            for parameter in module.parameters():
                parameter.data = parameter.data.to(dtype)
            self._layers.append((module, layer.outputs))
        modules = nn.ModuleList(module for module, _ in self._layers)
        self._weights = [parameter for parameter in modules.parameters() if parameter.requires_grad]
        is_low = dtype != torch.float32
        self._masters = [nn.Parameter(weight.detach().float()) for weight in self._weights] if is_low else self._weights
        self._optimizer = torch.optim.AdamW(self._masters, lr=1e-4)

    def step(self, samples: Sequence[Sample], target: Tensor) -> float:
        total = 0.0
        for sample in samples:
            value: Any = dict(sample.tensors)
            for module, outputs in self._layers:
                value = module(value)
                if outputs:
                    value = passed_on(value, outputs)
            loss = (self._family.velocity(value, sample.shape).float() - target).square().mean()
            (loss / len(samples)).backward()
            total += float(loss.detach())
        if self._masters is not self._weights:
            for master, weight in zip(self._masters, self._weights, strict=True):
                master.grad, weight.grad = weight.grad.float() if weight.grad is not None else None, None
        torch.nn.utils.clip_grad_norm_(self._masters, self._clip)
        self._optimizer.step()
        self._optimizer.zero_grad()
        if self._masters is not self._weights:
            with torch.no_grad():
                torch._foreach_copy_(self._weights, self._masters)
        return total / len(samples)


def measure(experiment: Experiment, rounds: int) -> tuple[float, float]:
    """Median seconds of a step of the engine and of the plain loop, after two steps of each."""
    count = experiment.config.experiment.pipeline.gradient_accumulation_steps
    objective = Objective(experiment.config.experiment.objective, experiment.family.shift_at)
    pipeline, plain = build_pipeline(experiment, objective), PlainLoop(experiment)
    target = torch.randn(1, LATENT_CHANNELS, LATENT_SIDE, LATENT_SIDE, generator=torch.Generator().manual_seed(99))
    pipeline._engine.instructions.loss = lambda output, _target, shape: (
        (experiment.family.velocity(output, shape).float() - target).square().mean()
    )
    samples = [random_sample(experiment, index) for index in range(count)]
    shapes = [sample.shape for sample in samples]
    times: tuple[list[float], list[float]] = ([], [])
    losses = []
    for _ in range(rounds + 2):
        began = time.perf_counter()
        result = pipeline.train_step((MicroBatch(sample, ()) for sample in samples), shapes, {"default": 1e-4}, None)
        middle = time.perf_counter()
        losses.append((result.loss, plain.step(samples, target)))
        times[0].append(middle - began)
        times[1].append(time.perf_counter() - middle)
    assert all(abs(one / other - 1) < 0.05 for one, other in losses), f"they do not train alike: {losses}"
    pipeline.close()
    return statistics.median(times[0][2:]), statistics.median(times[1][2:])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a smaller network and fewer steps")
    is_quick = parser.parse_args().quick
    width, depth, rounds = (256, 2, 5) if is_quick else (512, 4, 9)
    group.start()
    worst = 0.0
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model, dataset = write_network(folder, width=width, depth=depth), make_tiny_dataset(folder / "images")
        print(f"width {width}, depth {depth}, {rounds} steps of each in turn; ms")
        print(f"{'':10s} {'M':>2s} {'engine':>8s} {'plain':>8s} {'ratio':>6s}")
        for case, changes in CASES.items():
            for count in MICRO_BATCHES:
                settings = {**changes, "pipeline.gradient_accumulation_steps": count, "pipeline.micro_batch_size_per_gpu": 1}
                experiment = open_experiment(folder / f"{case} {count}", model, dataset, settings)
                engine, plain = measure(experiment, rounds)
                worst = max(worst, engine / plain)
                print(f"{case:10s} {count:2d} {1e3 * engine:8.1f} {1e3 * plain:8.1f} {engine / plain:6.3f}", flush=True)
    print(f"worst ratio {worst:.3f}" + (f" (goal: at most {LIMIT})" if worst > LIMIT else ""))
    group.finish(0)


if __name__ == "__main__":
    main()
