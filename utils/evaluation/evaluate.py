"""Evaluation: the error of the network's velocity on images that are not trained on, measured through the training pipeline.

The loss of an evaluation point (points.py) is the mean squared error of the velocity, of a float32 output, averaged in
float64, with the first caption, without flipping and without a weight; where an image has a mask, squared errors are
multiplied by it. It is the same for every objective, so that their runs can be compared; it is not the training loss.

Batches do not depend on the layout: any number of stages gives the same bits, and so do replicas with equal weights. A
forward pass through DeepSpeed's pipeline needs all processes, so all replicas make the same passes, and a replica without
a batch of its own repeats one. No random generator of the training is used.
"""

from __future__ import annotations

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
from utils.evaluation.comparison import Measurement, compare, make_groups
from utils.evaluation.points import EvaluationPoint, fingerprint, make_rounds, noise_of
from utils.evaluation.result_table import describe
from utils.evaluation.results import EVALUATIONS, EvaluationResult, keep_until, to_line
from utils.objective import rectified_flow
from utils.objective.objective import Objective
from utils.pipeline.engine import Pipeline
from utils.pipeline.feed import stack_text

MAX_BATCHES_AT_ONCE = 32
"""Batches of a replica in one forward pass; all inputs and outputs of the pass are in memory."""


@dataclass(frozen=True)
class PointBatch:
    """A batch of evaluation points on the first and the last stage."""

    noisy_latents: Tensor
    """(B, C, H, W) float32."""
    sigma: Tensor
    """(B,) float32."""
    velocity: Tensor
    """(B, C, H, W) float32: the target."""
    masks: Sequence[Tensor | None]
    """(1, H, W) each."""


