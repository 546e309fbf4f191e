"""Preview images: the trained network generates images from prompts, through the same pipeline stages it is trained in.

Each step of the sampler is one forward pass through the pipeline, and a second one with skipped blocks where skip-layer
guidance is on. The last stage applies guidance to the velocities and broadcasts the result to all ranks, which all make the
same step of the latents. No rank holds the whole network, and no text encoder is loaded: prompts are encoded together with
the captions. Shift and token length are those of the training. No random generator of the training is used.

Batches, of prompts of one size and number of steps, do not depend on the layout, so any number of stages and replicas
generates the same images. Replicas divide the batches among them. A forward pass through DeepSpeed's pipeline needs all
processes, so all replicas make the same passes, and a replica without a batch of its own repeats one.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from models.family import ModelFamily
from utils import randomness
from utils.config.schema.sampling import SamplingConfig
from utils.console import bar_interval_seconds
from utils.data.encoding.encoded import EncodedData
from utils.distributed.group import free_memory, gather
from utils.distributed.world import world
from utils.objective import rectified_flow
from utils.objective.objective import Objective
from utils.pipeline.engine import Pipeline
from utils.pipeline.feed import stack_text
from utils.previews import samplers
from utils.previews.image_files import image_entry, write_images
from utils.previews.prompt_list import Prompt

Batch = list[int]
"""Indices of prompts."""
TextBatch = dict[str, Tensor]


# --- batches -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Group:
    """The shape and the number of forward passes of prompts that can share a batch."""

    width: int
    """Pixels."""
    height: int
    """Pixels."""
    steps: int
    guided: bool
    """Whether negative prompts are used: cfg above 1."""


def make_batches(prompts: Sequence[Prompt], batch_size: int) -> dict[Group, list[Batch]]:
    """Returns the batches of each group, in order and of one size: the last prompt is repeated to fill the last batch."""
    members: dict[Group, Batch] = {}
    for index, prompt in enumerate(prompts):
        group = Group(prompt.width, prompt.height, prompt.steps, prompt.cfg > 1)
        members.setdefault(group, []).append(index)
    batches = {}
    for group, indices in members.items():
        size = min(batch_size, len(indices))
        filled = indices + indices[-1:] * (-len(indices) % size)
        batches[group] = [filled[start : start + size] for start in range(0, len(filled), size)]
    return batches


# --- sampling ----------------------------------------------------------------------------------------------------------


class Previews:
    """Generates the images of all prompts into `folder/step_…`. All ranks together; rank 0 decodes the latents."""

    def __init__(
        self,
        family: ModelFamily,
        data: EncodedData,
        pipeline: Pipeline,
        objective: Objective,
        config: SamplingConfig,
        prompts: Sequence[Prompt],
        *,
        dtype: torch.dtype,
        num_replicas: int,
        folder: Path,
    ) -> None:
        self._family, self._data, self._pipeline, self._objective = family, data, pipeline, objective
        self._config, self._prompts, self._dtype = config, list(prompts), dtype
        self._num_replicas, self._folder = num_replicas, folder

    def generate(self, step: int) -> None:
        """Generates the image of every prompt with the weights after `step` steps, and writes them."""
        averaged = self._config.weights == "ema" and step > 0  # there is no average before the first step
        with self._pipeline.evaluated_weights(ema=averaged):
            latents = self._sample_all()
        if world().is_main:
            entries = [
                image_entry(prompt, self._config, self._shift_at(prompt.width * prompt.height)) for prompt in self._prompts
            ]
            write_images(self._folder, step, self._decode(latents), entries)

    def _shift_at(self, num_pixels: int) -> float:
        return self._objective.shift_at(num_pixels) if self._config.shift is None else self._config.shift

    def _sample_all(self) -> list[Tensor]:
        """Returns the latents (C, H, W) of each prompt, float32 on the CPU, on rank 0; [] on other ranks."""
        is_main = world().is_main
        sampled: dict[int, Tensor] = {}
        at_once = self._pipeline.num_stages * self._num_replicas  # more micro-batches than stages keep them busy
        with tqdm(
            total=len(self._prompts), desc="sampling", leave=False, disable=not is_main, mininterval=bar_interval_seconds()
        ) as bar:
            for group, batches in make_batches(self._prompts, self._config.batch_size).items():
                for start in range(0, len(batches), at_once):
                    for part in gather(self._sample_round(group, batches[start : start + at_once])):
                        sampled.update(part)
                    bar.update(len(sampled) - bar.n)
        return [sampled[index] for index in range(len(self._prompts))] if is_main else []

    def _sample_round(self, group: Group, batches: Sequence[Batch]) -> dict[int, Tensor]:
        """Samples these batches, divided among the replicas.

        Returns index of the prompt -> latents for this replica's batches, on its first stage; {} on other stages.
        """
        mine = list(batches[self._pipeline.replica :: self._num_replicas])
        num_passed = -(-len(batches) // self._num_replicas)
        # A replica with fewer batches than others repeats one; the result is discarded.
        latents = self._sample(group, mine + [batches[0]] * (num_passed - len(mine)))
        if self._pipeline.stage > 0:
            return {}
        return dict(zip(itertools.chain(*mine), latents.cpu(), strict=False))

    def _sample(self, group: Group, batches: Sequence[Batch]) -> Tensor:
        """Returns the latents (N, C, H, W) float32 of the prompts of all batches, in order."""
        prompts = [self._prompts[index] for batch in batches for index in batch]
        latent, device = self._family.latent, self._pipeline.device
        shape = (latent.channels, group.height // latent.downscale, group.width // latent.downscale)
        latents = torch.stack([randomness.normal(prompt.seed, "preview", shape=shape) for prompt in prompts]).to(device)
        cfg = torch.tensor([prompt.cfg for prompt in prompts], device=device)[:, None, None, None]
        texts = self._texts(group, batches)
        sigmas = samplers.sampling_sigmas(group.steps, self._shift_at(group.width * group.height)).tolist()
        sampler, skip = samplers.make_sampler(self._config.sampler), self._config.skip_layer_guidance
        for step, (sigma, next_sigma) in enumerate(itertools.pairwise(sigmas)):
            chunks = latents.split(len(batches[0]))
            velocities = self._velocities(chunks * (2 if group.guided else 1), sigma, texts)
            skipped = None
            if skip is not None and samplers.skips_layers(step, group.steps, skip.start, skip.end):
                skipped = self._velocities(chunks, sigma, texts[: len(chunks)], frozenset(skip.layers))
            guided = None if velocities is None else self._guide(velocities, skipped, cfg)
            velocity = self._pipeline.from_last_stage(guided, latents.shape)
            latents = sampler.step(latents, velocity, sigma, next_sigma)
        return latents

    def _texts(self, group: Group, batches: Sequence[Batch]) -> list[TextBatch]:
        """Returns the text tensors of each batch, then, with guidance, of its negative prompts; {} off the first stage."""
        captions = [[self._prompts[index].text for index in batch] for batch in batches]
        if group.guided:
            captions += [[self._prompts[index].negative for index in batch] for batch in batches]
        if self._pipeline.stage > 0:
            return [{} for _ in captions]
        return [stack_text([self._data.text(caption) for caption in batch]) for batch in captions]

    def _velocities(
        self,
        latents: Sequence[Tensor],
        sigma: float,
        texts: Sequence[TextBatch],
        skipped_blocks: frozenset[int] = frozenset(),
    ) -> Tensor | None:
        """Predicts the velocities of batches of latents and texts at sigma: (N, C, H, W) float32, on the last stage."""
        shapes = [self._family.sample_shape(len(noisy), *noisy.shape[-2:]) for noisy in latents]
        samples = []
        if self._pipeline.stage == 0:
            samples = [
                self._family.sample(noisy.to("cpu", self._dtype), torch.full((len(noisy),), sigma), text)
                for noisy, text in zip(latents, texts, strict=True)
            ]
        outputs = self._pipeline.predict(shapes, samples, skipped_blocks)
        if outputs is None:
            return None
        predictions = [
            (self._family.velocity(output.float(), shape), noisy)
            for noisy, output, shape in zip(latents, outputs, shapes, strict=True)
        ]
        return torch.cat(
            [rectified_flow.velocity_of(output, noisy, self._objective.prediction_type) for output, noisy in predictions]
        )

    def _guide(self, velocities: Tensor, skipped: Tensor | None, cfg: Tensor) -> Tensor:
        """Returns one guided velocity for each image."""
        conditional, *unconditional = velocities.split(len(cfg))
        velocity = samplers.guide(conditional, unconditional[0], cfg) if unconditional else conditional
        if skipped is not None and self._config.skip_layer_guidance is not None:
            velocity = samplers.guide_from_skipped(velocity, conditional, skipped, self._config.skip_layer_guidance.scale)
        return velocity

    def _decode(self, latents: Sequence[Tensor]) -> list[Image.Image]:
        decode = self._family.load_decoder(self._pipeline.device, self._config.decode_tile_pixels)
        images = [Image.fromarray(decode(sample[None])[0].permute(1, 2, 0).numpy()) for sample in latents]
        del decode
        free_memory()
        return images
