"""Results of evaluations, and the file evaluations.jsonl of a run folder, which has one result in each line."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from utils.data.encoding.stored_names import EVALUATION_FINGERPRINT, EVALUATION_NUM_IMAGES
from utils.evaluation.statistics import Interval
from utils.files.atomic import write_text

EVALUATIONS = "evaluations.jsonl"
_STORED_NAMES = {"fingerprint": EVALUATION_FINGERPRINT, "num_images": EVALUATION_NUM_IMAGES}
_FIELD_NAMES = {stored: name for name, stored in _STORED_NAMES.items()}


@dataclass(frozen=True)
class Difference:
    """The mean loss of this evaluation minus that of an earlier one, over the same images."""

    to_step: int
    mean: float
    interval: Interval | None
    """95% confidence interval; None with too few images."""

    @property
    def is_significant(self) -> bool:
        return self.interval is not None and self.interval.excludes_zero


@dataclass(frozen=True)
class GroupResult:
    """The result of one group of points: one line of the printed table."""

    name: str
    """`all`, `set <name>`, `t <from>-<to>` or `resolution <pixels>`."""
    num_images: int
    loss: float
    to_start: Difference | None
    """The difference to the first evaluation; None in the first."""
    to_best: Difference | None
    """The difference to the earlier evaluation with the lowest mean loss; only for `all` and the sets."""


@dataclass(frozen=True)
class EvaluationResult:
    """The result of one evaluation, as stored in evaluations.jsonl."""

    step: int
    weights: str
    """`last` or `ema`."""
    fingerprint: str
    """Identifies the evaluation points; only results of equal points can be compared."""
    losses: tuple[float, ...]
    """The loss at each evaluation point."""
    groups: tuple[GroupResult, ...]
    """The first is `all`."""
    to_previous: Difference | None
    is_best: bool
    """Whether the mean loss is lower than in every earlier evaluation; True for the first."""
    unchanged_since: int | None
    """The earliest step since which no evaluation differs significantly from this one. None: the previous evaluation
    differs, there is none, or there are too few images."""

    @property
    def loss(self) -> float:
        return self.groups[0].loss

    def can_be_compared(self, fingerprint: str, weights: str) -> bool:
        """Whether it has the same points and the same kind of weights. At step 0 both kinds are the initial weights."""
        return self.fingerprint == fingerprint and (self.weights == weights or self.step == 0)

    def scalars(self) -> dict[str, float]:
        """Returns the values for TensorBoard by curve name."""
        curves = {"eval/loss": self.loss}
        curves.update({f"eval/loss_{group.name.replace(' ', '_')}": group.loss for group in self.groups[1:]})
        start = self.groups[0].to_start
        if start is not None:
            curves["eval/difference_to_start"] = start.mean
            if start.interval is not None:
                curves["eval/difference_to_start_low"] = start.interval.low
                curves["eval/difference_to_start_high"] = start.interval.high
        return curves


# --- evaluations.jsonl -------------------------------------------------------------------------------------------------


def to_line(result: EvaluationResult) -> str:
    """Returns the line of evaluations.jsonl, from which all numbers are read back exactly."""
    table = _renamed(asdict(result), _STORED_NAMES)
    table["groups"] = [_renamed(group, _STORED_NAMES) for group in table["groups"]]
    summary = {key: table.pop(key) for key in ("groups", "to_previous", "is_best", "unchanged_since")}
    return json.dumps({**table, "summary": summary}, allow_nan=False) + "\n"


def _renamed(table: dict[str, Any], names: dict[str, str]) -> dict[str, Any]:
    return {names.get(key, key): value for key, value in table.items()}


def read_evaluations(path: Path) -> list[EvaluationResult]:
    """Reads the evaluations of a run in order, up to the first invalid line; none when there is no file."""
    results: list[EvaluationResult] = []
    if not path.is_file():
        return results
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            results.append(_from_table(json.loads(line)))
        except (ValueError, TypeError, KeyError, AttributeError):  # cut off by a kill, or edited by hand
            break
    return results


def keep_until(path: Path, step: int) -> list[EvaluationResult]:
    """Removes from the file the evaluations after `step`, at which a run resumes, and returns the others.

    From step 0 a run starts anew: all are removed.
    """
    kept = [result for result in read_evaluations(path) if 0 < step and result.step <= step]
    if path.is_file():
        write_text(path, "".join(map(to_line, kept)))
    return kept


def _from_table(stored: dict[str, Any]) -> EvaluationResult:
    table = _renamed(stored, _FIELD_NAMES)
    summary = table.pop("summary")
    groups = [
        GroupResult(**{**group, "to_start": _difference(group["to_start"]), "to_best": _difference(group["to_best"])})
        for group in (_renamed(entry, _FIELD_NAMES) for entry in summary.pop("groups"))
    ]
    previous, losses = _difference(summary.pop("to_previous")), tuple(table.pop("losses"))
    return EvaluationResult(**table, **summary, losses=losses, groups=tuple(groups), to_previous=previous)


def _difference(table: dict[str, Any] | None) -> Difference | None:
    if table is None:
        return None
    interval = table["interval"]
    return Difference(table["to_step"], table["mean"], None if interval is None else Interval(**interval))
