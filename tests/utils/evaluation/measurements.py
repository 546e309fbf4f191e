"""Evaluation points and measurements for the tests of utils/evaluation."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from utils.data.examples import Example
from utils.evaluation.comparison import Group, Measurement, compare
from utils.evaluation.points import EvaluationPoint, make_points
from utils.evaluation.results import EvaluationResult

SEED = 5
NUM_BINS = 4


def no_shift(num_pixels: int) -> float:
    return 1.0


def points_of(examples: Sequence[Example], num_bins: int = NUM_BINS, seed: int = SEED) -> list[EvaluationPoint]:
    return make_points({"holdout": examples}, num_bins, seed, no_shift)


def losses(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


TWO_EACH = Group("all", tuple(range(12)), (0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5), with_best=True)
"""Six images with two points each."""
BASE = losses(*(1.0 + index / 16 for index in range(12)))


def measured(step: int, change: Sequence[float]) -> Measurement:
    """The losses BASE, with the mean of each of the six images changed by this much; its two points differ by 1 more."""
    both = [value for part in change for value in (part + 0.5, part - 0.5)]
    return Measurement(step, BASE + losses(*both))


def compared(now: Measurement, *earlier: Measurement) -> EvaluationResult:
    return compare(now, earlier, [TWO_EACH], weights="last", fingerprint="abc", seed=SEED)
