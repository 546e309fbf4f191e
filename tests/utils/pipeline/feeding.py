"""A feed of made-up data, and its micro-batches as tensors. For the tests of this folder."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from models.family import LatentSpec
from models.streams import Sample, SampleShape
from tests.utils.data.tables import ImageSpec, table_of
from utils.config.schema.objective import ObjectiveConfig
from utils.data.batches import BatchOrder, SampleDraw
from utils.data.examples import Example
from utils.objective.loss import LossTarget
from utils.objective.objective import Objective
from utils.pipeline.feed import (
    Feed,
    Layout,
    noise_level,
)
from utils.pipeline.stage import MicroBatch

SEED = 11
SHAPE = (16, 4, 4)
ALONE = Layout(micro_batch_size=2, num_micro_batches=4, num_replicas=1, replica=0, is_first_stage=True, is_last_stage=True)
IMAGES = [ImageSpec(f"{index}.png", (f"caption {index}",), size=(32, 32)) for index in range(11)]
EXAMPLES = table_of(IMAGES)


def number_of(example: Example) -> int:
    return int(example.image.path.stem)


class Data:
    """Latents and text computed from the example's number."""

    def latents(self, example: Example, *, flipped: bool = False) -> Tensor:
        return torch.full(SHAPE, float(number_of(example)) * (-1 if flipped else 1))

    def std(self, example: Example, *, flipped: bool = False) -> Tensor | None:
        return None

    def mask(self, example: Example, *, flipped: bool = False) -> Tensor | None:
        if example.mask is None:
            return None
        mask = torch.linspace(0, 1, SHAPE[-1]).expand(1, *SHAPE[1:])
        return mask.flip(-1) if flipped else mask

    def text(self, caption: str) -> dict[str, Tensor]:
        number = torch.tensor([float(caption.removeprefix("caption ") or -1)])
        return {"clip_l.sequence": number, "clip_l.pooled": number, "t5xxl.sequence": number}


class Posterior(Data):
    """Data with a std too, which grows from left to right, or falls in the flipped image."""

    def std(self, example: Example, *, flipped: bool = False) -> Tensor | None:
        std = torch.linspace(0, 1, SHAPE[-1]).expand(SHAPE)
        return std.flip(-1) if flipped else std


MEANS: Any = Data()
POSTERIOR: Any = Posterior()


class Family:
    """Its samples hold what `sample` is given."""

    latent = LatentSpec(channels=SHAPE[0], downscale=8, patch=2, max_side_pixels=512)

    def sample_shape(self, batch: int, height: int, width: int) -> SampleShape:
        return SampleShape(batch, height, width, num_text_tokens=3)

    def sample(self, noisy_latents: Tensor, sigma: Tensor, text: Mapping[str, Tensor]) -> Sample:
        batch, _, height, width = noisy_latents.shape
        return Sample({"noisy": noisy_latents, "sigma": sigma, **text}, self.sample_shape(batch, height, width))


FAMILY: Any = Family()


def make_feed(layout: Layout = ALONE, *, seed: int = SEED, dtype: torch.dtype = torch.float32, **objective: Any) -> Feed:
    examples = objective.pop("examples", EXAMPLES)
    data = objective.pop("data", Data())
    order = BatchOrder(examples, layout.global_batch, seed, objective.pop("bucket_group", None))
    return Feed(FAMILY, data, order, make_objective(**objective), seed=seed, layout=layout, dtype=dtype)


def make_objective(**settings: Any) -> Objective:
    return Objective(ObjectiveConfig(**settings), lambda shift, _base_pixels, _num_pixels: shift)


def sigma_of(draw: SampleDraw, objective: Objective) -> float:
    return noise_level(draw, objective, SEED).sigma


def batches(layout: Layout = ALONE, step: int = 1, **changes: Any) -> list[MicroBatch]:
    return list(make_feed(layout, **changes).micro_batches(step))


def draws(step: int = 1) -> list[SampleDraw]:
    return BatchOrder(EXAMPLES, 8, SEED).global_batch(step)


def joined(parts: list[MicroBatch]) -> list[Tensor]:
    """The inputs and the target output of several micro-batches, concatenated: noisy, sigma, text tensors, output."""
    return [*joined_inputs(parts), joined_target(parts).output]


def inputs_of(micro_batch: MicroBatch) -> list[Tensor]:
    assert micro_batch.sample is not None
    return list(micro_batch.sample.tensors.values())


def joined_inputs(parts: list[MicroBatch]) -> list[Tensor]:
    return [torch.cat(tensors) for tensors in zip(*map(inputs_of, parts), strict=True)]


def joined_target(parts: list[MicroBatch]) -> LossTarget:
    """The targets of several micro-batches, concatenated, each with a mask of the latents' size."""
    targets = [LossTarget(*part.target) for part in parts]
    whole = [target._replace(mask=target.mask.expand(-1, -1, *SHAPE[1:])) for target in targets]
    return LossTarget(*(torch.cat(tensors) for tensors in zip(*whole, strict=True)))


def assert_same(ours: list[MicroBatch], wanted: list[MicroBatch]) -> None:
    for one, other in zip(ours, wanted, strict=True):
        assert (one.sample is None) == (other.sample is None)
        if one.sample is not None:
            assert all(torch.equal(*pair) for pair in zip(inputs_of(one), inputs_of(other), strict=True))
        assert all(torch.equal(*pair) for pair in zip(one.target, other.target, strict=True))
