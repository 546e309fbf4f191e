"""What an evaluation says: mean losses by group, and whether they differ from those of earlier steps.

All evaluations of a run measure the same entries, so they are compared entry by entry. Entries of one image, at several
times and sizes, are no independent witnesses: each image's differences are averaged first, and the interval is one over
images. A mean loss is a mean over images too, so that it changes by exactly the difference that is told. No correction
is made for looking often: of twenty comparisons of equal networks, one is significant.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from utils.evaluation import statistics
from utils.evaluation.points import PanelEntry
from utils.evaluation.statistics import Interval
from utils.files.atomic import write_text

ALL = "all"


@dataclass(frozen=True)
class Difference:
    """Mean loss now less that at an earlier step, over the same images."""

    to_step: int
    mean: float
    interval: Interval | None
    """95%; None where there are too few images for one."""

    @property
    def is_significant(self) -> bool:
        return self.interval is not None and self.interval.excludes_zero


@dataclass(frozen=True)
class Group:
    """Some entries of the panel."""

    name: str
    entries: tuple[int, ...]
    images: tuple[int, ...]
    """Number of each entry's image."""
    with_best: bool
    """Whether it is compared with the best step too."""

    def image_losses(self, losses: Tensor) -> Tensor:
        """Mean loss of each image, float64, of all entries' losses."""
        return statistics.group_means(losses[list(self.entries)], self.images)


@dataclass(frozen=True)
class GroupResult:
    """One line of an evaluation's table."""

    name: str
    """`all`, `set <name>`, `t <from>-<to>` or `resolution <pixels>`."""
    num_images: int
    loss: float
    to_start: Difference | None
    """None in the first evaluation."""
    to_best: Difference | None
    """To the lowest mean loss before; of `all` and the sets."""


@dataclass(frozen=True)
class EvaluationResult:
    """One evaluation, as it stands in evaluations.jsonl."""

    step: int
    weights: str
    """`last` or `ema`."""
    panel: str
    """Fingerprint of what was measured; only equal ones can be compared."""
    losses: tuple[float, ...]
    """Of each entry of the panel."""
    groups: tuple[GroupResult, ...]
    """The first is `all`."""
    to_previous: Difference | None
    is_best: bool
    """The mean loss is lower than in every evaluation before, or this is the first."""
    unchanged_since: int | None
    """The earliest step from which on no evaluation differs significantly from this one. None: the one before does, or
    there is none, or there are too few images to tell."""

    @property
    def loss(self) -> float:
        return self.groups[0].loss

    def can_be_compared(self, panel: str, weights: str) -> bool:
        """Whether it measured the same, of the same kind of weights; before training there is but one kind."""
        return self.panel == panel and (self.weights == weights or self.step == 0)

    def scalars(self) -> dict[str, float]:
        """Curves for TensorBoard: name -> value."""
        curves = {"eval/loss": self.loss}
        curves.update({f"eval/loss_{group.name.replace(' ', '_')}": group.loss for group in self.groups[1:]})
        start = self.groups[0].to_start
        if start is not None:
            curves["eval/difference_to_start"] = start.mean
            if start.interval is not None:
                curves["eval/difference_to_start_low"] = start.interval.low
                curves["eval/difference_to_start_high"] = start.interval.high
        return curves


# --- groups ------------------------------------------------------------------------------------------------------------


def make_groups(panel: Sequence[PanelEntry]) -> list[Group]:
    """All; and where there are several, each set, band of t and resolution."""
    images = {image: number for number, image in enumerate(dict.fromkeys(entry.example.image for entry in panel))}
    num_bands = 1 + max(entry.band for entry in panel)

    def band_name(entry: PanelEntry) -> str:
        digits = max(2, len(str(num_bands)))
        return f"t {entry.band / num_bands:.{digits}f}-{(entry.band + 1) / num_bands:.{digits}f}"

    def group(name: str, entries: Sequence[int], with_best: bool) -> Group:
        return Group(name, tuple(entries), tuple(images[panel[entry].example.image] for entry in entries), with_best)

    groups = [group(ALL, range(len(panel)), True)]
    for name_of, with_best in ((_set_name, True), (band_name, False), (_resolution_name, False)):
        parts = _split(panel, name_of)
        groups += [group(name, entries, with_best) for name, entries in parts.items() if len(parts) > 1]
    return groups


def _split(panel: Sequence[PanelEntry], name_of: Callable[[PanelEntry], str]) -> dict[str, list[int]]:
    parts: dict[str, list[int]] = {}
    for index, entry in enumerate(panel):
        parts.setdefault(name_of(entry), []).append(index)
    return parts


def _set_name(entry: PanelEntry) -> str:
    return f"set {entry.set_name}"


def _resolution_name(entry: PanelEntry) -> str:
    return f"resolution {entry.example.key.rpartition('@')[2]}"


# --- comparing ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Measured:
    """The losses of every entry of a panel at a step, (N,) float64."""

    step: int
    losses: Tensor


