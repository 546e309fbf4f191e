"""What evaluation measures: a fixed list of (image, noise, time), drawn once from the seed. Pure.

Times are stratified: (0, 1) is cut into equal bands, and each image is measured once in each, at a time of its own. All
of (0, 1) is covered whatever the run's densities, weights, min_t and max_t, so that runs with different objectives can be
compared. Every draw's key names the image, so one more image changes nothing for the others.
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
class PanelEntry:
    """One measurement."""

    example: Example
    set_name: str
    repeat: int
    """Below the example's `repeats`: more noise and times for one image, so a more exact measurement of it."""
    band: int
    """Below num_t_bands; the first is nearest to the data."""
    t: float
    sigma: float


def make_panel(
    sets: Mapping[str, Sequence[Example]], num_t_bands: int, seed: int, shift_at: Callable[[int], float]
) -> list[PanelEntry]:
    """Every example of every set, in order; `shift_at` tells the shift for a number of pixels.

    Keys of examples must differ, also between sets: they name the draws.
    """
    keys = [example.key for examples in sets.values() for example in examples]
    assert len(set(keys)) == len(keys), "examples share keys"
    return [
        _entry(example, set_name, repeat, band, num_t_bands, seed, shift_at)
        for set_name, examples in sets.items()
        for example in examples
        for repeat in range(round(example.repeats))
        for band in range(num_t_bands)
    ]


def _entry(
    example: Example,
    set_name: str,
    repeat: int,
    band: int,
    num_t_bands: int,
    seed: int,
    shift_at: Callable[[int], float],
) -> PanelEntry:
    t = (band + randomness.uniform(seed, "evaluation time", example.key, repeat, band)) / num_t_bands
    shift = shift_at(example.bucket.width * example.bucket.height)
    sigma = float(rectified_flow.shift_time(torch.tensor(t, dtype=torch.float64), shift))
    return PanelEntry(example, set_name, repeat, band, t, sigma)


def noise_of(entry: PanelEntry, shape: tuple[int, ...], seed: int) -> Tensor:
    """The entry's noise, float32."""
    return randomness.normal(seed, "evaluation noise", entry.example.key, entry.repeat, entry.band, shape=shape)


def fingerprint(panel: Sequence[PanelEntry], contents: Callable[[Example], Sequence[str]]) -> str:
    """Twelve hexadecimal digits of what is measured: names, captions, crops and times, and what `contents` names for an
    example: what is in its image, mask and caption. Where files lie does not count."""
    digest = hashlib.blake2b(digest_size=6)
    for entry in panel:
        example = entry.example
        image = (entry.set_name, example.key, example.caption(), example.box.key(), example.mask is not None)
        digest.update(repr((image, *contents(example), entry.repeat, entry.t, entry.sigma)).encode())
    return digest.hexdigest()


def make_rounds(panel: Sequence[PanelEntry], batch_size: int, batches_at_once: int) -> list[list[list[int]]]:
    """Places in the panel as batches of one bucket, and these as rounds of batches of one shape.

    A bucket's last batch is as small as it must be: nothing is left out or filled up. Which batch an entry is in does not
    depend on batches_at_once, so neither does its loss.
    """
    buckets: dict[Bucket, list[int]] = {}
    for index, entry in enumerate(panel):
        buckets.setdefault(entry.example.bucket, []).append(index)
    rounds = []
    for _, members in sorted(buckets.items()):
        batches = [members[start : start + batch_size] for start in range(0, len(members), batch_size)]
        partial = [batches.pop()] if len(batches[-1]) < batch_size else []
        rounds += [batches[start : start + batches_at_once] for start in range(0, len(batches), batches_at_once)]
        rounds += [partial] if partial else []
    return rounds
