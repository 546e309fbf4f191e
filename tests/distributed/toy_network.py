"""A made-up network of two branches: what the pipeline must be able to train although no family of this program is like it.

It takes token ids instead of embeddings, and a control image that a second branch of layers processes in the same stages.
The branch is one more stream. Another stream carries no gradient, although trainable weights are in it. Layers: embedders,
three blocks, output. One layer's parameters alone make up a parameter group, so a stage may lack a group.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from models.family import BlockLayer, LayerCost, PipelineLayer
from models.streams import Sample, SampleShape, Streams, StreamSpec, passed_on
from utils import randomness
from utils.optim.schedules import LearningRateSchedule
from utils.trainable.base import ParameterGroup

WIDTH, CHANNELS, NUM_TOKEN_IDS = 6, 2, 11
INPUT_NAMES = ("latents", "control_latents", "token_ids", "timestep")
SIZES = ((2, 3, 4), (1, 5, 2), (3, 2, 3))
"""(height, width, number of text tokens) of the micro-batches, in turn."""
STREAMS = (
    StreamSpec("text", lambda shape: shape.num_text_tokens),
    StreamSpec("image", lambda shape: shape.height * shape.width),
    StreamSpec("control", lambda shape: shape.height * shape.width),
    StreamSpec("row", lambda shape: 1),
    StreamSpec("gates", lambda shape: 2, carries_gradient=False),
)


def no_cost(_shape: SampleShape) -> LayerCost:
    """The cost of layers whose bounds are given."""
    return LayerCost({})


class Embedders(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.text = nn.Embedding(NUM_TOKEN_IDS, WIDTH)
        self.image, self.control = nn.Linear(CHANNELS, WIDTH), nn.Linear(CHANNELS, WIDTH)
        self.time = nn.Linear(1, WIDTH)

    def forward(self, inputs: Streams) -> Streams:
        row = self.time(inputs["timestep"][:, None].to(self.time.weight.dtype))[:, None]
        return {
            "text": self.text(inputs["token_ids"]),
            "image": self.image(inputs["latents"].flatten(2).transpose(1, 2)),
            "control": self.control(inputs["control_latents"].flatten(2).transpose(1, 2)),
            "row": row,
            "gates": torch.cat([row, row.square()], dim=1),
        }


class Block(BlockLayer):
    """`branch` is the second network's part; the image is added what it outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.mix, self.text, self.row = nn.Linear(3 * WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.branch = nn.Sequential(nn.Linear(2 * WIDTH, WIDTH), nn.SiLU(), nn.Linear(WIDTH, WIDTH))
        self.strength = nn.Parameter(torch.ones(1))

    def recompute_norms(self, active: bool) -> None:
        assert not active, "it has no norms"

    def forward(self, streams: Streams) -> Streams:
        if self.skipped:
            return streams
        text, image, control = streams["text"], streams["image"], streams["control"]
        row = streams["row"][:, 0]
        modulation = self.row(row)[:, None]
        control = control + self.branch(torch.cat([control, modulation.expand_as(control)], dim=-1))
        summary = text.mean(dim=1, keepdim=True).expand_as(image)
        mixed = self.mix(torch.cat([image, summary, modulation.expand_as(image)], dim=-1))
        image = image + mixed.tanh() * streams["gates"].mean(dim=1, keepdim=True) + self.strength * control
        return {**streams, "text": text + self.text(text), "image": image, "control": control, "row": row[:, None]}


class Output(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, CHANNELS)

    def forward(self, streams: Streams) -> Tensor:
        return self.linear(streams["image"] + streams["row"])


def make_layers(dtype: torch.dtype) -> list[PipelineLayer]:
    """The layers, with weights that depend on their names only."""

    def layer(name: str, kind: type[nn.Module], block: int | None = None) -> PipelineLayer:
        def build() -> nn.Module:
            module = kind()
            for own, parameter in module.named_parameters():
                values = randomness.normal(0, "toy weights", name, own, shape=tuple(parameter.shape))
                parameter.data = (0.5 * values).to(dtype)
            return module

        outputs = () if kind is Output else STREAMS
        return PipelineLayer(name, f"{name}.", no_cost, {}, build, outputs=outputs, block=block)

    blocks = [layer(f"blocks_{index}", Block, index) for index in range(3)]
    return [layer("embedders", Embedders), *blocks, layer("output", Output)]


