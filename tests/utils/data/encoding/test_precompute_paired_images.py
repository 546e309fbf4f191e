"""The caching pass over masks and control images."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from tests.utils.data.caching import Adapter, Workshop, cache_alone
from tests.utils.data.image_makers import left_half, noise, read_mask, read_pixels, read_size, save
from utils.data.buckets import CropBox
from utils.data.cache.shards import ShardWriter
from utils.data.cache.store import Store
from utils.data.encoding import encoder_pass


@pytest.fixture
def masked(workshop: Workshop) -> dict[str, Any]:
    """The change of the workshop's dataset that gives each image a mask."""
    masks = workshop.folder / "masks"
    masks.mkdir()
    for image in workshop.images.glob("*.png"):
        save(left_half(*read_size(image)), masks / image.name)
    return {"directory": [{"path": workshop.images, "mask_path": masks}]}


@pytest.fixture
def controlled(workshop: Workshop) -> dict[str, Any]:
    """The change that gives each image a control image, and mirrors both."""
    control = workshop.folder / "control"
    control.mkdir()
    for number, image in enumerate(sorted(workshop.images.glob("*.png"))):
        width, height = read_size(image)
        pixels = np.roll(np.asarray(noise(width, height)), number, axis=1)
        save(Image.fromarray(pixels), control / image.name)
    return {"directory": [{"path": workshop.images, "control_path": control, "horizontal_flip": True}]}


def num_cached_masks(workshop: Workshop) -> int:
    return sum(len(Store(folder)) for folder in (workshop.folder / "cache").glob("mask-*"))


# --- masks -------------------------------------------------------------------------------------------------------------


def test_masks_are_read_back_at_the_size_of_latents(workshop: Workshop, masked: dict[str, Any]) -> None:
    cached = workshop.run(Adapter(workshop.folder), **masked)
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


def test_adding_masks_encodes_no_image_and_no_caption(workshop: Workshop, masked: dict[str, Any]) -> None:
    workshop.encode()
    adapter = Adapter(workshop.folder)
    workshop.run(adapter, **masked)
    assert adapter.counts == (0, 0, 0)
    assert num_cached_masks(workshop) == 4 - 1, "the first and the last image have one shape, so equal masks"


def test_editing_a_mask_reads_one_mask_and_encodes_nothing(workshop: Workshop, masked: dict[str, Any]) -> None:
    workshop.run(Adapter(workshop.folder), **masked)
    edited = workshop.folder / "masks" / "image_001.png"
    save(Image.new("L", read_size(edited), 100), edited)
    workshop.forget()
    adapter = Adapter(workshop.folder)
    cached = workshop.run(adapter, **masked)
    assert workshop.asked == [("hash", edited.name), ("mask", edited.name)]
    assert adapter.counts == (0, 0, 0)
    mask = cached.data.mask(cached.tables[0][1])
    assert mask is not None
    assert torch.equal(mask.unique(), torch.tensor([100 / 255]))


def test_editing_a_caption_of_a_masked_image_encodes_one_caption(workshop: Workshop, masked: dict[str, Any]) -> None:
    flipped: dict[str, Any] = {"directory": [{**masked["directory"][0], "horizontal_flip": True}]}
    workshop.run(Adapter(workshop.folder), **flipped)
    before = num_cached_masks(workshop)
    (workshop.images / "image_002.txt").write_text("another caption")
    adapter = Adapter(workshop.folder)
    workshop.run(adapter, **flipped)
    assert adapter.counts == (0, 1, 1)
    assert num_cached_masks(workshop) == before


def test_without_masks_nothing_is_kept_of_any(workshop: Workshop) -> None:
    cached = workshop.run(Adapter(workshop.folder))
    assert cached.data.mask(cached.tables[0][0]) is None
    assert cached.data.mask(cached.tables[0][0], flipped=True) is None
    assert not list((workshop.folder / "cache").glob("mask-*"))


