"""What a run tells: start banner, progress bar, metrics.jsonl, TensorBoard."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from tqdm import tqdm

from utils.files.atomic import write_text

SMOOTHING = 0.98
"""Weight of the past in the smoothed loss."""


@dataclass(frozen=True)
class StepMetrics:
    """One line of metrics.jsonl."""

    step: int
    """Optimizer steps done."""
    epoch: int
    loss: float
    learning_rate: float
    grad_norm: float


class RunLog:
    """Writes a run's metrics; on ranks other than 0 it writes nothing.

    Going on from a step drops the lines after it, so the file reads as if the run had never stopped.
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
            mininterval=bar_seconds(),
        )
        if not is_main:
            return
        path = folder / "metrics.jsonl"
        self._keep_until(path, start_step)
        self._file = path.open("a", encoding="utf-8")
        self._events: Any = None
        if tensorboard:
            from torch.utils.tensorboard import SummaryWriter  # here: it takes a second to import

            self._events = SummaryWriter(str(folder), purge_step=start_step + 1)

    def __enter__(self) -> RunLog:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None) -> None:
        self._bar.close()
        if self._is_main:
            self._file.close()
            if self._events is not None:
                self._events.close()

    def _keep_until(self, path: Path, step: int) -> None:
        if not path.is_file():
            return
        kept = []
        for line in path.read_text(encoding="utf-8").splitlines():
            try:
                entry = json.loads(line)
            except ValueError:
                break  # the line being written when the run was killed
            if entry["step"] > step:
                break
            kept.append(line)
            self._smooth(entry["loss"])
        write_text(path, "".join(line + "\n" for line in kept))

    def _smooth(self, loss: float) -> float:
        """Running mean with exponentially falling weights, unbiased from the first step on."""
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
        if self._events is not None:
            for name, value in entry.items():
                if name != "step":
                    self._events.add_scalar(f"train/{name}", value, metrics.step)
        self._bar.set_postfix_str(
            f"loss {metrics.loss:.4f} ({entry['loss_smoothed']:.4f}), lr {metrics.learning_rate:.2e}, "
            f"grad {metrics.grad_norm:.3f}, {images_per_second:.1f} images/s",
            refresh=False,
        )
        self._bar.update()

    def write_evaluation(self, step: int, scalars: Mapping[str, float]) -> None:
        """Curves of an evaluation, for TensorBoard: name -> value. Its numbers have a file of their own."""
        if self._is_main and self._events is not None:
            for name, value in scalars.items():
                self._events.add_scalar(name, value, step)

    def write_distribution(self, name: str, step: int, shares: Sequence[float]) -> None:
        """A distribution over [0, 1] from a step on, for TensorBoard: the share of each of equal parts."""
        if not self._is_main or self._events is None:
            return
        count = len(shares)
        middles = [(index + 0.5) / count for index in range(count)]
        self._events.add_histogram_raw(
            name,
            min=0.0,
            max=1.0,
            num=1,
            sum=sum(share * middle for share, middle in zip(shares, middles, strict=True)),
            sum_squares=sum(share * middle**2 for share, middle in zip(shares, middles, strict=True)),
            bucket_limits=[(index + 1) / count for index in range(count)],
            bucket_counts=list(shares),
            global_step=step,
        )


def bar_seconds() -> float:
    """How often a progress bar is redrawn: seldom where each time is a new line of a file."""
    return 0.2 if sys.stderr.isatty() else 15.0


def bytes_in_words(count: int) -> str:
    """As people say it: "1.23 GB"."""
    return f"{count / 1e9:,.2f} GB" if count >= 1e9 else f"{count / 1e6:,.1f} MB"


def table(rows: list[tuple[str, str]]) -> str:
    """Two columns of text, aligned."""
    width = max(len(name) for name, _ in rows)
    return "\n".join(f"  {name:<{width}}  {value}" for name, value in rows)


def say(text: str, *, is_main: bool = True) -> None:
    """A line for the user, once."""
    if is_main:
        tqdm.write(text, file=sys.stdout)
        sys.stdout.flush()