# --- samples -----------------------------------------------------------------------------------------------------------


def shape_of(step: int, index: int, batch: int) -> SampleShape:
    """The shape of a micro-batch; it differs within a step and from step to step."""
    height, width, num_text_tokens = SIZES[(step + index) % len(SIZES)]
    return SampleShape(batch, height, width, num_text_tokens)


def sample_of(step: int, index: int, batch: int, dtype: torch.dtype) -> Sample:
    """Sample `index` of a step."""
    shape = shape_of(step, index, batch)

    def draw(name: str, *size: int) -> Tensor:
        return randomness.normal(1, name, step, index, shape=(batch, *size))

    size = (CHANNELS, shape.height, shape.width)
    tensors = {
        "latents": draw("latents", *size).to(dtype),
        "control_latents": draw("control", *size).to(dtype),
        "token_ids": (draw("tokens", shape.num_text_tokens) * 1000).long() % NUM_TOKEN_IDS,
        "timestep": draw("time"),
    }
    return Sample(tensors, shape)


def target_of(step: int, index: int, batch: int) -> Tensor:
    """(B, C, H, W) float32."""
    shape = shape_of(step, index, batch)
    return 3 * randomness.normal(1, "target", step, index, shape=(batch, CHANNELS, shape.height, shape.width))


def loss_of(output: Tensor, target: tuple[Tensor, ...], shape: SampleShape) -> Tensor:
    image = output.float().transpose(1, 2).unflatten(2, (shape.height, shape.width))
    return (image - target[0]).square().mean()


# --- parameter groups --------------------------------------------------------------------------------------------------

CONSTANT = LearningRateSchedule(peak=0.0, course="constant", warmup_steps=0, min_ratio=1.0)
"""The tests give the learning rates of each step themselves."""
RATES = {"tokens": 0.05, "branch": 0.01, "base": 0.002}
DECAYS = {"tokens": 0.0, "branch": 0.4, "base": None}


def group_of(name: str) -> str:
    """The group of a parameter (native name); "tokens" has the first layer's embedding alone."""
    if name == "embedders.text.weight":
        return "tokens"
    return "branch" if ".branch." in name or ".strength" in name or ".control." in name else "base"


def make_groups(named: Mapping[str, nn.Parameter], decays: Mapping[str, float | None] = DECAYS) -> list[ParameterGroup]:
    """The three groups; a stage has those that it has parameters of."""
    members: dict[str, dict[str, nn.Parameter]] = {}
    for name, parameter in named.items():
        members.setdefault(group_of(name), {})[name] = parameter
    return [ParameterGroup(group, parameters, CONSTANT, decays[group]) for group, parameters in members.items()]


def one_group(named: Mapping[str, nn.Parameter]) -> list[ParameterGroup]:
    return [ParameterGroup("all", named, CONSTANT, None)]


# --- reference ---------------------------------------------------------------------------------------------------------


class PlainNetwork(nn.Module):
    """The same network without a pipeline."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.specs = [layer.outputs for layer in make_layers(dtype)]
        self.layers = nn.ModuleDict({layer.name: layer.build() for layer in make_layers(dtype)})

    def forward(self, sample: Sample) -> Tensor:
        value: Streams | Tensor = dict(sample.tensors)
        for layer, specs in zip(self.layers.values(), self.specs, strict=True):
            value = layer(value)
            if isinstance(value, dict):
                value = passed_on(value, specs)
        assert isinstance(value, Tensor)
        return value

    def named(self) -> dict[str, nn.Parameter]:
        """Native name -> parameter."""
        return {name.removeprefix("layers."): parameter for name, parameter in self.named_parameters()}
