"""What the two ends of the pipeline are fed: the first stage noisy latents and text, the last the velocity to aim for.

Both ends draw the same t and noise for a visit, because both ask randomness.py with the same key; so nothing but
activations travels between stages. Position p of a global batch is micro-batch m, replica r, row i with
p = (m * replicas + r) * rows + i, whatever the number of stages.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from models.base import ModelAdapter
from utils import randomness, rectified_flow
from utils.config.schema import ObjectiveConfig
from utils.data.batches import BatchOrder, Visit
from utils.data.precompute import EncodedData

MicroBatch = tuple[tuple[Tensor, ...], Tensor]
EMPTY_CAPTION = ""


@dataclass(frozen=True)
class Layout:
    """How a global batch is shared out, and which part is this rank's."""

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


def flow_time(visit: Visit, objective: ObjectiveConfig, seed: int) -> Tensor:
    """sigma of a visit, a float32 scalar in (0, 1)."""
    u = randomness.uniform(seed, "time", visit.example.key, visit.epoch, visit.occurrence)
    t = rectified_flow.time_of_draw(
        torch.tensor(u, dtype=torch.float64), objective.timestep_sampling, objective.logit_mean, objective.logit_std
    )
    return rectified_flow.shift_time(t, objective.discrete_flow_shift).float()


def caption_of(visit: Visit, objective: ObjectiveConfig, seed: int) -> str:
    """The visit's caption, or the empty one when it is dropped."""
    u = randomness.uniform(seed, "caption dropout", visit.example.key, visit.epoch, visit.occurrence)
    return EMPTY_CAPTION if u < objective.caption_dropout_rate else visit.example.caption


def noise_of(visit: Visit, shape: tuple[int, ...], seed: int) -> Tensor:
    """The visit's noise, float32."""
    return randomness.normal(seed, "noise", visit.example.key, visit.epoch, visit.occurrence, shape=shape)


class Feed:
    """Micro-batches of any step for this rank's place in the layout."""

    def __init__(
        self,
        adapter: ModelAdapter,
        data: EncodedData,
        order: BatchOrder,
        objective: ObjectiveConfig,
        *,
        seed: int,
        layout: Layout,
        dtype: torch.dtype,
    ) -> None:
        self._adapter, self._data, self._order, self._objective = adapter, data, order, objective
        self._seed, self._layout, self._dtype = seed, layout, dtype

    def micro_batches(self, step: int) -> Iterator[MicroBatch]:
        """(inputs of the first layer, velocity target (B, C, H, W) float32) of each micro-batch of a step.

        A stage that is not the first gets no inputs, one that is not the last an empty target: neither looks at them.
        """
        visits = self._order.global_batch(step)
        for index in range(self._layout.num_micro_batches):
            yield self._micro_batch([visits[position] for position in self._layout.positions(index)])

    def _micro_batch(self, visits: Sequence[Visit]) -> MicroBatch:
        layout = self._layout
        if not (layout.is_first_stage or layout.is_last_stage):
            return (), torch.empty(0)
        latents = torch.stack([self._data.latents(visit.example) for visit in visits])
        noise = torch.stack([noise_of(visit, tuple(latents.shape[1:]), self._seed) for visit in visits])
        inputs: tuple[Tensor, ...] = ()
        target = torch.empty(0)
        if layout.is_first_stage:
            sigma = torch.stack([flow_time(visit, self._objective, self._seed) for visit in visits])
            noisy = rectified_flow.add_noise(latents, noise, sigma).to(self._dtype)
            text = stack_text([self._data.text(caption_of(visit, self._objective, self._seed)) for visit in visits])
            inputs = self._adapter.network_inputs(noisy, sigma, text)
        if layout.is_last_stage:
            target = rectified_flow.velocity_target(latents, noise)
        return inputs, target


def stack_text(texts: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Text tensors of several captions to batches."""
    return {name: torch.stack([text[name] for text in texts]) for name in texts[0]}
