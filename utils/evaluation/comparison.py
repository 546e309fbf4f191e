"""Mean losses by group of evaluation points, and whether they differ significantly from those of earlier evaluations.

All evaluations of a run measure the same points, so they are compared point by point. Points of one image, at several t and
resolutions, are not independent samples: the differences of each image are averaged first, and the confidence interval is
computed over images. A mean loss is also a mean over images, so that it changes by exactly the printed difference. There is
no correction for multiple comparisons: of twenty comparisons of equal networks, one is expected to be significant.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from utils.evaluation import statistics
from utils.evaluation.points import EvaluationPoint
from utils.evaluation.results import Difference, EvaluationResult, GroupResult

ALL = "all"


# --- groups ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Group:
    """A subset of the evaluation points."""

    name: str
    points: tuple[int, ...]
    """Indices of the points."""
    images: tuple[int, ...]
    """The number of each point's image."""
    with_best: bool
    """Whether it is also compared with the best earlier evaluation."""

    def image_losses(self, losses: Tensor) -> Tensor:
        """Returns the mean loss of each image of the group, float64, from the losses of all points."""
        return statistics.group_means(losses[list(self.points)], self.images)


def make_groups(points: Sequence[EvaluationPoint]) -> list[Group]:
    """Returns the group of all points, and the groups of each set, timestep bin and resolution if there are several."""
    images = {image: number for number, image in enumerate(dict.fromkeys(point.example.image for point in points))}
    num_bins = 1 + max(point.t_bin for point in points)

    def bin_name(point: EvaluationPoint) -> str:
        digits = max(2, len(str(num_bins)))
        return f"t {point.t_bin / num_bins:.{digits}f}-{(point.t_bin + 1) / num_bins:.{digits}f}"

    def group(name: str, indices: Sequence[int], with_best: bool) -> Group:
        return Group(name, tuple(indices), tuple(images[points[index].example.image] for index in indices), with_best)

    groups = [group(ALL, range(len(points)), True)]
    for name_of, with_best in ((_set_name, True), (bin_name, False), (_resolution_name, False)):
        parts = _split(points, name_of)
        groups += [group(name, indices, with_best) for name, indices in parts.items() if len(parts) > 1]
    return groups


def _split(points: Sequence[EvaluationPoint], name_of: Callable[[EvaluationPoint], str]) -> dict[str, list[int]]:
    parts: dict[str, list[int]] = {}
    for index, point in enumerate(points):
        parts.setdefault(name_of(point), []).append(index)
    return parts


def _set_name(point: EvaluationPoint) -> str:
    return f"set {point.set_name}"


def _resolution_name(point: EvaluationPoint) -> str:
    return f"resolution {point.example.key.rpartition('@')[2]}"


# --- comparison --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Measurement:
    """The losses at all evaluation points at one step, (N,) float64."""

    step: int
    losses: Tensor


def compare(
    now: Measurement, earlier: Sequence[Measurement], groups: Sequence[Group], *, weights: str, fingerprint: str, seed: int
) -> EvaluationResult:
    """Returns the result of an evaluation, compared with the earlier ones of the same points, which are in order."""
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
        fingerprint=fingerprint,
        losses=tuple(now.losses.tolist()),
        groups=tuple(results),
        to_previous=to_each[-1] if to_each else None,
        is_best=all(own_mean < mean for mean in means),
        unchanged_since=unchanged_since(to_each),
    )


def differences(group: Group, now: Measurement, earlier: Sequence[Measurement], seed: int) -> list[Difference]:
    """Returns the differences of `now` to each of some earlier evaluations."""
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
    """Returns the earliest step such that no difference to it or to a later step is significant.

    `to_each`: differences to all earlier evaluations, in the order of their steps.
    """
    since = None
    for difference in reversed(to_each):
        if difference.interval is None or difference.is_significant:
            break
        since = difference.to_step
    return since
