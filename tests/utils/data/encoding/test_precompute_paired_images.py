"""Caching of masks and control images."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from tests.utils.data.caching import CachingSetup, FakeFamily, cache_alone
from tests.utils.data.image_makers import left_half, noise, read_mask, read_pixels, read_size, save
from utils.data.buckets import CropBox
from utils.data.cache.shards import ShardWriter
from utils.data.cache.store import Store
from utils.data.encoding import encoder_loop


@pytest.fixture
def masked(caching: CachingSetup) -> dict[str, Any]:
    """The change of the dataset that gives each image a mask."""
    masks = caching.folder / "masks"
    masks.mkdir()
    for image in caching.images.glob("*.png"):
        save(left_half(*read_size(image)), masks / image.name)
    return {"directory": [{"path": caching.images, "mask_path": masks}]}


@pytest.fixture
def controlled(caching: CachingSetup) -> dict[str, Any]:
    """The change of the dataset that gives each image a control image and requests horizontal flips."""
    control = caching.folder / "control"
    control.mkdir()
    for number, image in enumerate(sorted(caching.images.glob("*.png"))):
        width, height = read_size(image)
        pixels = np.roll(np.asarray(noise(width, height)), number, axis=1)
        save(Image.fromarray(pixels), control / image.name)
    return {"directory": [{"path": caching.images, "control_path": control, "horizontal_flip": True}]}


def num_cached_masks(caching: CachingSetup) -> int:
    return sum(len(Store(folder)) for folder in (caching.folder / "cache").glob("mask-*"))


# --- masks -------------------------------------------------------------------------------------------------------------


def test_cached_masks_have_the_size_of_the_latents(caching: CachingSetup, masked: dict[str, Any]) -> None:
    cached = caching.run(FakeFamily(caching.folder), **masked)
    assert cached.unusable.bad_files == []
    for example in cached.tables[0]:
        mask = cached.data.mask(example)
        assert mask is not None
        assert mask.dtype == torch.float32
        assert mask.shape == (1, example.bucket.height // 8, example.bucket.width // 8)
        assert example.mask is not None
        assert torch.equal(mask, read_mask(example.mask.path, example.box, 8))
        flipped = cached.data.mask(example, flipped=True)
        assert flipped is not None
        assert torch.equal(flipped, mask.flip(-1))
        assert not torch.equal(flipped, mask)


def test_adding_masks_encodes_no_image_and_no_caption(caching: CachingSetup, masked: dict[str, Any]) -> None:
    caching.encode()
    family = FakeFamily(caching.folder)
    caching.run(family, **masked)
    assert family.counts == (0, 0, 0)
    assert num_cached_masks(caching) == 4 - 1, "the first and the last image have the same size and so equal masks"


def test_editing_a_mask_reads_one_mask_and_encodes_nothing(caching: CachingSetup, masked: dict[str, Any]) -> None:
    caching.run(FakeFamily(caching.folder), **masked)
    edited = caching.folder / "masks" / "image_001.png"
    save(Image.new("L", read_size(edited), 100), edited)
    caching.clear_requests()
    family = FakeFamily(caching.folder)
    cached = caching.run(family, **masked)
    assert caching.requests == [("hash", edited.name), ("mask", edited.name)]
    assert family.counts == (0, 0, 0)
    mask = cached.data.mask(cached.tables[0][1])
    assert mask is not None
    assert torch.equal(mask.unique(), torch.tensor([100 / 255]))


def test_editing_a_caption_of_a_masked_image_encodes_one_caption(caching: CachingSetup, masked: dict[str, Any]) -> None:
    flipped: dict[str, Any] = {"directory": [{**masked["directory"][0], "horizontal_flip": True}]}
    caching.run(FakeFamily(caching.folder), **flipped)
    before = num_cached_masks(caching)
    (caching.images / "image_002.txt").write_text("another caption")
    family = FakeFamily(caching.folder)
    caching.run(family, **flipped)
    assert family.counts == (0, 1, 1)
    assert num_cached_masks(caching) == before


def test_without_masks_none_are_cached(caching: CachingSetup) -> None:
    cached = caching.run(FakeFamily(caching.folder))
    assert cached.data.mask(cached.tables[0][0]) is None
    assert cached.data.mask(cached.tables[0][0], flipped=True) is None
    assert not list((caching.folder / "cache").glob("mask-*"))


def test_another_downscale_has_separate_masks(caching: CachingSetup, masked: dict[str, Any]) -> None:
    caching.run(FakeFamily(caching.folder), **masked)
    family = FakeFamily(caching.folder)
    family.latent = replace(family.latent, downscale=16)
    cached = caching.run(family, **masked)
    example = cached.tables[0][0]
    mask = cached.data.mask(example)
    assert mask is not None
    assert mask.shape == (1, example.bucket.height // 16, example.bucket.width // 16)


def test_images_with_bad_masks_are_reported_and_the_rest_is_encoded(caching: CachingSetup, masked: dict[str, Any]) -> None:
    """Equal masks share an entry; each image is reported with its own mask file."""
    masks, images = caching.folder / "masks", caching.images
    for index in (0, 3):  # of the same size
        save(Image.new("L", read_size(masks / f"image_00{index}.png"), 0), masks / f"image_00{index}.png")
    examples = caching.examples(**masked)
    missing = masks / "image_001.png"
    missing.unlink()
    cached = cache_alone(FakeFamily(caching.folder), [examples], [""], caching.settings)
    black = "is black everywhere: no pixel of the image would be trained on"
    assert {bad.path: bad.reason for bad in cached.unusable.bad_files} == {
        images / "image_000.png": f"its mask {masks / 'image_000.png'} {black}",
        images / "image_003.png": f"its mask {masks / 'image_003.png'} {black}",
        missing: "cannot be read: No such file or directory",
    }
    assert cached.unusable.examples[0].tolist() == [True, True, False, True]
    assert cached.data.mask(cached.tables[0][2]) is not None


def test_masks_are_written_by_the_same_writer_as_latents(
    caching: CachingSetup, masked: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """tests/utils/data/cache/test_shards.py shows that this writer never leaves an incomplete shard."""
    written: list[str] = []

    class Recording(ShardWriter):
        def add(self, group: str, key: bytes, tensors: Any) -> None:
            written.append(self.folder.name.partition("-")[0])
            super().add(group, key, tensors)

    monkeypatch.setattr(encoder_loop, "ShardWriter", Recording)
    caching.run(FakeFamily(caching.folder), **masked)
    assert set(written) == {"vae", "mask", "clip_l", "t5xxl"}
    assert written.count("mask") == num_cached_masks(caching)


# --- control images --------------------------------------------------------------------------------------------------


def pixels(path: Path, box: CropBox, flipped: bool) -> torch.Tensor:
    return read_pixels(path, box, flipped=flipped).float()


@pytest.mark.parametrize("flipped", [False, True])
def test_control_images_are_encoded_like_images(caching: CachingSetup, controlled: dict[str, Any], flipped: bool) -> None:
    family = FakeFamily(caching.folder, keep_pixels=True)
    cached = caching.run(family, **controlled)
    assert (family.counts, cached.unusable.bad_files) == ((16, 5, 5), [])
    for example in cached.tables[0]:
        assert example.control is not None
        control = cached.data.control(example, flipped=flipped)
        assert control is not None
        assert torch.equal(control, pixels(example.control.path, example.box, flipped))
        latents = cached.data.latents(example, flipped=flipped)
        assert torch.equal(latents, pixels(example.image.path, example.box, flipped))


def test_adding_control_images_encodes_no_image_again(caching: CachingSetup, controlled: dict[str, Any]) -> None:
    caching.run(FakeFamily(caching.folder), directory=[{"path": caching.images, "horizontal_flip": True}])
    family = FakeFamily(caching.folder)
    caching.run(family, **controlled)
    assert family.counts == (8, 0, 0)


def test_an_image_that_is_its_own_control_image_is_encoded_once(caching: CachingSetup) -> None:
    control = caching.folder / "control"
    control.mkdir()
    for image in caching.images.glob("*.png"):
        (control / image.name).write_bytes(image.read_bytes())
    family = FakeFamily(caching.folder)
    cached = caching.run(family, directory=[{"path": caching.images, "control_path": control}])
    assert family.counts == (4, 5, 5)
    example = cached.tables[0][0]
    assert torch.equal(cached.data.latents(example), cached.data.control(example))  # type: ignore[arg-type]


def test_without_control_image_there_are_no_control_latents(caching: CachingSetup) -> None:
    cached = caching.run(FakeFamily(caching.folder))
    assert cached.data.control(cached.tables[0][0]) is None


def test_the_image_of_a_bad_control_image_is_reported(caching: CachingSetup, controlled: dict[str, Any]) -> None:
    examples = caching.examples(**controlled)
    path = caching.folder / "control" / "image_001.png"
    content = bytearray(path.read_bytes())
    content[200:240] = bytes(40)
    path.write_bytes(bytes(content))
    cached = cache_alone(FakeFamily(caching.folder), [examples], [""], caching.settings)
    (bad,) = cached.unusable.bad_files
    assert bad.path == caching.images / "image_001.png"
    assert bad.reason.startswith(f"its control image {path} ")
    assert cached.unusable.examples[0].tolist() == [False, True, False, False]
