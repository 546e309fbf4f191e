"""TensorBoard events of a run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any


class TensorBoard:
    """Writes scalars and distributions into a run folder. Values of later steps, from before a resume, are purged."""

    def __init__(self, folder: Path, start_step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter  # imported here: it takes a second

        self._writer: Any = SummaryWriter(str(folder), purge_step=start_step + 1)

    def close(self) -> None:
        """Flushes everything to disk."""
        self._writer.close()

    def write_scalars(self, step: int, scalars: Mapping[str, float]) -> None:
        """Adds a point to each curve; name -> value."""
        for name, value in scalars.items():
            self._writer.add_scalar(name, value, step)

    def write_distribution(self, name: str, step: int, fractions: Sequence[float]) -> None:
        """Adds a distribution over [0, 1], given as the fraction that falls into each of equally wide bins."""
        count = len(fractions)
        centres = [(index + 0.5) / count for index in range(count)]
        self._writer.add_histogram_raw(
            name,
            min=0.0,
            max=1.0,
            num=1,
            sum=sum(fraction * centre for fraction, centre in zip(fractions, centres, strict=True)),
            sum_squares=sum(fraction * centre**2 for fraction, centre in zip(fractions, centres, strict=True)),
            bucket_limits=[(index + 1) / count for index in range(count)],
            bucket_counts=list(fractions),
            global_step=step,
        )
