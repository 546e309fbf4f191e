"""Preview images: the network in training draws prompts, through the same stages it is trained in.

Each step of the sampler is one pass through the pipeline, and another with blocks left out where skip-layer guidance is on.
The last stage guides the velocities; the result goes back to all ranks, which step the latents alike. No rank holds the
network, and no text encoder is loaded: prompts were encoded with the captions. Shift and token length are the training's
own. Nothing is drawn from any generator of the training.

Prompts of one size and number of steps make batches without regard to the layout, so any number of stages and replicas
draws the same images. Replicas share the batches. DeepSpeed's pass waits for all processes, so all replicas make the same
passes, and one without work of its own repeats a batch.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

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
from utils.files.atomic import remove_folder, sync_folder, write_text
from utils.objective import rectified_flow
from utils.objective.rectified_flow import PredictionType
from utils.pipeline.engine import Pipeline
from utils.pipeline.feed import stack_text
from utils.previews import samplers
from utils.previews.prompt_list import Prompt

Batch = list[int]
"""Places in the list of prompts."""
TextBatch = dict[str, Tensor]
LISTING = "prompts.json"
BESIDE = "beside_step_0"


# --- what is drawn together --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Group:
    """What prompts share that go through the pipeline together: shapes and passes."""

    width: int
    """Pixels, as the height."""
    height: int
    steps: int
    guided: bool
    """Whether negative prompts count."""


def make_batches(prompts: Sequence[Prompt], batch_size: int) -> dict[Group, list[Batch]]:
    """Each prompt in a batch of its group, in order. Batches of a group are of one size: its last prompt fills up."""
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


# --- drawing -----------------------------------------------------------------------------------------------------------


class Previews:
    """Draws prompts into `folder/step_…`: 000.png, 001.png, … and prompts.json. All ranks together; rank 0 decodes."""

    def __init__(
        self,
        family: ModelFamily,
        data: EncodedData,
        pipeline: Pipeline,
        config: SamplingConfig,
        prompts: Sequence[Prompt],
        *,
        shift_at: Callable[[int], float],
        prediction_type: PredictionType,
        dtype: torch.dtype,
        num_replicas: int,
        folder: Path,
    ) -> None:
        """`shift_at`: the shift of images of that many pixels."""
        self._family, self._data, self._pipeline = family, data, pipeline
        self._config, self._prompts, self._num_replicas = config, list(prompts), num_replicas
        self._shift_at, self._prediction_type, self._dtype = shift_at, prediction_type, dtype
        self._folder = folder

    def due(self, step: int, num_steps: int) -> bool:
        """Whether images are wanted after `step` steps: at the start, at the end, and every `every_n_steps`."""
        every = self._config.every_n_steps
        return bool(self._prompts) and (step in (0, num_steps) or (every is not None and step % every == 0))

    def draw(self, step: int) -> None:
        """Draw every prompt and write the images."""
        averaged = self._config.weights == "ema" and step > 0  # before the first step there is no average
        with self._pipeline.averaged_weights() if averaged else contextlib.nullcontext():
            latents = self._draw_all()
        if world().is_main:
            entries = [
                listing_entry(prompt, self._config, self._shift_at(prompt.width * prompt.height)) for prompt in self._prompts
            ]
            write_images(self._folder, step, self._decode(latents), entries)

    def _draw_all(self) -> list[Tensor]:
        """Latents (C, H, W) of each prompt, float32 on the CPU; none off rank 0."""
        is_main = world().is_main
        drawn: dict[int, Tensor] = {}
        at_once = self._pipeline.num_stages * self._num_replicas  # more micro-batches than stages keep them busy
        with tqdm(
            total=len(self._prompts), desc="drawing", leave=False, disable=not is_main, mininterval=bar_interval_seconds()
        ) as bar:
            for group, batches in make_batches(self._prompts, self._config.batch_size).items():
                for start in range(0, len(batches), at_once):
                    for part in gather(self._draw_round(group, batches[start : start + at_once])):
                        drawn.update(part)
                    bar.update(len(drawn) - bar.n)
        return [drawn[index] for index in range(len(self._prompts))] if is_main else []

    def _draw_round(self, group: Group, batches: Sequence[Batch]) -> dict[int, Tensor]:
        """All replicas together draw these batches; on the first stage, place -> latents of those of this replica."""
        mine = list(batches[self._pipeline.replica :: self._num_replicas])
        num_passed = -(-len(batches) // self._num_replicas)
        # Without work of its own a replica repeats a batch, and nobody looks at the result.
        latents = self._follow(group, mine + [batches[0]] * (num_passed - len(mine)))
        if self._pipeline.stage > 0:
            return {}
        return dict(zip(itertools.chain(*mine), latents.cpu(), strict=False))

    def _follow(self, group: Group, batches: Sequence[Batch]) -> Tensor:
        """Latents (N, C, H, W) float32 of the prompts of batches, one batch after the other."""
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
            answers = self._velocities(chunks * (2 if group.guided else 1), sigma, texts)
            skipped = None
            if skip is not None and samplers.skips_layers(step, group.steps, skip.start, skip.end):
                skipped = self._velocities(chunks, sigma, texts[: len(chunks)], frozenset(skip.layers))
            velocity = None if answers is None else self._guide(answers, skipped, cfg)
            shared = self._pipeline.from_last_stage(velocity, latents.shape)
            latents = sampler.step(latents, shared, sigma, next_sigma)
        return latents

    def _texts(self, group: Group, batches: Sequence[Batch]) -> list[TextBatch]:
        """Text tensors of each batch, then, with guidance, of each batch's negatives; empty off the first stage."""
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
        """What the network answers to batches of latents and texts at sigma, one after the other in float32; None off the
        last stage."""
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
            [rectified_flow.velocity_of(prediction, noisy, self._prediction_type) for prediction, noisy in predictions]
        )

    def _guide(self, answers: Tensor, skipped: Tensor | None, cfg: Tensor) -> Tensor:
        """One velocity for each image."""
        conditional, *unconditional = answers.split(len(cfg))
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


