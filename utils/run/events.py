"""Looking at a run while it trains: evaluation, the best weights so far, previews, the report."""

from __future__ import annotations

from pathlib import Path

import torch

from utils.data.batches import BatchOrder
from utils.data.encoding.encoded import EncodedData
from utils.distributed import group as distributed
from utils.evaluation.evaluate import Evaluation
from utils.evaluation.points import make_panel
from utils.export import weights as export
from utils.objective.objective import Objective
from utils.objective.rectified_flow import shift_time
from utils.pipeline.engine import Pipeline
from utils.previews.sampling import Previews
from utils.report.run_page import write_report
from utils.run.banner import objective_rows, summary
from utils.run.prepare import Experiment
from utils.tracking.metrics import RunLog

BEST = "best"
NUM_TIME_BINS = 64


class Observer:
    """Looks when it is due. All ranks together; nothing of it is left in training."""

    def __init__(
        self,
        experiment: Experiment,
        folder: Path,
        pipeline: Pipeline,
        data: EncodedData,
        order: BatchOrder,
        log: RunLog,
        start_step: int,
    ) -> None:
        self._experiment, self._folder, self._pipeline, self._order = experiment, folder, pipeline, order
        self._log = log
        self._config = experiment.config.experiment
        self._num_steps = experiment.num_steps(order)
        self._objective = Objective(self._config.objective)
        self._write_times(start_step)
        if distributed.world().is_main:
            export.drop_weights_after(folder / BEST, start_step)
        self._evaluation = self._make_evaluation(data, start_step)
        self._previews = self._make_previews(data)

    def _write_times(self, step: int) -> None:
        """How often each t and each sigma is trained from this step on, for TensorBoard; over images of all sizes."""
        edges = torch.linspace(0, 1, NUM_TIME_BINS + 1, dtype=torch.float64)
        counts = self._experiment.dataset.bucket_counts()
        shares = torch.zeros(2, NUM_TIME_BINS, dtype=torch.float64)
        for bucket, count in counts.items():
            shift = self._objective.shift_at(bucket.width * bucket.height)
            sampler = self._objective.sampler(shift)
            both = [sampler.share_below(times).diff() for times in (edges, shift_time(edges, 1 / shift))]
            shares += count / sum(counts.values()) * torch.stack(both)
        for name, part in zip(("t", "sigma"), shares, strict=True):
            self._log.write_distribution(f"objective/{name}", step, part.tolist())

    def _make_evaluation(self, data: EncodedData, start_step: int) -> Evaluation | None:
        config, experiment = self._config, self._experiment
        if config.eval is None:
            return None
        panel = make_panel(experiment.eval_sets, config.eval.num_t_bands, config.seed, self._objective.shift_at)
        return Evaluation(
            experiment.family,
            data,
            self._pipeline,
            config.eval,
            panel,
            prediction_type=self._objective.prediction_type,
            dtype=config.model.torch_dtype,
            folder=self._folder,
            seed=config.seed,
            num_replicas=experiment.num_replicas,
            start_step=start_step,
        )

    def _make_previews(self, data: EncodedData) -> Previews:
        shift = self._config.sampling.shift
        return Previews(
            self._experiment.family,
            data,
            self._pipeline,
            self._config.sampling,
            self._experiment.prompts,
            shift_at=self._objective.shift_at if shift is None else lambda _num_pixels: shift,
            prediction_type=self._objective.prediction_type,
            dtype=self._config.model.torch_dtype,
            num_replicas=self._experiment.num_replicas,
            folder=self._folder / "samples",
        )

    def look(self, step: int) -> None:
        """At the weights after `step` steps."""
        looked = False
        if self._evaluation is not None and self._evaluation.due(step, self._num_steps):
            self._evaluate(self._evaluation, step)
            looked = True
        if self._previews.due(step, self._num_steps):
            self._previews.draw(step)
            looked = True
        if looked or step in (0, self._num_steps):
            self._report()

    def _evaluate(self, evaluation: Evaluation, step: int) -> None:
        result = evaluation.run(step)
        self._log.write_evaluation(step, result.scalars())
        wants_best = self._config.eval is not None and self._config.eval.keep_best
        if wants_best and result.is_best and step > 0:  # the start's weights are where they came from
            export.write_weights(self._pipeline, self._experiment.family, self._config, self._folder / BEST, step)

    def saved(self) -> None:
        """A checkpoint has been written. No run will go on from before it, so of the best weights the newest are enough."""
        if distributed.world().is_main:
            export.keep_newest_weights(self._folder / BEST)

    def _report(self) -> None:
        if distributed.world().is_main:
            rows = summary(self._experiment, self._order)
            write_report(self._folder, rows, objective_rows(self._config.objective), self._objective)
