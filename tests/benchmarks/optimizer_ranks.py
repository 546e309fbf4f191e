"""What each rank does for optimizers.py: trains a small network with some optimizers, and resumes half-way.

Arguments: the folder for the results, names of optimizers. One process trains with one stage; two train first as two stages,
then as two replicas. Each rank saves a file for each optimizer and layout.
"""

from __future__ import annotations

import math
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from docs.list_optimizers import ARGUMENTS
from models.family import PipelineLayer
from models.sd3.family import SD3Family
from models.sd3.settings import TextTokens
from models.sd3.variants import MMDiTConfig
from models.streams import Sample, SampleShape
from utils import randomness
from utils.config.schema.optimizer import OptimizerConfig
from utils.distributed import group
from utils.distributed.world import world
from utils.optim.registry import is_separable, make_optimizer, num_sums
from utils.pipeline.engine import EngineSettings, Pipeline
from utils.pipeline.optimizer_step import GROUP_NUMBER, MASTER
from utils.pipeline.stage import MicroBatch, StagePlan
from utils.trainable.full import FullTraining

NETWORK = MMDiTConfig(
    patch_size=2,
    in_channels=16,
    depth=2,
    hidden_size=64,
    context_dim=48,
    pooled_dim=32,
    pos_embed_max_size=8,
    qk_norm=True,
    dual_attention_layers=(0,),
)
"""321,280 parameters in 64 tensors: matrices of 64 x 32 to 576 x 64, a convolution, biases and scales of norms."""
TEXT_TOKENS = TextTokens(3, 5)
BOUNDS = {1: [0, 4], 2: [0, 2, 4]}
NUM_MICRO_BATCHES = 4
"""Over all replicas together."""
LATENT_SIZES = ((8, 8), (4, 12))
CLIP = 0.5
NUM_STEPS, STOP = 5, 3
LAYOUTS = {1: (1,), 2: (2, 1)}
"""Number of processes -> numbers of stages."""


@dataclass
class Outcome:
    """What one rank saves of one optimizer in one layout."""

    metrics: list[tuple[float, float]] = field(default_factory=list)
    """(loss, gradient norm) of each step."""
    start: dict[str, Tensor] = field(default_factory=dict)
    """Parameters of the rank's stage before the first step."""
    weights: dict[str, Tensor] = field(default_factory=dict)
    """After the last."""
    state_bytes: int = 0
    """The optimizer's, for the rank's stage."""
    is_resume_equal: bool = False
    """Whether a second pipeline, resumed after step STOP, has the same metrics and weights."""
    update_seconds: list[float] = field(default_factory=list)
    """Time in the optimizer, of each step."""
    error: str = ""


class Training:
    """A pipeline of the small network and one optimizer."""

    def __init__(self, name: str, num_stages: int) -> None:
        rate = 1.0 if name == "Prodigy" else 1e-3
        config = OptimizerConfig(type=name, learning_rate=rate, args=ARGUMENTS.get(name, {}))
        self._rate, self._num_replicas = rate, world().size // num_stages
        self._family = SD3Family(NETWORK, "float32", TEXT_TOKENS, files=None)
        layers = tuple(replace(layer, build=partial(_build, layer)) for layer in self._family.layers)
        trainable = FullTraining(self._family, config)
        self._calls: list[float] = []
        self.pipeline = Pipeline(
            StagePlan(layers, self._family.input_names, self._family.stream_width, BOUNDS[num_stages]),
            EngineSettings(
                micro_batch_size=1,
                num_micro_batches=NUM_MICRO_BATCHES // self._num_replicas,
                gradient_clipping=CLIP,
                dtype=torch.float32,
                num_optimizer_sums=num_sums(config),
                is_separable=is_separable(config),
            ),
            loss=self._loss,
            prepare=trainable.prepare,
            groups=trainable.groups,
            make_optimizer=lambda entries: _timed(make_optimizer(config, entries), self._calls),
        )
        self._parameters = {
            layer.layer.prefix + name: parameter
            for layer in self.pipeline.local_layers()
            for name, parameter in layer.trainable().items()
        }

    def step(self, step: int) -> tuple[float, float]:
        """(loss, gradient norm)."""
        indices = range(self.pipeline.replica, NUM_MICRO_BATCHES, self._num_replicas)
        samples = [self._sample(step, index) for index in indices]
        batches = [MicroBatch(sample, (_target(step, index),)) for sample, index in zip(samples, indices, strict=True)]
        shapes = [sample.shape for sample in samples]
        result = self.pipeline.train_step(batches, shapes, {"default": self._rate}, None, step=step)
        return result.loss, result.grad_norm

    def update_seconds(self) -> float:
        """Time in the optimizer since the last call."""
        seconds = sum(self._calls)
        self._calls.clear()
        return seconds

    def weights(self) -> dict[str, Tensor]:
        """What the network computes with; the network is float32, so these are the weights that are updated."""
        return {name: parameter.detach().clone() for name, parameter in self._parameters.items()}

    def states(self) -> dict[str, dict[str, Tensor]]:
        return {name: self.pipeline.read_state(parameter) for name, parameter in self._parameters.items()}

    def set_states(self, states: Mapping[str, Mapping[str, Tensor]]) -> None:
        self.pipeline.write_states({self._parameters[name]: state for name, state in states.items()})

    def _sample(self, step: int, index: int) -> Sample:
        height, width = LATENT_SIZES[(step + index) % 2]
        shape = self._family.sample_shape(1, height, width)
        draw = partial(_draw, step, index)
        tensors = {
            "noisy_latents": draw("latents", NETWORK.in_channels, height, width),
            "timestep": 1000 * draw("time").sigmoid(),
            "context": draw("context", shape.num_text_tokens, NETWORK.context_dim),
            "pooled": draw("pooled", NETWORK.pooled_dim),
        }
        return Sample(tensors, shape)

    def _loss(self, output: Tensor, target: tuple[Tensor, ...], shape: SampleShape) -> Tensor:
        return (self._family.velocity(output, shape) - target[0]).square().mean()


