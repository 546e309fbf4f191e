"""Masks: same geometry as their images, exact values, and errors for invalid files."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from tests.utils.data.image_makers import TURNS, left_half, read_mask, read_pixels, save, save_turned, uncropped
from utils.data.buckets import Bucket, crop_box
from utils.data.encoding.masks import MaskEncoder
from utils.data.sources.decoding import BadFile

DOWNSCALE = 8
BUCKETS = [Bucket(32, 32), Bucket(48, 16), Bucket(16, 48), Bucket(64, 32), Bucket(16, 16)]
SIZES = [(96, 64), (64, 96), (50, 37), (37, 113), (40, 40), (11, 7), (1, 1), (301, 200)]


def grey_noise(width: int, height: int) -> np.ndarray:
    return np.random.default_rng(0).integers(256, size=(height, width), dtype=np.uint8)


def mask_from(pixels: np.ndarray | Image.Image, folder: Path, bucket: Bucket, downscale: int = DOWNSCALE) -> Tensor:
    """Returns a mask of the size of its image after crop and scaling."""
    image = pixels if isinstance(pixels, Image.Image) else Image.fromarray(pixels)
    return read_mask(save(image, folder / "mask.png"), crop_box(*image.size, bucket), downscale)


# --- geometry ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("orientation", TURNS)
@pytest.mark.parametrize("bucket", BUCKETS)
@pytest.mark.parametrize("size", [(96, 64), (64, 96), (40, 40)])
def test_a_mask_of_the_left_half_covers_the_left_half_of_every_bucket(
    tmp_path: Path, orientation: int, bucket: Bucket, size: tuple[int, int]
) -> None:
    path = save_turned(left_half(*size), tmp_path / "mask.png", orientation)
    mask = read_mask(path, crop_box(*size, bucket), DOWNSCALE)
    assert mask.shape == (1, bucket.height // DOWNSCALE, bucket.width // DOWNSCALE)
    assert mask.dtype == torch.float32
    middle = mask.shape[-1] // 2
    assert (mask[..., :middle] == 1).all()
    assert (mask[..., middle:] == 0).all()


@pytest.mark.parametrize("image_orientation", [1, 3, 6])
@pytest.mark.parametrize("mask_orientation", [1, 5, 8])
@pytest.mark.parametrize("bucket", BUCKETS)
def test_a_mask_is_aligned_with_its_image(
    tmp_path: Path, image_orientation: int, mask_orientation: int, bucket: Bucket
) -> None:
    """The image itself serves as mask, with another orientation and size: both must give the same result."""
    painted = np.zeros((134, 202), dtype=np.uint8)
    painted[25:97, 40:120] = 255
    painted[60:, 150:] = 128
    image = Image.fromarray(painted)
    image_path = save_turned(image.convert("RGB"), tmp_path / "image.png", image_orientation)
    smaller = image.resize((101, 67), Image.Resampling.BOX)
    mask = save_turned(smaller, tmp_path / "mask.png", mask_orientation)
    box = crop_box(202, 134, bucket)
    pixels = read_pixels(image_path, box)[:1].float() / 255
    expected = torch.nn.functional.avg_pool2d(pixels, DOWNSCALE)
    assert torch.allclose(read_mask(mask, box, DOWNSCALE), expected, atol=0.05), "LANCZOS blurs edges slightly"


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("mask_size", [None, (13, 9), (120, 80)])
@pytest.mark.parametrize("bucket", BUCKETS[:3])
@pytest.mark.parametrize("place", [None, 0.9])
def test_each_value_is_the_exact_mean_of_its_area(
    tmp_path: Path, size: tuple[int, int], mask_size: tuple[int, int] | None, bucket: Bucket, place: float | None
) -> None:
    """The reference repeats every pixel until each scaled pixel is the mean of a whole number of repeats."""
    grey = grey_noise(*(mask_size or size))
    box = crop_box(*size, bucket, place)
    mask = read_mask(save(Image.fromarray(grey), tmp_path / "mask.png"), box, DOWNSCALE)

    def scaled(values: np.ndarray, length: int) -> np.ndarray:
        return np.repeat(values, length, axis=0).reshape(length, len(values), -1).mean(axis=1)

    resized = scaled(scaled(grey.astype(np.float64), box.resized_height).T, box.resized_width).T
    rows, columns = bucket.height // DOWNSCALE, bucket.width // DOWNSCALE
    cropped = resized[box.top : box.top + bucket.height, box.left : box.left + bucket.width]
    means = cropped.reshape(rows, DOWNSCALE, columns, DOWNSCALE).mean(axis=(1, 3))
    assert torch.allclose(mask[0].double(), torch.from_numpy(means / 255), rtol=0, atol=1e-7)


def test_a_partly_covered_latent_pixel_has_the_covered_fraction(tmp_path: Path) -> None:
    """Scaling 7 pixels to 16 puts an edge between two pixels of the file inside a latent pixel."""
    pixels = np.zeros((7, 7), dtype=np.uint8)
    pixels[:, :2] = 255
    mask = mask_from(pixels, tmp_path, Bucket(16, 16))
    assert mask[0, 0].tolist() == pytest.approx([float(Fraction(4, 7)), 0.0], abs=1e-7)


# --- values ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("grey", [1, 64, 128, 254, 255])
@pytest.mark.parametrize("size", SIZES)
def test_grey_is_the_value_divided_by_255(tmp_path: Path, grey: int, size: tuple[int, int]) -> None:
    mask = mask_from(np.full(size[::-1], grey, dtype=np.uint8), tmp_path, Bucket(48, 16))
    assert torch.equal(mask, torch.full((1, 2, 6), grey / 255))


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("bucket", BUCKETS)
def test_values_stay_in_zero_to_one(tmp_path: Path, size: tuple[int, int], bucket: Bucket) -> None:
    pixels = (grey_noise(*size) > 127).astype(np.uint8) * 255
    pixels[size[1] // 2, size[0] // 2] = 255
    mask = mask_from(pixels, tmp_path, bucket, 1)
    assert mask.min() >= 0
    assert mask.max() <= 1


def test_16_bit_masks_are_scaled_by_their_range(tmp_path: Path) -> None:
    mask = mask_from(np.full((32, 32), 257 * 128, dtype=np.uint16), tmp_path, Bucket(32, 32))
    assert torch.equal(mask, torch.full((1, 4, 4), 128 / 255))


@pytest.mark.parametrize("mode", ["1", "L", "P", "RGB", "CMYK"])
def test_black_and_white_are_read_equally_in_every_mode(tmp_path: Path, mode: str) -> None:
    path = save(left_half(32, 32).convert(mode), tmp_path / "mask.tif")
    assert read_mask(path, uncropped(32, 32), DOWNSCALE)[0, 0].tolist() == [1, 1, 0, 0]


def test_palette_images_are_read_by_colour(tmp_path: Path) -> None:
    image = left_half(32, 32).convert("P")
    palette = [0, 0, 0] * 256
    palette[255 * 3 :] = [51, 51, 51]
    image.putpalette(palette)
    assert mask_from(image, tmp_path, Bucket(32, 32))[0, 0].tolist() == pytest.approx([0.2, 0.2, 0, 0])


def test_transparency_is_read_as_white(tmp_path: Path) -> None:
    image = Image.new("LA", (32, 32), (0, 255))
    image.paste((0, 0), (0, 0, 16, 32))
    assert mask_from(image, tmp_path, Bucket(32, 32))[0, 0].tolist() == [1, 1, 0, 0]


def test_a_black_mask_is_rejected(tmp_path: Path) -> None:
    with pytest.raises(BadFile) as caught:
        mask_from(np.zeros((37, 50), dtype=np.uint8), tmp_path, Bucket(32, 32))
    assert caught.value.reason == "is black everywhere: no pixel of the image would be trained on"


def test_a_mask_that_is_black_inside_the_crop_is_rejected(tmp_path: Path) -> None:
    pixels = np.zeros((40, 120), dtype=np.uint8)
    pixels[:, :40] = 255
    with pytest.raises(BadFile, match="is black inside the crop to 32x32: no pixel of the image would be trained on"):
        mask_from(pixels, tmp_path, Bucket(32, 32))
    assert mask_from(pixels, tmp_path, Bucket(96, 32)).any()


def test_a_file_that_is_not_an_image_is_rejected(tmp_path: Path) -> None:
    (tmp_path / "mask.png").write_bytes(b"not an image")
    with pytest.raises(BadFile, match="is not an image Pillow can read"):
        read_mask(tmp_path / "mask.png", uncropped(32, 32), DOWNSCALE)


# --- in the cache ------------------------------------------------------------------------------------------------------


def test_a_mask_is_cached_unchanged() -> None:
    encoder = MaskEncoder(DOWNSCALE)
    mask = torch.rand(1, 4, 4)
    assert encoder.load(torch.device("cpu"))([mask]) == [{"mask": mask}]
    assert encoder.settings["downscale"] == DOWNSCALE
    assert encoder.files == ()
