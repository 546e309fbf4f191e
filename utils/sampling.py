"""Preview pictures: the network in training draws prompts, through the same stages it is trained in.

Each Euler step is one pass through the pipeline; the last stage's velocity goes back to all ranks, which step the latents
alike. No rank holds the network, and no text encoder is loaded: prompts were encoded with the captions. Shift and token
length are the training's own. Nothing is drawn from any generator of the training.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from models.base import ModelAdapter
from utils import distributed, randomness, rectified_flow
from utils.config.schema import SamplingConfig
from utils.data.precompute import EncodedData
from utils.pipeline.engine import Pipeline
from utils.pipeline.feed import stack_text


class Previews:
    """Draws the configured prompts into `folder/step_…`: 000.png, 001.png, … and prompts.json."""

    def __init__(
        self,
        adapter: ModelAdapter,
        data: EncodedData,
        pipeline: Pipeline,
        config: SamplingConfig,
        *,
        shift: float,
        dtype: torch.dtype,
        folder: Path,
    ) -> None:
        self._adapter, self._data, self._pipeline, self._config = adapter, data, pipeline, config
        self._shift, self._dtype, self._folder = shift, dtype, folder

    def due(self, step: int, num_steps: int) -> bool:
        """Whether pictures are wanted after `step` steps: at the start, at the end, and every `every_n_steps`."""
        every = self._config.every_n_steps
        return bool(self._config.prompts) and (step in (0, num_steps) or (every is not None and step % every == 0))

    def draw(self, step: int) -> None:
        """Draw every prompt and write the pictures. All ranks together; rank 0 decodes."""
        prompts = self._config.prompts
        size = min(self._config.batch_size, len(prompts))
        latents = []
        for start in range(0, len(prompts), size):
            # The last batch is filled up: every batch through the pipeline has one shape.
            indices = [min(index, len(prompts) - 1) for index in range(start, start + size)]
            latents.append(self._draw_batch(indices))
        if distributed.world().is_main:
            self._write(step, torch.cat(latents)[: len(prompts)])

    def _draw_batch(self, indices: Sequence[int]) -> Tensor:
        """Latents (B, C, H, W) float32 of some prompts."""
        config, latent = self._config, self._adapter.latent
        shape = (latent.channels, config.height // latent.downscale, config.width // latent.downscale)
        device = self._pipeline.device
        noise = [randomness.normal(config.seed, "preview", index, shape=shape) for index in indices]
        latents = torch.stack(noise).to(device)
        texts = [stack_text([self._data.text(config.prompts[index]) for index in indices])]
        if config.cfg > 1:
            texts.append(stack_text([self._data.text(config.negative_prompt)] * len(indices)))
        sigmas = rectified_flow.sampling_sigmas(config.steps, self._shift).tolist()
        for sigma, next_sigma in itertools.pairwise(sigmas):
            velocity = self._velocity(latents, sigma, texts)
            latents = rectified_flow.euler_step(latents, velocity, sigma, next_sigma)
        return latents

    def _velocity(self, latents: Tensor, sigma: float, texts: Sequence[dict[str, Tensor]]) -> Tensor:
        """Guided velocity at sigma, float32, on every rank. texts: the prompts' and, with guidance, the negative's."""
        sigmas = torch.full((latents.shape[0],), sigma)
        noisy = latents.to("cpu", self._dtype)
        outputs = self._pipeline.predict([self._adapter.network_inputs(noisy, sigmas, text) for text in texts])
        velocity = None
        if outputs is not None:
            height, width = latents.shape[-2:]
            each = [self._adapter.velocity(output.float(), height, width) for output in outputs]
            velocity = each[0] if len(each) == 1 else rectified_flow.guide(each[0], each[1], self._config.cfg)
        return self._pipeline.from_last_stage(velocity, latents.shape)

    def _write(self, step: int, latents: Tensor) -> None:
        decode = self._adapter.load_decoder(self._pipeline.device)
        folder = self._folder / f"step_{step:06d}"
        folder.mkdir(parents=True, exist_ok=True)
        listing = []
        for index, (prompt, sample) in enumerate(zip(self._config.prompts, latents, strict=True)):
            file = f"{index:03d}.png"
            Image.fromarray(decode(sample[None])[0].permute(1, 2, 0).numpy()).save(folder / file)
            listing.append({"prompt": prompt, "seed": self._config.seed, "file": file})
        del decode
        distributed.free_memory()
        (folder / "prompts.json").write_text(json.dumps(listing, indent=1, ensure_ascii=False), encoding="utf-8")
