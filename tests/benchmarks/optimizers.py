"""Runs every optimizer through the pipeline:  OMP_NUM_THREADS=1 python -m tests.benchmarks.optimizers [--quick|--names a,b]

Each trains a small network (optimizer_ranks.py) for five steps, as one stage, as two stages and as two replicas, and is
resumed from its state after three steps in a new pipeline. The processes of a layout start once for all names; where one
fails, they start again for the names after it.

Columns: bytes of state per parameter beside the float32 weights; time of an update in relation to AdamW (medians, one
process); whether two stages give the bits of one; the largest difference of a weight between two replicas and one process,
in relation to the largest change of a weight; whether the resumed run has the bits of the uninterrupted one in all layouts.
"""

from __future__ import annotations

import argparse
import math
import statistics
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from docs.list_optimizers import full_name
from tests.benchmarks.optimizer_ranks import LAYOUTS, Outcome, outcome_file
from tests.distributed.launch import start_ranks
from utils.optim.registry import all_kinds, find

QUICK = ("AdamW8bit", "Prodigy", "Muon", "SGD", "Adafactor", "AdamWScheduleFree", "Lion", "CAME", "SOAP", "AdEMAMix")
BASELINE = "AdamW"
LIMIT_SECONDS = 3600.0


@dataclass(frozen=True)
class Layout:
    """An optimizer in one layout: what its ranks have saved."""

    outcomes: Sequence[Outcome]

    @property
    def error(self) -> str:
        return next((outcome.error.strip().splitlines()[-1] for outcome in self.outcomes if outcome.error), "")

    @property
    def metrics(self) -> list[tuple[float, float]]:
        return self.outcomes[0].metrics

    @property
    def weights(self) -> dict[str, Tensor]:
        return {name: weight for outcome in self.outcomes for name, weight in outcome.weights.items()}

    @property
    def largest_change(self) -> float:
        return largest_difference(self.weights, {name: w for one in self.outcomes for name, w in one.start.items()})

    @property
    def is_resume_equal(self) -> bool:
        return all(outcome.is_resume_equal for outcome in self.outcomes)


def largest_difference(one: dict[str, Tensor], other: dict[str, Tensor]) -> float:
    assert one.keys() == other.keys()
    return max(float((one[name] - other[name]).abs().max()) for name in one)


@dataclass(frozen=True)
class Row:
    """A line of the table."""

    name: str
    package: str
    bytes_per_parameter: float
    update_seconds: float
    are_stages_equal: bool
    replica_difference: float
    """In relation to the largest change of a weight; NaN if no weight changes."""
    is_resume_equal: bool
    error: str = ""

    @property
    def has_failed(self) -> bool:
        return bool(self.error) or not (self.are_stages_equal and self.is_resume_equal)


def row_of(name: str, package: str, one: Layout, stages: Layout, replicas: Layout) -> Row:
    error = next((layout.error for layout in (one, stages, replicas) if layout.error), "")
    change = one.largest_change if not error else 0.0
    if not error and not (math.isfinite(change) and all(math.isfinite(value) for step in one.metrics for value in step)):
        error = f"the weights change by {change}; losses and norms {one.metrics}"
    if error:
        return Row(name, package, math.nan, math.nan, False, math.nan, False, error)
    weights = one.weights
    return Row(
        name,
        package,
        one.outcomes[0].state_bytes / sum(weight.numel() for weight in weights.values()),
        statistics.median(one.outcomes[0].update_seconds[1:]),
        one.metrics == stages.metrics and all(torch.equal(weights[key], value) for key, value in stages.weights.items()),
        largest_difference(weights, replicas.weights) / change if change else math.nan,
        all(layout.is_resume_equal for layout in (one, stages, replicas)),
    )


# --- running -----------------------------------------------------------------------------------------------------------


def measure(names: Sequence[str]) -> list[Row]:
    """Runs the optimizers of these full names and returns a row for each."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        for num_processes in LAYOUTS:
            _run_all(folder / str(num_processes), num_processes, names)
        return [_read_row(folder, name) for name in names]


def _run_all(folder: Path, num_processes: int, names: Sequence[str]) -> None:
    folder.mkdir()
    waiting = list(names)
    while waiting:
        arguments = [str(folder), *waiting]
        ranks = start_ranks(num_processes, arguments, folder / "log.txt", module="tests.benchmarks.optimizer_ranks")
        finished = ranks.wait(LIMIT_SECONDS)
        if finished.exit_code == 0:
            return
        failed = [name for name in waiting if any(outcome.error for outcome in _read(folder, num_processes, name))]
        if not failed:
            raise RuntimeError(f"the processes ended without a result:\n{finished.output}")
        waiting = waiting[waiting.index(failed[0]) + 1 :]


def _read(folder: Path, num_processes: int, name: str) -> list[Outcome]:
    """What the ranks have saved of an optimizer, in all layouts of these processes."""
    files = [outcome_file(folder, name, stages, rank) for stages in LAYOUTS[num_processes] for rank in range(num_processes)]
    return [torch.load(file, weights_only=False) for file in files if file.exists()]


def _read_row(folder: Path, name: str) -> Row:
    kind = find(name)
    assert kind is not None
    one, two = _read(folder / "1", 1, name), _read(folder / "2", 2, name)
    stages, replicas = two[:2], two[2:3]  # both replicas have the same weights and metrics
    return row_of(kind.name, kind.package, Layout(one), Layout(stages), Layout(replicas or two))


# --- the table ---------------------------------------------------------------------------------------------------------


def table(rows: Sequence[Row]) -> str:
    base = next((row.update_seconds for row in rows if (row.name, row.package) == (BASELINE, "torch.optim")), math.nan)
    lines = [_line("name", "package", "bytes", "update", "stages", "replicas", "resume")]
    for row in rows:
        stages, resume = ("equal" if is_equal else "DIFFER" for is_equal in (row.are_stages_equal, row.is_resume_equal))
        numbers = (f"{row.bytes_per_parameter:.2f}", f"{row.update_seconds / base:.2f}")
        values = (row.error,) if row.error else (*numbers, stages, f"{row.replica_difference:.0e}", resume)
        lines.append(_line(row.name, row.package, *values))
    return "\n".join(lines)


def _line(name: str, package: str, *values: str) -> str:
    return f"{name:<26} {package:<18}" + "".join(f" {value:>9}" for value in values)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help=f"only {', '.join(QUICK)}")
    parser.add_argument("--names", help="only these, separated by commas")
    arguments = parser.parse_args()
    chosen = arguments.names.split(",") if arguments.names else QUICK if arguments.quick else ()
    kinds = [kind for kind in map(find, chosen) if kind is not None] if chosen else list(all_kinds())
    names = [full_name(kind) for kind in kinds if kind.refusal is None]
    rows = measure(list(dict.fromkeys([f"torch.optim.{BASELINE}", *names])))
    print(table(rows))
    slowest = max(rows, key=lambda row: row.update_seconds if math.isfinite(row.update_seconds) else 0.0)
    print(f"slowest update: {slowest.name} of {slowest.package}")
    print(f"{sum(row.has_failed for row in rows)} failures of {len(rows)} optimizers")


if __name__ == "__main__":
    main()
