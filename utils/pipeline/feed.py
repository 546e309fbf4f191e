"""What the two ends of the pipeline are fed: the first stage noisy latents and text, the last stage the loss target.

Both ends compute the same t and noise for a draw, because both call randomness.py with the same key; so only activations
travel between stages. Position p of a global batch is micro-batch m, replica r, row i with
p = (m * replicas + r) * rows + i, whatever the number of stages.
"""

from __future__ import annotations

import collections
import contextlib
import copy
import itertools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from models.family import ModelFamily
from models.streams import Sample, SampleShape
from utils import randomness
from utils.background import prefetch
from utils.data.batches import BatchOrder, SampleDraw
from utils.data.encoding.encoded import EncodedData
from utils.objective import rectified_flow
from utils.objective.loss import NO_TARGET, LossTarget
from utils.objective.objective import NoiseLevel, Objective
from utils.pipeline.stage import MicroBatch

EMPTY_CAPTION = ""
MICRO_BATCHES_AHEAD = 4
"""Micro-batches prepared while the network works; each has its latents and embeddings in memory."""


@dataclass(frozen=True)
class Layout:
    """How a global batch is divided into micro-batches and over replicas, and this rank's place in it."""

    micro_batch_size: int
    num_micro_batches: int
    num_replicas: int
    replica: int
    is_first_stage: bool
    is_last_stage: bool

    @property
    def global_batch(self) -> int:
        return self.micro_batch_size * self.num_micro_batches * self.num_replicas

    def positions(self, micro_batch: int) -> range:
        """Positions in the global batch of this replica's rows of a micro-batch."""
        start = (micro_batch * self.num_replicas + self.replica) * self.micro_batch_size
        return range(start, start + self.micro_batch_size)


# --- the random choices of one draw ------------------------------------------------------------------------------------


def _uniform(draw: SampleDraw, purpose: str, seed: int, *key: str) -> float:
    """The draw's random number for a purpose, in (0, 1)."""
    return randomness.uniform(seed, purpose, draw.example.key, draw.epoch, draw.occurrence, *key)


def noise_level(draw: SampleDraw, objective: Objective, seed: int) -> NoiseLevel:
    """The noise level at which the draw is trained."""
    bucket = draw.example.bucket
    return objective.noise_level(_uniform(draw, "time", seed), bucket.width * bucket.height)


def noise_of(draw: SampleDraw, shape: tuple[int, ...], seed: int) -> Tensor:
    """The draw's noise, float32."""
    return randomness.normal(seed, "noise", draw.example.key, draw.epoch, draw.occurrence, shape=shape)


def is_flipped(draw: SampleDraw, seed: int) -> bool:
    """Whether the image is flipped horizontally in this draw."""
    return draw.example.may_flip and _uniform(draw, "flip", seed) < 0.5


def caption_of(draw: SampleDraw, objective: Objective, seed: int) -> str:
    """One of the example's captions, in one of the orders of its tags; the empty caption when it is dropped."""
    dropped = _uniform(draw, "caption dropout", seed) < objective.config.caption_dropout_rate
    if dropped:
        return EMPTY_CAPTION
    count = draw.example.num_captions
    return draw.example.caption(int(_uniform(draw, "caption", seed) * count) if count > 1 else 0)


def latents_of(draw: SampleDraw, data: EncodedData, seed: int) -> Tensor:
    """The draw's latents, float32: a fresh sample of the posterior if the cache stores its std, else the mean."""
    flipped = is_flipped(draw, seed)
    mean, std = data.latents(draw.example, flipped=flipped), data.std(draw.example, flipped=flipped)
    if std is None:
        return mean
    key = (draw.example.key, draw.epoch, draw.occurrence)
    return mean + std * randomness.normal(seed, "posterior", *key, shape=tuple(mean.shape))


def drop_encoders(text: dict[str, Tensor], draw: SampleDraw, objective: Objective, seed: int) -> dict[str, Tensor]:
    """The draw's text tensors, named "encoder.tensor", with all tensors of dropped encoders set to zero."""
    encoders = {name.partition(".")[0] for name in text}
    dropped = {
        encoder
        for encoder in encoders
        if _uniform(draw, "encoder dropout", seed, encoder) < objective.encoder_dropout_rate(encoder)
    }
    return {name: torch.zeros_like(tensor) if name.partition(".")[0] in dropped else tensor for name, tensor in text.items()}


# --- micro-batches -----------------------------------------------------------------------------------------------------


