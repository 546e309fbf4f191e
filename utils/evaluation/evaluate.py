"""Evaluation: how far the network's velocity is off on images it is not trained on, through the pipeline it is trained in.

Measured is the mean squared error of the velocity at the entries of a fixed panel (panel.py): in float32, averaged in
float64, each entry for itself, with the caption as it is, no flip and no weight; where an image has a mask, errors are
multiplied by it. That holds for every objective, so that their runs can be compared; it is not the loss that is trained.

Batches are put together without regard to the layout, so any number of stages gives the same bits, and replicas do where
their weights are the same. DeepSpeed's pass through the pipeline waits for all processes, so all replicas make the same
passes, and one without work of its own repeats a batch. Nothing is drawn from any generator of the training.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from models.family import ModelFamily
from models.streams import Sample, SampleShape
from utils.config.schema.evaluation import EvalConfig
from utils.console import bar_interval_seconds, print_line
from utils.data.encoding.encoded import EncodedData
from utils.distributed import group
from utils.distributed.world import world
from utils.evaluation.comparison import EvaluationResult, Measured, compare, describe, keep_until, make_groups, to_line
from utils.evaluation.points import PanelEntry, fingerprint, make_rounds, noise_of
from utils.objective import rectified_flow
from utils.objective.rectified_flow import PredictionType
from utils.pipeline.engine import Pipeline
from utils.pipeline.feed import stack_text

EVALUATIONS = "evaluations.jsonl"
MAX_BATCHES_AT_ONCE = 32
"""Of a replica in one pass: what is fed and what comes out is held until the pass ends."""


@dataclass(frozen=True)
class EntryBatch:
    """What the two ends of the pipeline know of a batch of entries."""

    noisy: Tensor
    """(B, C, H, W) float32."""
    sigma: Tensor
    """(B,) float32."""
    velocity: Tensor
    """(B, C, H, W) float32: what the network should answer."""
    masks: Sequence[Tensor | None]
    """(1, H, W) each."""


class Evaluation:
    """Evaluates the panel, and compares with what was measured before in the run folder. All ranks together."""

    def __init__(
        self,
        family: ModelFamily,
        data: EncodedData,
        pipeline: Pipeline,
        config: EvalConfig,
        panel: Sequence[PanelEntry],
        *,
        prediction_type: PredictionType,
        dtype: torch.dtype,
        folder: Path,
        seed: int,
        num_replicas: int,
        start_step: int,
    ) -> None:
        """`seed` is the panel's; `start_step`: where the run begins or goes on, as if what came after had never been."""
        self._family, self._data, self._pipeline, self._config, self._panel = family, data, pipeline, config, panel
        self._prediction_type, self._dtype, self._seed, self._num_replicas = prediction_type, dtype, seed, num_replicas
        self._path = folder / EVALUATIONS
        self._fingerprint = fingerprint(panel, data.content_keys)
        self._groups = make_groups(panel)
        at_once = min(4 * pipeline.num_stages, MAX_BATCHES_AT_ONCE)
        self._rounds = make_rounds(panel, config.batch_size, at_once * num_replicas)
        self._earlier = self._read_earlier(start_step) if world().is_main else []
        self._has_begun = group.broadcast(bool(self._earlier))

    def _read_earlier(self, start_step: int) -> list[Measured]:
        """The evaluations of this panel that the run folder has; rank 0 only, which alone compares."""
        kept = keep_until(self._path, start_step)
        comparable = [result for result in kept if result.can_be_compared(self._fingerprint, self._config.weights)]
        if len(comparable) < len(kept):
            print_line(
                f"{len(kept) - len(comparable)} evaluations in {self._path} are of other images, captions, times, "
                "encoders or weights; what comes now is not compared with them"
            )
        return [Measured(result.step, torch.tensor(result.losses, dtype=torch.float64)) for result in comparable]

    def due(self, step: int, num_steps: int) -> bool:
        """Whether an evaluation is wanted after `step` steps: at the start, at the end, and every `every_n_steps`.

        Also when nothing of this panel was measured yet, so that a run that goes on with other images has a beginning.
        """
        every = self._config.every_n_steps
        return not self._has_begun or step in (0, num_steps) or (every is not None and step % every == 0)

    def run(self, step: int) -> EvaluationResult:
        """Measure, compare, tell and write down; the same result on every rank.

        Raises FloatingPointError on every rank when an error is no number.
        """
        averaged = self._config.weights == "ema" and step > 0
        with self._pipeline.averaged_weights() if averaged else contextlib.nullcontext():
            now = Measured(step, self._measure())
        self._has_begun = True
        result = None
        if world().is_main:
            result = compare(
                now,
                self._earlier,
                self._groups,
                weights=self._config.weights,
                panel=self._fingerprint,
                seed=self._seed,
            )
            self._earlier.append(now)
            with self._path.open("a", encoding="utf-8") as file:
                file.write(to_line(result))
            print_line(describe(result))
        shared = group.broadcast(result)
        assert shared is not None
        return shared

    # --- measuring ---------------------------------------------------------------------------------------------------

    def _measure(self) -> Tensor:
        """The loss of every entry, (N,) float64, on every rank."""
        own: dict[int, float] = {}
        is_main = world().is_main
        seconds = bar_interval_seconds()
        with tqdm(
            total=len(self._panel), desc="evaluating", leave=False, delay=2, disable=not is_main, mininterval=seconds
        ) as bar:
            for batches in self._rounds:
                own.update(self._measure_round(batches))
                bar.update(sum(len(batch) for batch in batches))
        losses: dict[int, float] = {}
        for part in group.gather(own):
            losses.update(part)
        measured = torch.tensor([losses[index] for index in range(len(self._panel))], dtype=torch.float64)
        self._stop_if_not_finite(measured)
        return measured

    def _measure_round(self, batches: Sequence[list[int]]) -> dict[int, float]:
        """One pass of all replicas over batches of one shape; place in the panel -> loss, on this replica's last stage."""
        mine = batches[self._pipeline.replica :: self._num_replicas]
        num_passes = -(-len(batches) // self._num_replicas)
        # Without work of its own a replica repeats a batch, and nobody looks at the result.
        passed = [*mine, *[batches[0]] * (num_passes - len(mine))]
        is_first, is_last = self._pipeline.stage == 0, self._pipeline.stage == self._pipeline.num_stages - 1
        entry_batches = [self._entry_batch(batch) for batch in passed] if is_first or is_last else []
        samples = [self._sample(*pair) for pair in zip(passed, entry_batches, strict=True)] if is_first else []
        outputs = self._pipeline.predict([self._shape(batch) for batch in passed], samples)
        losses: dict[int, float] = {}
        for batch, entry_batch, output in zip(mine, entry_batches, outputs or [], strict=False):
            losses.update(zip(batch, self._losses(output, entry_batch, self._shape(batch)), strict=True))
        return losses

    def _shape(self, batch: Sequence[int]) -> SampleShape:
        bucket, downscale = self._panel[batch[0]].example.bucket, self._family.latent.downscale
        return self._family.sample_shape(len(batch), bucket.height // downscale, bucket.width // downscale)

    def _entry_batch(self, batch: Sequence[int]) -> EntryBatch:
        entries = [self._panel[index] for index in batch]
        latents = torch.stack([self._data.latents(entry.example) for entry in entries])
        noise = torch.stack([noise_of(entry, tuple(latents.shape[1:]), self._seed) for entry in entries])
        sigma = torch.tensor([entry.sigma for entry in entries])
        return EntryBatch(
            noisy=rectified_flow.add_noise(latents, noise, sigma),
            sigma=sigma,
            velocity=rectified_flow.velocity_target(latents, noise),
            masks=[self._data.mask(entry.example) for entry in entries],
        )

    def _sample(self, batch: Sequence[int], entries: EntryBatch) -> Sample:
        text = stack_text([self._data.text(self._panel[index].example.caption()) for index in batch])
        return self._family.sample(entries.noisy.to(self._dtype), entries.sigma, text)

    def _losses(self, output: Tensor, entries: EntryBatch, shape: SampleShape) -> list[float]:
        """Mean squared error of each row's velocity."""
        prediction = self._family.velocity(output.float(), shape)
        velocity = rectified_flow.velocity_of(prediction, entries.noisy.to(prediction.device), self._prediction_type)
        squares = (velocity - entries.velocity.to(velocity.device)).square()
        masked = [
            row if mask is None else row * mask.to(row.device) for row, mask in zip(squares, entries.masks, strict=True)
        ]
        return [float(row.mean(dtype=torch.float64)) for row in masked]

    def _stop_if_not_finite(self, losses: Tensor) -> None:
        bad = (~losses.isfinite()).nonzero().flatten().tolist()
        if bad:
            names = ", ".join(dict.fromkeys(self._panel[index].example.key for index in bad))
            raise FloatingPointError(f"evaluation: the network's error is no number at {names}; nothing was written")
