"""Networks for the benchmarks: a small one for CPUs, and the released ones in their true size, with random weights.

They need no files. The same training can be run by the engine (`make_pipeline`) and by a plain loop (`PlainLoop`).
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from models.family import PipelineLayer
from models.sd3.family import SD3Family
from models.sd3.settings import DTYPES, TextTokens
from models.sd3.variants import VARIANTS, MMDiTConfig
from models.streams import Sample, SampleShape, passed_on
from utils.config.schema.adapter import AdapterConfig
from utils.config.schema.optimizer import MasterKind, OptimizerConfig
from utils.optim.registry import is_separable, make_optimizer, num_sums
from utils.pipeline.engine import EngineSettings, Pipeline, StepResult
from utils.pipeline.partition import block_bounds, uniform_counts
from utils.pipeline.recompute import Recompute
from utils.pipeline.stage import MicroBatch, StagePlan
from utils.trainable.base import Trainable
from utils.trainable.full import FullTraining
from utils.trainable.lora import LoraTraining
from utils.trainable.targets import choose_modules

NETWORKS: dict[str, MMDiTConfig] = {
    "tiny": MMDiTConfig(2, 16, 2, 256, 64, 32, 64, qk_norm=True, dual_attention_layers=(0,)),
    "small": MMDiTConfig(2, 16, 4, 512, 256, 128, 64, qk_norm=True, dual_attention_layers=(0,)),
    **VARIANTS,
    "SD3.5-medium, 12 blocks": replace(VARIANTS["SD3.5-medium"], depth=12, dual_attention_layers=tuple(range(7))),
}
TEXT_TOKENS = TextTokens(77, 256)
CLIP = 1.0


@dataclass(frozen=True)
class Setup:
    """What is trained, and on what."""

    network: str
    pixels: int
    device: torch.device
    dtype: str = "bfloat16"
    rank: int | None = None
    """Rank of LoRA; None: full fine-tuning."""
    batch: int = 1
    num_micro_batches: int = 1
    optimizer: str = "AdamW"
    master: MasterKind | None = None
    step_in_backward: bool = False
    clip: float = CLIP
    recompute: Recompute = Recompute()

    @property
    def torch_dtype(self) -> torch.dtype:
        return DTYPES[self.dtype]

    @property
    def optimizer_config(self) -> OptimizerConfig:
        return OptimizerConfig(type=self.optimizer, learning_rate=1e-4)

    @property
    def family(self) -> SD3Family:
        """The family, whose layers have random weights on the device."""
        family = SD3Family(NETWORKS[self.network], self.dtype, TEXT_TOKENS, files=None)
        family.layers = tuple(replace(layer, build=partial(_random_layer, layer, self.device)) for layer in family.layers)
        return family

    def trainable(self, family: SD3Family) -> Trainable:
        if self.rank is None:
            return FullTraining(family, self.optimizer_config)
        settings = AdapterConfig(type="lora", rank=self.rank)
        targets, errors = choose_modules(settings, family)
        assert not errors
        return LoraTraining(settings, targets, None, family, self.optimizer_config, 0)

    def samples(self, family: SD3Family) -> list[Sample]:
        """The micro-batches of a step, on the device."""
        side, config = self.pixels // family.latent.downscale, family.config
        shape = family.sample_shape(self.batch, side, side)
        samples = [sample_of(config, shape, self.torch_dtype, index) for index in range(self.num_micro_batches)]
        return [Sample({name: one.to(self.device) for name, one in each.tensors.items()}, shape) for each in samples]

    def target(self, sample: Sample) -> Tensor:
        latents = sample.tensors["noisy_latents"]
        return torch.randn(latents.shape, generator=torch.Generator().manual_seed(99)).to(self.device)


def sample_of(config: MMDiTConfig, shape: SampleShape, dtype: torch.dtype, index: int) -> Sample:
    """Random inputs of a network, on the CPU; `index` chooses among them."""
    generator = torch.Generator().manual_seed(index)

    def normal(*size: int) -> Tensor:
        return torch.randn(shape.batch, *size, generator=generator).to(dtype)

    tensors = {
        "noisy_latents": normal(config.in_channels, shape.height, shape.width),
        "timestep": 1000 * torch.rand(shape.batch, generator=generator),
        "context": normal(shape.num_text_tokens, config.context_dim),
        "pooled": normal(config.pooled_dim),
    }
    return Sample(tensors, shape)


def _random_layer(layer: PipelineLayer, device: torch.device) -> nn.Module:
    module = layer.build().to_empty(device=device)
    generator = torch.Generator(device).manual_seed(len(layer.prefix) + (layer.block or 0))
    for name, parameter in module.named_parameters():
        if parameter.dim() > 1:
            nn.init.normal_(parameter, std=0.02, generator=generator)
        else:
            nn.init.constant_(parameter, float("ln_" in name))
    for name, buffer in module.named_buffers():
        module.register_buffer(name, torch.zeros(buffer.shape))
    return module


# --- the engine ----------------------------------------------------------------------------------------------------------


class Engine:
    """`Pipeline.train_step` of a setup, over all processes."""

    def __init__(self, setup: Setup, num_stages: int = 1) -> None:
        self.setup, self.family = setup, setup.family
        trainable, config = setup.trainable(self.family), setup.optimizer_config
        blocks = [layer.block is not None for layer in self.family.layers]
        bounds = block_bounds(blocks, uniform_counts(self.family.num_blocks, num_stages))
        self.pipeline = Pipeline(
            StagePlan(self.family.layers, self.family.input_names, self.family.stream_width, bounds, setup.recompute),
            EngineSettings(
                micro_batch_size=setup.batch,
                num_micro_batches=setup.num_micro_batches,
                gradient_clipping=setup.clip,
                dtype=setup.torch_dtype,
                num_optimizer_sums=num_sums(config),
                is_separable=is_separable(config),
                master=setup.master or trainable.default_master,
                step_in_backward=setup.step_in_backward,
            ),
            loss=lambda output, target, shape: _loss(self.family, output, target[0], shape),
            prepare=trainable.prepare,
            groups=trainable.groups,
            make_optimizer=partial(make_optimizer, config),
        )
        self._samples = setup.samples(self.family)
        self._target = setup.target(self._samples[0])
        self._num_steps = 0

    @property
    def sample(self) -> Sample:
        """A micro-batch."""
        return self._samples[0]

    def step(self, rate: float = 1e-4) -> StepResult:
        batches = [MicroBatch(sample, (self._target,)) for sample in self._samples]
        shapes = [sample.shape for sample in self._samples]
        self._num_steps += 1
        return self.pipeline.train_step(batches, shapes, {"default": rate}, None, step=self._num_steps - 1)


def _loss(family: SD3Family, output: Tensor, target: Tensor, shape: SampleShape) -> Tensor:
    return (family.velocity(output, shape).float() - target).square().mean()


# --- without it ----------------------------------------------------------------------------------------------------------


class PlainLoop:
    """Forward, backward, clipping and torch's AdamW, with nothing of utils/pipeline.

    In bfloat16 it keeps float32 weights, as the engine does, and sums gradients in bfloat16, which the engine does in
    float32.
    """

    def __init__(self, setup: Setup) -> None:
        self._setup, self._family = setup, setup.family
        trainable, dtype = setup.trainable(self._family), setup.torch_dtype
        self._layers = []
        for layer in self._family.layers:
            module = layer.build()
            trainable.prepare(layer, module)
            for parameter in module.parameters():
                parameter.data = parameter.data.to(setup.device, dtype)
            self._layers.append((module, layer.outputs))
        modules = nn.ModuleList(module for module, _ in self._layers)
        self._weights = [parameter for parameter in modules.parameters() if parameter.requires_grad]
        is_low = dtype != torch.float32
        self._masters = [nn.Parameter(weight.detach().float()) for weight in self._weights] if is_low else self._weights
        self._optimizer = torch.optim.AdamW(self._masters, lr=1e-4, fused=setup.device.type != "cpu" or None)
        self._samples = setup.samples(self._family)
        self._target = setup.target(self._samples[0])

    def step(self) -> float:
        total = 0.0
        losses = []
        for sample in self._samples:
            value: Any = dict(sample.tensors)
            for module, outputs in self._layers:
                value = module(value)
                if outputs:
                    value = passed_on(value, outputs)
            loss = _loss(self._family, value, self._target, sample.shape)
            (loss / len(self._samples)).backward()
            losses.append(loss.detach())
        total = float(sum(losses, torch.zeros((), device=self._setup.device)))
        if self._masters is not self._weights:
            for master, weight in zip(self._masters, self._weights, strict=True):
                master.grad, weight.grad = weight.grad.float() if weight.grad is not None else None, None
        torch.nn.utils.clip_grad_norm_(self._masters, self._setup.clip)
        self._optimizer.step()
        self._optimizer.zero_grad()
        if self._masters is not self._weights:
            with torch.no_grad():
                torch._foreach_copy_(self._weights, self._masters)
        return total / len(self._samples)


# --- options -------------------------------------------------------------------------------------------------------------


def network_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of all benchmarks of this kind."""
    parser.add_argument("--network", choices=sorted(NETWORKS), help="default: small, with --quick tiny")
    parser.add_argument("--pixels", type=int, help="side of the images; default 192")
    parser.add_argument("--quick", action="store_true", help="a smaller network and fewer steps")
    parser.add_argument("--rounds", type=int, help="measured steps")


def setup_of(arguments: argparse.Namespace, device: torch.device) -> Setup:
    """The network and image size that the options choose."""
    return Setup(arguments.network or ("tiny" if arguments.quick else "small"), arguments.pixels or 192, device)