class Feed:
    """The micro-batches of any step for this rank's place in the layout."""

    def __init__(
        self,
        family: ModelFamily,
        data: EncodedData,
        order: BatchOrder,
        objective: Objective,
        *,
        seed: int,
        layout: Layout,
        dtype: torch.dtype,
    ) -> None:
        self._family, self._data, self._order, self._objective = family, data, order, objective
        self._seed, self._layout, self._dtype = seed, layout, dtype
        # An order remembers one epoch. `steps` reads ahead in another thread, so `shapes` has a copy of its own.
        self._order_of_shapes = copy.copy(order)

    @contextmanager
    def steps(self, steps: Sequence[int]) -> Iterator[Iterator[Iterator[MicroBatch]]]:
        """The `micro_batches` of each step in turn, prepared by another thread while the network works on earlier ones.

        The micro-batches of a step must be used before those of the next are taken; unused ones are dropped.
        """
        everything = prefetch((batch for step in steps for batch in self.micro_batches(step)), MICRO_BATCHES_AHEAD)

        def in_turn() -> Iterator[Iterator[MicroBatch]]:
            for _ in steps:
                of_step = itertools.islice(everything, self._layout.num_micro_batches)
                yield of_step
                collections.deque(of_step, maxlen=0)  # stages in the middle take none

        with contextlib.closing(everything):
            yield in_turn()

    def shapes(self, step: int) -> list[SampleShape]:
        """The shape of each micro-batch of a step; every stage knows them without reading any data."""
        return [self._shape(draws) for draws in self._draws(self._order_of_shapes, step)]

    def micro_batches(self, step: int) -> Iterator[MicroBatch]:
        """The micro-batches of a step, with a LossTarget each.

        A stage that is not the first gets no sample, one that is not the last an empty target: neither reads them.
        """
        for draws in self._draws(self._order, step):
            yield self._micro_batch(draws)

    def _draws(self, order: BatchOrder, step: int) -> Iterator[list[SampleDraw]]:
        """The draws of each micro-batch of this replica."""
        draws = order.global_batch(step)
        for index in range(self._layout.num_micro_batches):
            yield [draws[position] for position in self._layout.positions(index)]

    def _shape(self, draws: Sequence[SampleDraw]) -> SampleShape:
        bucket, downscale = draws[0].example.bucket, self._family.latent.downscale
        return self._family.sample_shape(len(draws), bucket.height // downscale, bucket.width // downscale)

    def _micro_batch(self, draws: Sequence[SampleDraw]) -> MicroBatch:
        layout, objective, seed = self._layout, self._objective, self._seed
        if not (layout.is_first_stage or layout.is_last_stage):
            return MicroBatch(None, NO_TARGET)
        latents = torch.stack([latents_of(draw, self._data, seed) for draw in draws])
        noise = torch.stack([noise_of(draw, tuple(latents.shape[1:]), seed) for draw in draws])
        levels = [noise_level(draw, objective, seed) for draw in draws]
        sigma = torch.tensor([level.sigma for level in levels])
        noisy = rectified_flow.add_noise(latents, noise, sigma)
        sample: Sample | None = None
        target: LossTarget = NO_TARGET
        if layout.is_first_stage:
            text = stack_text([self._text(draw) for draw in draws])
            sample = self._family.sample(noisy.to(self._dtype), sigma, text)
        if layout.is_last_stage:
            weight = torch.tensor(
                [level.weight * draw.example.loss_weight for level, draw in zip(levels, draws, strict=True)]
            )
            velocity = rectified_flow.velocity_target(latents, noise)
            target = objective.target(velocity, noisy, sigma, weight, self._mask(draws, latents.shape[-2:]))
        return MicroBatch(sample, target)

    def _text(self, draw: SampleDraw) -> dict[str, Tensor]:
        text = self._data.text(caption_of(draw, self._objective, self._seed))
        return drop_encoders(text, draw, self._objective, self._seed)

    def _mask(self, draws: Sequence[SampleDraw], size: torch.Size) -> Tensor | None:
        """(B, 1, H, W), ones for an image without a mask; None when no image has one."""
        masks = [self._data.mask(draw.example, flipped=is_flipped(draw, self._seed)) for draw in draws]
        if all(mask is None for mask in masks):
            return None
        return torch.stack([torch.ones(1, *size) if mask is None else mask for mask in masks])


def stack_text(texts: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
    """The text tensors of several captions, stacked over the batch."""
    return {name: torch.stack([text[name] for text in texts]) for name in texts[0]}
