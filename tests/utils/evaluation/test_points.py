"""utils/evaluation/points.py: timestep bins, random draws, fingerprint and batches of evaluation points."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tests.utils.evaluation.measurements import NUM_BINS, SEED, no_shift, points_of
from utils import randomness
from utils.data.examples import Example
from utils.data.sources.image_files import ImageFile
from utils.evaluation.points import fingerprint, make_points, make_rounds, noise_of


def test_every_image_has_one_t_inside_every_bin(examples: list[Example]) -> None:
    points = points_of(examples)
    assert [(point.example.key, point.t_bin) for point in points] == [
        (example.key, t_bin) for example in examples for t_bin in range(NUM_BINS)
    ]
    assert all(point.t_bin < NUM_BINS * point.t < point.t_bin + 1 for point in points)
    assert len({point.t for point in points}) == len(points)


def test_t_is_uniform_within_its_bin(tiny_dataset: Path, examples: list[Example]) -> None:
    many = [replace(examples[0], key=f"{number}@32") for number in range(2000)]
    places = torch.tensor([4 * point.t - point.t_bin for point in points_of(many) if point.t_bin == 2]).sort().values
    assert (places - (torch.arange(2000) + 0.5) / 2000).abs().max() < 1.63 / 2000**0.5


def test_the_points_are_a_function_of_their_arguments(examples: list[Example]) -> None:
    assert points_of(examples) == points_of(examples)
    other = points_of(examples, seed=SEED + 1)
    assert not {point.t for point in points_of(examples)} & {point.t for point in other}


def test_adding_an_image_does_not_change_the_points_of_others(examples: list[Example]) -> None:
    fewer, more = points_of(examples[2:]), points_of(examples)
    assert fewer == more[2 * NUM_BINS :]
    assert points_of(list(reversed(examples)))[-NUM_BINS:] == more[:NUM_BINS]
    sets = {"other": examples[:2], "holdout": examples[2:]}
    joined = make_points(sets, NUM_BINS, SEED, no_shift)
    assert joined[2 * NUM_BINS :] == fewer
    assert {point.set_name for point in joined[: 2 * NUM_BINS]} == {"other"}


def test_sigma_is_t_shifted_for_the_size_of_the_image(examples: list[Example]) -> None:
    points = make_points({"holdout": examples}, 2, SEED, lambda num_pixels: 3.0 if num_pixels > 1500 else 1.0)
    assert {point.example.bucket.width * point.example.bucket.height > 1500 for point in points} == {True, False}
    for point in points:
        large = point.example.bucket.width * point.example.bucket.height > 1500
        assert point.sigma == pytest.approx(3 * point.t / (1 + 2 * point.t) if large else point.t, rel=1e-15)


def test_repeats_add_points_with_their_own_noise_and_t(examples: list[Example]) -> None:
    points = points_of([replace(examples[0], repeats=3), examples[1]])
    assert [(point.repeat, point.t_bin) for point in points[:-NUM_BINS]] == [
        (repeat, t_bin) for repeat in range(3) for t_bin in range(NUM_BINS)
    ]
    noises = [noise_of(point, (2, 3), SEED) for point in points]
    assert len({tuple(noise.flatten().tolist()) for noise in noises}) == len(points)
    assert len({point.t for point in points}) == len(points)
    assert points[:NUM_BINS] == points_of([replace(examples[0], repeats=3)])[:NUM_BINS]


def test_t_and_noise_are_drawn_for_separate_purposes(examples: list[Example]) -> None:
    (point, *_) = points_of(examples[:1], num_bins=1)
    assert point.t == randomness.uniform(SEED, "evaluation time", point.example.key, 0, 0)
    expected = randomness.normal(SEED, "evaluation noise", point.example.key, 0, 0, shape=(2, 2))
    assert torch.equal(noise_of(point, (2, 2), SEED), expected)


def test_examples_with_equal_keys_are_rejected(examples: list[Example]) -> None:
    with pytest.raises(AssertionError, match="share keys"):
        make_points({"one": examples[:1], "two": examples[:1]}, 1, SEED, no_shift)


def no_contents(_example: Example) -> list[str]:
    return []


def test_fingerprint_depends_on_everything_that_is_measured_but_not_on_paths(examples: list[Example]) -> None:
    first = examples[0]
    same = fingerprint(points_of(examples), no_contents)
    moved = [replace(example, image=ImageFile(Path("/elsewhere") / example.image.path.name)) for example in examples]
    assert fingerprint(points_of(moved), no_contents) == same
    others = [
        fingerprint(points_of(examples[1:]), no_contents),
        fingerprint(points_of([*examples[1:], first]), no_contents),
        fingerprint(points_of([replace(first, captions=("another",)), *examples[1:]]), no_contents),
        fingerprint(points_of([replace(first, box=examples[-1].box), *examples[1:]]), no_contents),
        fingerprint(points_of([replace(first, mask=ImageFile(Path("mask.png"))), *examples[1:]]), no_contents),
        fingerprint(
            points_of(examples), lambda example: [str(example.key == first.key)]
        ),  # the content of one file has changed
        fingerprint(points_of(examples, num_bins=3), no_contents),
        fingerprint(points_of(examples, seed=SEED + 1), no_contents),
        fingerprint(make_points({"holdout": examples}, NUM_BINS, SEED, lambda _: 3.0), no_contents),
        fingerprint(make_points({"other": examples}, NUM_BINS, SEED, no_shift), no_contents),
    ]
    assert len({same, *others}) == len(others) + 1


# --- batches -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch_size", [1, 3, 5, 100])
@pytest.mark.parametrize("at_once", [1, 2, 8])
def test_every_point_is_in_one_batch_of_one_shape(examples: list[Example], batch_size: int, at_once: int) -> None:
    points = points_of(examples)
    rounds = make_rounds(points, batch_size, at_once)
    batches = [batch for batches in rounds for batch in batches]
    assert sorted(index for batch in batches for index in batch) == list(range(len(points)))
    for together in rounds:
        assert 1 <= len(together) <= at_once
        assert len({(len(batch), points[index].example.bucket) for batch in together for index in batch}) == 1
    assert sorted(batches) == sorted(batch for batches in make_rounds(points, batch_size, 4) for batch in batches)
    assert max(len(batch) for batch in batches) <= batch_size


def test_the_last_batch_of_a_bucket_is_partial(examples: list[Example]) -> None:
    square = [example for example in examples if str(example.bucket) == "32x32"]
    rounds = make_rounds(points_of(square, num_bins=3), 4, 2)
    assert [[len(batch) for batch in batches] for batches in rounds] == [[4, 4], [1]]