def compare(
    now: Measured, earlier: Sequence[Measured], groups: Sequence[Group], *, weights: str, panel: str, seed: int
) -> EvaluationResult:
    """Everything that is told of an evaluation, beside the earlier ones of the same panel, in the order they were made."""
    everything = groups[0]
    own_mean = float(everything.image_losses(now.losses).mean())
    means = [float(everything.image_losses(before.losses).mean()) for before in earlier]
    to_each = differences(everything, now, earlier, seed)
    start = earlier[:1]
    best = [earlier[means.index(min(means))]] if means else []
    results = []
    for group in groups:
        found = differences(group, now, [*start, *(best if group.with_best else [])], seed)
        own = group.image_losses(now.losses)
        to_start, to_best = [*found, None, None][:2]
        results.append(GroupResult(group.name, len(own), float(own.mean()), to_start, to_best))
    return EvaluationResult(
        step=now.step,
        weights=weights,
        panel=panel,
        losses=tuple(now.losses.tolist()),
        groups=tuple(results),
        to_previous=to_each[-1] if to_each else None,
        is_best=all(own_mean < mean for mean in means),
        unchanged_since=unchanged_since(to_each),
    )


def differences(group: Group, now: Measured, earlier: Sequence[Measured], seed: int) -> list[Difference]:
    """To each of some earlier evaluations."""
    if not earlier:
        return []
    own = group.image_losses(now.losses)
    columns = torch.stack([own - group.image_losses(before.losses) for before in earlier], dim=1)
    intervals = statistics.mean_intervals(columns, seed)
    means = columns.mean(0).tolist()
    return [
        Difference(before.step, mean, interval) for before, mean, interval in zip(earlier, means, intervals, strict=True)
    ]


def unchanged_since(to_each: Sequence[Difference]) -> int | None:
    """The earliest step such that no difference to it or a later one is significant; of differences in order of steps."""
    since = None
    for difference in reversed(to_each):
        if difference.interval is None or difference.is_significant:
            break
        since = difference.to_step
    return since


# --- telling -----------------------------------------------------------------------------------------------------------


def describe(result: EvaluationResult) -> str:
    """The evaluation as a table, for the user."""
    everything = result.groups[0]
    title = f"evaluation at step {result.step}" + (" (averaged weights)" if result.weights == "ema" else "")
    header = [title, "images", "loss"]
    start, best = everything.to_start, everything.to_best
    if start is not None and best is not None:
        header.append(f"change since step {start.to_step} (95%)")
        if best.to_step != start.to_step:
            header.append(f"since step {best.to_step}, the best (95%)")
    rows = [header]
    for group in result.groups:
        changes = [told(difference) for difference in (group.to_start, group.to_best)]
        rows.append([f"  {group.name}", str(group.num_images), f"{group.loss:.5f}", *changes][: len(header)])
    widths = [max(len(row[column]) for row in rows) for column in range(len(header))]
    lines = [_aligned(row, widths) for row in rows]
    return "\n".join([*lines, *(f"  {sentence}" for sentence in _verdict(result))])


def told(difference: Difference | None) -> str:
    """A difference with its interval, in words; nothing for none."""
    if difference is None:
        return ""
    interval = difference.interval
    return f"{difference.mean:+.5f}" + ("" if interval is None else f" ({interval.low:+.5f} to {interval.high:+.5f})")


def _aligned(row: Sequence[str], widths: Sequence[int]) -> str:
    cells = [
        cell.rjust(width) if column in (1, 2) else cell.ljust(width) for column, (cell, width) in enumerate(zip(row, widths))
    ]
    return "  ".join(cells).rstrip()


def _verdict(result: EvaluationResult) -> list[str]:
    """What follows from the numbers, in words."""
    previous = result.to_previous
    if previous is None:
        return []
    sentences = []
    if result.groups[0].num_images < statistics.MIN_SAMPLES:
        sentences.append(f"no intervals: it takes at least {statistics.MIN_SAMPLES} images to tell a change from chance")
    elif result.unchanged_since is not None:
        sentences.append(f"no significant change since step {result.unchanged_since}")
    elif previous.is_significant:
        sentences.append(f"significantly {'lower' if previous.mean < 0 else 'higher'} than at step {previous.to_step}")
    if result.is_best:
        sentences.append("the lowest loss so far")
    return sentences


# --- the file ----------------------------------------------------------------------------------------------------------


def to_line(result: EvaluationResult) -> str:
    """A line of evaluations.jsonl; numbers come back from it exactly."""
    table = asdict(result)
    summary = {key: table.pop(key) for key in ("groups", "to_previous", "is_best", "unchanged_since")}
    return json.dumps({**table, "summary": summary}, allow_nan=False) + "\n"


def read_evaluations(path: Path) -> list[EvaluationResult]:
    """The evaluations of a run, in order; none when there is no file. A line that is none ends the list."""
    results: list[EvaluationResult] = []
    if not path.is_file():
        return results
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            results.append(_from_table(json.loads(line)))
        except (ValueError, TypeError, KeyError, AttributeError):  # also a line that somebody has edited
            break
    return results


def keep_until(path: Path, step: int) -> list[EvaluationResult]:
    """Drop the evaluations that a run going on from a step makes anew, and return those left; from step 0, all are."""
    kept = [result for result in read_evaluations(path) if 0 < step and result.step <= step]
    if path.is_file():
        write_text(path, "".join(map(to_line, kept)))
    return kept


def _from_table(table: dict[str, Any]) -> EvaluationResult:
    summary = table.pop("summary")
    groups = [
        GroupResult(**{**group, "to_start": _difference(group["to_start"]), "to_best": _difference(group["to_best"])})
        for group in summary.pop("groups")
    ]
    previous = _difference(summary.pop("to_previous"))
    losses = tuple(table.pop("losses"))
    return EvaluationResult(**table, **summary, losses=losses, groups=tuple(groups), to_previous=previous)


def _difference(table: dict[str, Any] | None) -> Difference | None:
    if table is None:
        return None
    interval = table["interval"]
    return Difference(table["to_step"], table["mean"], None if interval is None else Interval(**interval))
