"""Caching of horizontally flipped images."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tests.utils.data.caching import CachingSetup, FakeFamily, bad_paths, cache_alone, damage_image
from tests.utils.data.image_makers import read_pixels


def test_flipped_latents_are_encoded_from_the_flipped_image(caching: CachingSetup) -> None:
    """Flipped latents would differ: an autoencoder is not equivariant to flips."""
    family = FakeFamily(caching.folder, keep_pixels=True)
    cached = caching.run(family, **caching.flipped())
    assert cached.unusable.bad_files == []
    assert family.counts == (8, 5, 5)
    data, (table,) = cached.data, cached.tables
    for example in table:
        plain, flipped = data.latents(example), data.latents(example, flipped=True)
        assert torch.equal(plain, read_pixels(example.image.path, example.box).float())
        assert torch.equal(flipped, plain.flip(-1))
    assert any(not torch.equal(data.latents(e), data.latents(e, flipped=True)) for e in table)


def test_requesting_flips_later_encodes_only_the_flipped_images(caching: CachingSetup) -> None:
    caching.encode()
    family = FakeFamily(caching.folder)
    caching.run(family, **caching.flipped())
    assert family.counts == (4, 0, 0)
    assert caching.encode() == (0, 0, 0)


def test_without_horizontal_flip_there_are_no_flipped_latents(caching: CachingSetup) -> None:
    cached = caching.run(FakeFamily(caching.folder))
    with pytest.raises(KeyError):
        cached.data.latents(cached.tables[0][0], flipped=True)


def test_an_image_in_training_and_evaluation_is_encoded_once(caching: CachingSetup) -> None:
    """Evaluation never uses the flipped variant."""
    training = caching.examples(**caching.flipped())
    evaluation = training.where(np.ones(len(training), bool), never_flipped=True)
    family = FakeFamily(caching.folder)
    cached = cache_alone(family, [training, evaluation], [], caching.settings)
    assert (family.counts, cached.unusable.bad_files) == ((8, 4, 4), [])
    first, second = (table[0] for table in cached.tables)
    assert (first.may_flip, second.may_flip) == (True, False)
    assert torch.equal(cached.data.latents(first), cached.data.latents(second))


def test_an_image_that_fails_in_both_variants_is_reported_once(caching: CachingSetup) -> None:
    examples = caching.examples(resolutions=[32, 64], **caching.flipped())
    damaged = damage_image(caching.images / "image_001.png")
    missing = caching.images / "image_002.png"
    missing.unlink()
    cached = cache_alone(FakeFamily(caching.folder), [examples], [""], caching.settings)
    assert bad_paths(cached) == [damaged, missing]