# --- writing -----------------------------------------------------------------------------------------------------------


def listing_entry(prompt: Prompt, config: SamplingConfig, shift: float) -> dict[str, Any]:
    """What prompts.json says of an image, besides its file; images of equal entries differ in the weights alone."""
    return {
        "prompt": prompt.text,
        "negative_prompt": prompt.negative,
        "width": prompt.width,
        "height": prompt.height,
        "seed": prompt.seed,
        "steps": prompt.steps,
        "cfg": prompt.cfg,
        "sampler": config.sampler,
        "shift": shift,
        "skip_layer_guidance": config.skip_layer_guidance.model_dump() if config.skip_layer_guidance is not None else None,
        "decode_tile_pixels": config.decode_tile_pixels,
    }


def write_images(parent: Path, step: int, images: Sequence[Image.Image], entries: Sequence[dict[str, Any]]) -> None:
    """Write `parent/step_…` as a whole: images, prompts.json, and each image beside that of step 0."""
    final = parent / f"step_{step:06d}"
    temporary = parent / f".{final.name}.tmp"
    if temporary.exists():
        shutil.rmtree(temporary)
    (temporary / BESIDE).mkdir(parents=True)
    listing = []
    for index, (image, entry) in enumerate(zip(images, entries, strict=True)):
        file = f"{index:03d}.png"
        image.save(temporary / file)
        listing.append({**entry, "file": file})
        first = image_at_start(parent, entry) if step > 0 else None
        if first is not None:
            side_by_side(first, image).save(temporary / BESIDE / file)
    if not any((temporary / BESIDE).iterdir()):
        (temporary / BESIDE).rmdir()
    write_text(temporary / LISTING, json.dumps(listing, indent=1, ensure_ascii=False))
    if final.exists():
        remove_folder(final)
    temporary.replace(final)
    sync_folder(parent)


def image_at_start(parent: Path, entry: dict[str, Any]) -> Image.Image | None:
    """The image of step 0 with the same entry; None if there is none, as when the prompt came later."""
    folder = parent / "step_000000"
    try:
        listing = json.loads((folder / LISTING).read_text(encoding="utf-8"))
        for earlier in listing:
            if earlier == {**entry, "file": earlier.get("file")}:
                return Image.open(folder / earlier["file"]).convert("RGB")
    except (OSError, ValueError, AttributeError):  # someone has tidied up
        pass
    return None


def side_by_side(left: Image.Image, right: Image.Image) -> Image.Image:
    """Two images of one size in one."""
    both = Image.new("RGB", (left.width + right.width, right.height))
    both.paste(left, (0, 0))
    both.paste(right, (left.width, 0))
    return both
