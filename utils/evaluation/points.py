"""Evaluation points: the fixed list of (image, noise, t) at which a run is evaluated, drawn once from the seed. Pure.

t is stratified: (0, 1) is divided into equal timestep bins, and each image is evaluated once in each bin, at a t of its own.
The bins cover (0, 1) whatever the run's density, weight, min_t and max_t, so that runs with different objectives can be
compared. The key of every random draw contains the key of the image, so adding an image does not change other points.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from utils import randomness
from utils.data.buckets import Bucket
from utils.data.examples import Example
from utils.objective import rectified_flow


@dataclass(frozen=True, slots=True)
class EvaluationPoint:
    """One measurement: an image with a noise and a t."""

    example: Example
    set_name: str
    repeat: int
    """From 0 to the example's `repeats` - 1. Each repeat has its own noise and t, for a more precise mean of the image."""
    t_bin: int
    """From 0, the bin closest to the data, to the number of bins - 1."""
    t: float
    sigma: float


def make_points(
    sets: Mapping[str, Sequence[Example]], num_bins: int, seed: int, shift_at: Callable[[int], float]
) -> list[EvaluationPoint]:
    """Returns the points of every example of every set, in order. `shift_at` maps a number of pixels to the shift.

    Keys of examples must be unique, also across sets: the random draws depend on them.
    """
    keys = [example.key for examples in sets.values() for example in examples]
    assert len(set(keys)) == len(keys), "examples share keys"
    return [
        EvaluationPoint(example, set_name, repeat, t_bin, *_t_and_sigma(example, repeat, t_bin, num_bins, seed, shift_at))
        for set_name, examples in sets.items()
        for example in examples
        for repeat in range(round(example.repeats))
        for t_bin in range(num_bins)
    ]


def _t_and_sigma(
    example: Example, repeat: int, t_bin: int, num_bins: int, seed: int, shift_at: Callable[[int], float]
) -> tuple[float, float]:
    t = (t_bin + randomness.uniform(seed, "evaluation time", example.key, repeat, t_bin)) / num_bins
    shift = shift_at(example.bucket.width * example.bucket.height)
    return t, float(rectified_flow.shift_time(torch.tensor(t, dtype=torch.float64), shift))


def noise_of(point: EvaluationPoint, shape: tuple[int, ...], seed: int) -> Tensor:
    """Returns the noise of the point, float32."""
    return randomness.normal(seed, "evaluation noise", point.example.key, point.repeat, point.t_bin, shape=shape)


def fingerprint(points: Sequence[EvaluationPoint], contents: Callable[[Example], Sequence[str]]) -> str:
    """Returns twelve hexadecimal digits that identify what is evaluated: names, captions, crops, t and sigma of all points.

    `contents` returns the content keys of an example's image, mask and captions. Paths are not included.
    """
    digest = hashlib.blake2b(digest_size=6)
    for point in points:
        example = point.example
        image = (point.set_name, example.key, example.caption(), example.box.key(), example.mask is not None)
        digest.update(repr((image, *contents(example), point.repeat, point.t, point.sigma)).encode())
    return digest.hexdigest()


def make_rounds(points: Sequence[EvaluationPoint], batch_size: int, batches_per_round: int) -> list[list[list[int]]]:
    """Groups indices of points into batches of one bucket, and batches of one shape into rounds: one forward pass each.

    The last batch of a bucket may be smaller: no point is skipped or repeated. The batch of a point does not depend on
    `batches_per_round`, so neither does its loss.
    """
    buckets: dict[Bucket, list[int]] = {}
    for index, point in enumerate(points):
        buckets.setdefault(point.example.bucket, []).append(index)
    rounds = []
    for _, members in sorted(buckets.items()):
        batches = [members[start : start + batch_size] for start in range(0, len(members), batch_size)]
        partial = [batches.pop()] if len(batches[-1]) < batch_size else []
        rounds += [batches[start : start + batches_per_round] for start in range(0, len(batches), batches_per_round)]
        rounds += [partial] if partial else []
    return rounds
