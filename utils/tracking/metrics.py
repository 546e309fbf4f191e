"""Metrics of a run while it trains: metrics.jsonl, TensorBoard, progress bar."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType

from tqdm import tqdm

from utils.console import bar_interval_seconds
from utils.files.atomic import write_text
from utils.tracking.tensorboard import TensorBoard

METRICS = "metrics.jsonl"
SMOOTHING = 0.98
"""Weight of the previous value in the smoothed loss."""


@dataclass(frozen=True)
class StepMetrics:
    """The numbers of one optimizer step."""

    step: int
    """Optimizer steps done."""
    epoch: int
    """Counted from 0."""
    loss: float
    learning_rate: float
    grad_norm: float


class RunLog:
    """Writes the metrics of a run; on ranks other than 0 it writes nothing.

    When a run resumes from a step, the lines after that step are dropped: the file equals that of an uninterrupted run.
    """

    def __init__(
        self, folder: Path, *, start_step: int, num_steps: int, global_batch: int, tensorboard: bool, is_main: bool
    ) -> None:
        self._is_main = is_main
        self._global_batch = global_batch
        self._smoothed, self._weight = 0.0, 0.0
        self._bar = tqdm(
            total=num_steps,
            initial=start_step,
            desc="training",
            unit="step",
            disable=not is_main,
            dynamic_ncols=True,
            mininterval=bar_interval_seconds(),
        )
        self._tensorboard: TensorBoard | None = None
        if not is_main:
            return
        self._keep_until(folder / METRICS, start_step)
        self._file = (folder / METRICS).open("a", encoding="utf-8")
        if tensorboard:
            self._tensorboard = TensorBoard(folder, start_step)

    def __enter__(self) -> RunLog:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None) -> None:
        self._bar.close()
        if self._is_main:
            self._file.close()
        if self._tensorboard is not None:
            self._tensorboard.close()

    def _keep_until(self, path: Path, step: int) -> None:
        """Drops the lines after a step, and continues the smoothed loss from the others."""
        if not path.is_file():
            return
        kept = []
        for line in path.read_text(encoding="utf-8").splitlines():
            try:
                entry = json.loads(line)
            except ValueError:
                break  # the line that was being written when the run was killed
            if entry["step"] > step:
                break
            kept.append(line)
            self._smooth(entry["loss"])
        write_text(path, "".join(line + "\n" for line in kept))

    def _smooth(self, loss: float) -> float:
        """Exponential moving average of the loss, unbiased from the first step on."""
        self._smoothed = SMOOTHING * self._smoothed + (1 - SMOOTHING) * loss
        self._weight = SMOOTHING * self._weight + (1 - SMOOTHING)
        return self._smoothed / self._weight

    def write(self, metrics: StepMetrics, seconds: float, group_rates: Mapping[str, float] | None = None) -> None:
        """Records one optimizer step of that duration. `group_rates`: learning rates of further parameter groups."""
        if not self._is_main:
            return
        images_per_second = self._global_batch / max(1e-9, seconds)
        entry = {
            **asdict(metrics),
            **{f"learning_rate_{name}": rate for name, rate in (group_rates or {}).items()},
            "loss_smoothed": self._smooth(metrics.loss),
            "images_per_second": images_per_second,
        }
        self._file.write(json.dumps(entry) + "\n")
        self._file.flush()
        scalars = {f"train/{name}": value for name, value in entry.items() if name != "step"}
        self.write_scalars(metrics.step, scalars)
        self._bar.set_postfix_str(
            f"loss {metrics.loss:.4f} ({entry['loss_smoothed']:.4f}), lr {metrics.learning_rate:.2e}, "
            f"grad {metrics.grad_norm:.3f}, {images_per_second:.1f} images/s",
            refresh=False,
        )
        self._bar.update()

    def write_scalars(self, step: int, scalars: Mapping[str, float]) -> None:
        """Adds a point to each curve in TensorBoard; name -> value."""
        if self._tensorboard is not None:
            self._tensorboard.write_scalars(step, scalars)

    def write_distribution(self, name: str, step: int, fractions: Sequence[float]) -> None:
        """Adds a distribution over [0, 1] to TensorBoard: the fraction in each of equally wide bins."""
        if self._tensorboard is not None:
            self._tensorboard.write_distribution(name, step, fractions)