class Evaluation:
    """Measures the losses at all points and compares them with earlier evaluations in the run folder. All ranks together."""

    def __init__(
        self,
        family: ModelFamily,
        data: EncodedData,
        pipeline: Pipeline,
        objective: Objective,
        config: EvalConfig,
        points: Sequence[EvaluationPoint],
        *,
        dtype: torch.dtype,
        folder: Path,
        seed: int,
        num_replicas: int,
        start_step: int,
    ) -> None:
        """`seed`: that of the points. `start_step`: where the run starts or resumes; later evaluations are removed."""
        self._family, self._data, self._pipeline, self._config, self._points = family, data, pipeline, config, points
        self._objective, self._dtype, self._seed, self._num_replicas = objective, dtype, seed, num_replicas
        self._path = folder / EVALUATIONS
        self._fingerprint = fingerprint(points, data.content_keys)
        self._groups = make_groups(points)
        at_once = min(4 * pipeline.num_stages, MAX_BATCHES_AT_ONCE)
        self._rounds = make_rounds(points, config.batch_size, at_once * num_replicas)
        self._earlier = self._read_earlier(start_step) if world().is_main else []
        self._has_results = group.broadcast(bool(self._earlier))

    @property
    def has_results(self) -> bool:
        """Whether these points have been evaluated before, in this process or in the run that is resumed."""
        return self._has_results

    def _read_earlier(self, start_step: int) -> list[Measurement]:
        """Reads the earlier evaluations of the same points; on rank 0 only, which makes the comparisons."""
        kept = keep_until(self._path, start_step)
        comparable = [result for result in kept if result.can_be_compared(self._fingerprint, self._config.weights)]
        if len(comparable) < len(kept):
            print_line(
                f"{len(kept) - len(comparable)} evaluations in {self._path} have other images, captions, timesteps, "
                "encoders or weights; new evaluations are not compared with them"
            )
        return [Measurement(result.step, torch.tensor(result.losses, dtype=torch.float64)) for result in comparable]

    def run(self, step: int) -> EvaluationResult:
        """Measures, compares, prints and stores the result; returns the same result on every rank.

        Raises FloatingPointError on every rank when a loss is non-finite.
        """
        averaged = self._config.weights == "ema" and step > 0
        with self._pipeline.evaluated_weights(ema=averaged):
            now = Measurement(step, self._measure())
        self._has_results = True
        result = None
        if world().is_main:
            result = compare(
                now,
                self._earlier,
                self._groups,
                weights=self._config.weights,
                fingerprint=self._fingerprint,
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
        """Returns the loss at every point, (N,) float64, on every rank."""
        own: dict[int, float] = {}
        is_main = world().is_main
        seconds = bar_interval_seconds()
        with tqdm(
            total=len(self._points), desc="evaluating", leave=False, delay=2, disable=not is_main, mininterval=seconds
        ) as bar:
            for batches in self._rounds:
                own.update(self._measure_round(batches))
                bar.update(sum(len(batch) for batch in batches))
        losses: dict[int, float] = {}
        for part in group.gather(own):
            losses.update(part)
        measured = torch.tensor([losses[index] for index in range(len(self._points))], dtype=torch.float64)
        self._stop_if_not_finite(measured)
        return measured

    def _measure_round(self, batches: Sequence[list[int]]) -> dict[int, float]:
        """One forward pass of all replicas over batches of one shape.

        Returns index of the point -> loss for this replica's batches, on its last stage; {} on other stages.
        """
        mine = batches[self._pipeline.replica :: self._num_replicas]
        num_passed = -(-len(batches) // self._num_replicas)
        # A replica with fewer batches than others repeats one; the result is discarded.
        passed = [*mine, *[batches[0]] * (num_passed - len(mine))]
        is_first, is_last = self._pipeline.stage == 0, self._pipeline.stage == self._pipeline.num_stages - 1
        point_batches = [self._point_batch(batch) for batch in passed] if is_first or is_last else []
        samples = [self._sample(*pair) for pair in zip(passed, point_batches, strict=True)] if is_first else []
        outputs = self._pipeline.predict([self._shape(batch) for batch in passed], samples)
        losses: dict[int, float] = {}
        for batch, point_batch, output in zip(mine, point_batches, outputs or [], strict=False):
            losses.update(zip(batch, self._losses(output, point_batch, self._shape(batch)), strict=True))
        return losses

    def _shape(self, batch: Sequence[int]) -> SampleShape:
        bucket, downscale = self._points[batch[0]].example.bucket, self._family.latent.downscale
        return self._family.sample_shape(len(batch), bucket.height // downscale, bucket.width // downscale)

    def _point_batch(self, batch: Sequence[int]) -> PointBatch:
        points = [self._points[index] for index in batch]
        latents = torch.stack([self._data.latents(point.example) for point in points])
        noise = torch.stack([noise_of(point, tuple(latents.shape[1:]), self._seed) for point in points])
        sigma = torch.tensor([point.sigma for point in points])
        return PointBatch(
            noisy_latents=rectified_flow.add_noise(latents, noise, sigma),
            sigma=sigma,
            velocity=rectified_flow.velocity_target(latents, noise),
            masks=[self._data.mask(point.example) for point in points],
        )

    def _sample(self, batch: Sequence[int], points: PointBatch) -> Sample:
        text = stack_text([self._data.text(self._points[index].example.caption()) for index in batch])
        return self._family.sample(points.noisy_latents.to(self._dtype), points.sigma, text)

    def _losses(self, output: Tensor, points: PointBatch, shape: SampleShape) -> list[float]:
        """Returns the mean squared error of each row's velocity."""
        prediction = self._family.velocity(output.float(), shape)
        noisy_latents = points.noisy_latents.to(prediction.device)
        velocity = rectified_flow.velocity_of(prediction, noisy_latents, self._objective.prediction_type)
        squares = (velocity - points.velocity.to(velocity.device)).square()
        masked = [
            row if mask is None else row * mask.to(row.device) for row, mask in zip(squares, points.masks, strict=True)
        ]
        return [float(row.mean(dtype=torch.float64)) for row in masked]

    def _stop_if_not_finite(self, losses: Tensor) -> None:
        bad = (~losses.isfinite()).nonzero().flatten().tolist()
        if bad:
            names = ", ".join(dict.fromkeys(self._points[index].example.key for index in bad))
            raise FloatingPointError(f"evaluation: the loss is NaN or infinite at {names}; the evaluation was not stored")