def _build(layer: PipelineLayer) -> nn.Module:
    """The layer with random weights, none of them zero, which depend on their names only."""
    module = layer.build().to_empty(device="cpu")
    for name, buffer in module.named_buffers():
        module.register_buffer(name, _random(layer.prefix + name, buffer.shape))
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            parameter.copy_(_random(layer.prefix + name, parameter.shape))
    return module


def _random(name: str, shape: torch.Size) -> Tensor:
    drawn = randomness.normal(0, name, shape=tuple(shape))
    if ".ln_" in name:
        return 1 + 0.2 * drawn
    return drawn / math.sqrt(math.prod(shape[1:])) if len(shape) > 1 else 0.2 * drawn


def _draw(step: int, index: int, name: str, *size: int) -> Tensor:
    return randomness.normal(1, name, step, index, shape=(1, *size))


def _target(step: int, index: int) -> Tensor:
    return _draw(step, index, "target", NETWORK.in_channels, *LATENT_SIZES[(step + index) % 2])


def _timed(optimizer: Any, calls: list[float]) -> Any:
    """The optimizer, which adds the time of each update to `calls`."""

    def timed(update: Callable[..., Any], *arguments: Any) -> Any:
        began = time.perf_counter()
        result = update(*arguments)
        calls.append(time.perf_counter() - began)
        return result

    for name in ("sums", "finish") if hasattr(optimizer, "sums") else ("step",):
        setattr(optimizer, name, partial(timed, getattr(optimizer, name)))
    return optimizer


def train(name: str, num_stages: int) -> Outcome:
    """Trains without interruption and resumed."""
    straight, resumed, outcome = Training(name, num_stages), Training(name, num_stages), Outcome()
    outcome.start = straight.weights()
    is_equal = True
    for step in range(NUM_STEPS):
        outcome.metrics.append(straight.step(step))
        outcome.update_seconds.append(straight.update_seconds())
        if step + 1 == STOP:
            states = straight.states()
            resumed.set_states(states)
            outcome.state_bytes = sum(map(_state_bytes, states.values()))
        elif step + 1 > STOP:
            is_equal = is_equal and resumed.step(step) == outcome.metrics[-1]
    outcome.weights = straight.weights()
    is_equal = is_equal and all(torch.equal(weight, outcome.weights[key]) for key, weight in resumed.weights().items())
    outcome.is_resume_equal = is_equal
    straight.pipeline.close()
    resumed.pipeline.close()
    return outcome


def _state_bytes(state: Mapping[str, Tensor]) -> int:
    """Bytes of what the optimizer keeps of one parameter."""
    return sum(value.nbytes for key, value in state.items() if key != MASTER and not key.startswith(GROUP_NUMBER))


def outcome_file(folder: Path, name: str, num_stages: int, rank: int) -> Path:
    return folder / f"{name}-{num_stages}-{rank}.pt"


def run(folder: Path, names: Sequence[str]) -> None:
    """Saves an Outcome for each name and layout, or raises after one with the error."""
    for name in names:
        for num_stages in LAYOUTS[world().size]:
            outcome = Outcome()
            try:
                outcome = train(name, num_stages)
            except Exception:
                outcome.error = traceback.format_exc()
            torch.save(outcome, outcome_file(folder, name, num_stages, world().rank))
            if outcome.error:  # the other rank may wait for this one for ever
                print(f"{name}:\n{outcome.error}", file=sys.stderr)
                group.finish(1)


def main() -> None:
    warnings.simplefilter("ignore")
    group.start()
    run(Path(sys.argv[1]), sys.argv[2:])
    group.finish(0)


if __name__ == "__main__":
    main()