def test_another_downscale_is_another_mask(workshop: Workshop, masked: dict[str, Any]) -> None:
    workshop.run(Adapter(workshop.folder), **masked)
    adapter = Adapter(workshop.folder)
    adapter.latent = replace(adapter.latent, downscale=16)
    cached = workshop.run(adapter, **masked)
    example = cached.tables[0][0]
    mask = cached.data.mask(example)
    assert mask is not None
    assert mask.shape == (1, example.bucket.height // 16, example.bucket.width // 16)


def test_the_images_of_bad_masks_are_named_and_stop_nobody(workshop: Workshop, masked: dict[str, Any]) -> None:
    """Equal masks share an entry; each image is told with its own."""
    masks, images = workshop.folder / "masks", workshop.images
    for index in (0, 3):  # of one shape
        save(Image.new("L", read_size(masks / f"image_00{index}.png"), 0), masks / f"image_00{index}.png")
    examples = workshop.examples(**masked)
    gone = masks / "image_001.png"
    gone.unlink()
    cached = cache_alone(Adapter(workshop.folder), [examples], [""], workshop.settings)
    black = "is black everywhere: nothing of the image would count"
    assert {bad.path: bad.reason for bad in cached.unusable.bad_files} == {
        images / "image_000.png": f"its mask {masks / 'image_000.png'} {black}",
        images / "image_003.png": f"its mask {masks / 'image_003.png'} {black}",
        gone: "cannot be read: No such file or directory",
    }
    assert cached.unusable.examples[0].tolist() == [True, True, False, True]
    assert cached.data.mask(cached.tables[0][2]) is not None


def test_masks_take_the_same_way_to_the_disk(
    workshop: Workshop, masked: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """There is one writer, which a kill cannot make leave half a shard: cache/test_shards.py."""
    written: list[str] = []

    class Noting(ShardWriter):
        def add(self, group: str, key: bytes, tensors: Any) -> None:
            written.append(self.folder.name.partition("-")[0])
            super().add(group, key, tensors)

    monkeypatch.setattr(encoder_pass, "ShardWriter", Noting)
    workshop.run(Adapter(workshop.folder), **masked)
    assert set(written) == {"vae", "mask", "clip_l", "t5xxl"}
    assert written.count("mask") == num_cached_masks(workshop)


# --- control images --------------------------------------------------------------------------------------------------


def pixels(path: Path, box: CropBox, flipped: bool) -> torch.Tensor:
    return read_pixels(path, box, flipped=flipped).float()


@pytest.mark.parametrize("flipped", [False, True])
def test_control_images_are_encoded_as_images_are(workshop: Workshop, controlled: dict[str, Any], flipped: bool) -> None:
    adapter = Adapter(workshop.folder, keep_pixels=True)
    cached = workshop.run(adapter, **controlled)
    assert (adapter.counts, cached.unusable.bad_files) == ((16, 5, 5), [])
    for example in cached.tables[0]:
        assert example.control is not None
        control = cached.data.control(example, flipped=flipped)
        assert control is not None
        assert torch.equal(control, pixels(example.control.path, example.box, flipped))
        latents = cached.data.latents(example, flipped=flipped)
        assert torch.equal(latents, pixels(example.image.path, example.box, flipped))


def test_adding_control_images_encodes_no_image_again(workshop: Workshop, controlled: dict[str, Any]) -> None:
    workshop.run(Adapter(workshop.folder), directory=[{"path": workshop.images, "horizontal_flip": True}])
    adapter = Adapter(workshop.folder)
    workshop.run(adapter, **controlled)
    assert adapter.counts == (8, 0, 0)


def test_a_image_that_is_its_own_control_image_is_encoded_once(workshop: Workshop) -> None:
    control = workshop.folder / "control"
    control.mkdir()
    for image in workshop.images.glob("*.png"):
        (control / image.name).write_bytes(image.read_bytes())
    adapter = Adapter(workshop.folder)
    cached = workshop.run(adapter, directory=[{"path": workshop.images, "control_path": control}])
    assert adapter.counts == (4, 5, 5)
    example = cached.tables[0][0]
    assert torch.equal(cached.data.latents(example), cached.data.control(example))  # type: ignore[arg-type]


def test_without_control_images_there_are_none(workshop: Workshop) -> None:
    cached = workshop.run(Adapter(workshop.folder))
    assert cached.data.control(cached.tables[0][0]) is None


def test_the_image_of_a_bad_control_image_is_named(workshop: Workshop, controlled: dict[str, Any]) -> None:
    examples = workshop.examples(**controlled)
    path = workshop.folder / "control" / "image_001.png"
    content = bytearray(path.read_bytes())
    content[200:240] = bytes(40)
    path.write_bytes(bytes(content))
    cached = cache_alone(Adapter(workshop.folder), [examples], [""], workshop.settings)
    (bad,) = cached.unusable.bad_files
    assert bad.path == workshop.images / "image_001.png"
    assert bad.reason.startswith(f"its control image {path} ")
    assert cached.unusable.examples[0].tolist() == [False, True, False, False]
