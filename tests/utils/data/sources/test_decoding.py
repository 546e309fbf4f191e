"""Decoding of every kind of image file, and detection of every kind of broken one."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps, PngImagePlugin

from tests.utils.data.image_makers import (
    QUARTERS,
    RED,
    TURNS,
    WHITE,
    corners,
    noise,
    quarters,
    read_pixels,
    read_size,
    save,
    save_turned,
    uncropped,
)
from utils.data.buckets import Bucket, crop_box
from utils.data.sources import decoding
from utils.data.sources.decoding import BadFile
from utils.data.sources.image_files import ImageFile


def near(colours: list[tuple[int, ...]], expected: tuple[tuple[int, ...], ...], tolerance: int = 6) -> bool:
    return bool(np.abs(np.array(colours) - np.array(expected)).max() <= tolerance)


# --- orientation -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", ["jpg", "png", "webp"])
@pytest.mark.parametrize("orientation", TURNS)
def test_exif_orientation_is_undone(tmp_path: Path, orientation: int, suffix: str) -> None:
    options = {"quality": 100, "subsampling": 0} if suffix == "jpg" else {"lossless": True} if suffix == "webp" else {}
    path = save_turned(quarters(), tmp_path / f"turned.{suffix}", orientation, **options)
    assert read_size(path) == (48, 32)
    assert near(corners(read_pixels(path, uncropped(48, 32))), QUARTERS)


@pytest.mark.parametrize("orientation", [0, 9, 65535])
def test_invalid_orientation_is_ignored(tmp_path: Path, orientation: int) -> None:
    exif = Image.Exif()
    exif[274] = orientation
    path = save(quarters(), tmp_path / "odd.png", exif=exif)
    assert read_size(path) == (48, 32)
    assert corners(read_pixels(path, uncropped(48, 32))) == list(QUARTERS)


# --- modes -------------------------------------------------------------------------------------------------------------


def test_rgb_pixels_are_those_of_the_file(tmp_path: Path) -> None:
    content = np.random.default_rng(0).integers(256, size=(32, 48, 3), dtype=np.uint8)
    pixels = read_pixels(save(Image.fromarray(content), tmp_path / "noise.png"), uncropped(48, 32))
    assert pixels.dtype == torch.uint8
    assert pixels.shape == (3, 32, 48)
    assert pixels.is_contiguous()
    assert np.array_equal(pixels.permute(1, 2, 0).numpy(), content)


def test_transparency_becomes_white(tmp_path: Path) -> None:
    image = quarters().convert("RGBA")
    alpha = np.zeros((32, 48), dtype=np.uint8)
    alpha[:, 24:] = 255
    alpha[16:, :24] = 128
    image.putalpha(Image.fromarray(alpha))
    pixels = corners(read_pixels(save(image, tmp_path / "alpha.png"), uncropped(48, 32)))
    assert pixels[0] == WHITE
    assert pixels[1] == QUARTERS[1]
    assert near(pixels[2:3], ((127, 127, 255),), tolerance=1)


def test_transparent_palette_entry_becomes_white(tmp_path: Path) -> None:
    image = quarters().quantize(4)
    red = image.getpixel((0, 0))
    path = save(image, tmp_path / "palette.png", transparency=red)
    with Image.open(path) as written:
        assert written.mode == "P"
    assert corners(read_pixels(path, uncropped(48, 32))) == [WHITE, *QUARTERS[1:]]


def test_palette_without_transparency_keeps_its_colours(tmp_path: Path) -> None:
    path = save(quarters().quantize(4), tmp_path / "palette.png")
    assert corners(read_pixels(path, uncropped(48, 32))) == list(QUARTERS)


def test_transparent_colour_of_an_rgb_file_becomes_white(tmp_path: Path) -> None:
    path = save(quarters(), tmp_path / "key.png", transparency=RED)
    assert corners(read_pixels(path, uncropped(48, 32))) == [WHITE, *QUARTERS[1:]]


def test_grey_with_alpha_is_read_over_white(tmp_path: Path) -> None:
    image = Image.new("LA", (48, 32), (10, 0))
    assert corners(read_pixels(save(image, tmp_path / "grey.png"), uncropped(48, 32))) == [WHITE] * 4


@pytest.mark.parametrize("suffix", ["png", "tif"])
def test_sixteen_bits_become_eight_by_value(tmp_path: Path, suffix: str) -> None:
    values = np.repeat(np.array([0, 257 * 128, 257 * 200 + 128, 65535], dtype=np.uint16), 12)
    path = save(Image.fromarray(np.tile(values, (32, 1))), tmp_path / f"deep.{suffix}")
    pixels = read_pixels(path, uncropped(48, 32))
    assert pixels.shape == (3, 32, 48)
    assert pixels[0, 0, ::12].tolist() == [0, 128, 200, 255]
    assert torch.equal(pixels[0], pixels[1])


def test_dark_sixteen_bit_image_stays_dark(tmp_path: Path) -> None:
    """The value range is not guessed from the pixels: 255 of 65535 is nearly black."""
    path = save(Image.fromarray(np.full((32, 48), 255, dtype=np.uint16)), tmp_path / "dark.png")
    assert read_pixels(path, uncropped(48, 32)).unique().tolist() == [1]


@pytest.mark.parametrize("mode", ["1", "L", "P", "RGB", "RGBA", "LA"])
def test_every_png_mode_gives_three_channels(tmp_path: Path, mode: str) -> None:
    pixels = read_pixels(save(quarters().convert(mode), tmp_path / "mode.png"), uncropped(48, 32))
    assert pixels.shape == (3, 32, 48)
    assert pixels[:, -1, -1].tolist() == [255, 255, 255]


def test_cmyk_jpeg_keeps_its_colours(tmp_path: Path) -> None:
    path = save(quarters().convert("CMYK"), tmp_path / "print.jpg", quality=95)
    with Image.open(path) as written:
        assert written.mode == "CMYK"
    assert read_size(path) == (48, 32)
    assert near(corners(read_pixels(path, uncropped(48, 32))), QUARTERS, tolerance=12)


def test_first_frame_of_an_animation_is_used(tmp_path: Path) -> None:
    frames = [quarters(), Image.new("RGB", (48, 32), RED)]
    for suffix in ("gif", "webp", "png"):
        options = {"lossless": True} if suffix == "webp" else {}
        path = save(frames[0], tmp_path / f"film.{suffix}", save_all=True, append_images=frames[1:], **options)
        assert read_size(path) == (48, 32)
        assert corners(read_pixels(path, uncropped(48, 32))) == list(QUARTERS)


def test_floating_point_pixels_are_rejected(tmp_path: Path) -> None:
    path = save(Image.fromarray(np.zeros((32, 48), dtype=np.float32)), tmp_path / "float.tif")
    with pytest.raises(BadFile, match="floating-point"):
        read_pixels(path, uncropped(48, 32))


@pytest.mark.parametrize("suffix", ["jpg", "png", "webp", "bmp", "tif", "gif", "avif"])
def test_every_accepted_suffix_can_be_read(tmp_path: Path, suffix: str) -> None:
    path = save(quarters(), tmp_path / f"image.{suffix}")
    assert read_size(path) == (48, 32)
    assert read_pixels(path, uncropped(48, 32)).shape == (3, 32, 48)


# --- geometry ----------------------------------------------------------------------------------------------------------


def test_crop_is_taken_at_the_position_of_the_crop_box(tmp_path: Path) -> None:
    content = np.random.default_rng(0).integers(256, size=(32, 48, 3), dtype=np.uint8)
    path = save(Image.fromarray(content), tmp_path / "noise.png")
    pixels = read_pixels(path, replace(uncropped(48, 32), left=5, top=3, bucket=Bucket(16, 16)))
    assert np.array_equal(pixels.permute(1, 2, 0).numpy(), content[3:19, 5:21])


def test_scaling_keeps_the_whole_image(tmp_path: Path) -> None:
    path = save(quarters(480, 320), tmp_path / "large.png")
    pixels = read_pixels(path, crop_box(480, 320, Bucket(48, 32)))
    assert pixels.shape == (3, 32, 48)
    assert corners(pixels) == list(QUARTERS)


def test_rotated_images_are_cropped_after_exif_rotation(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[274] = 6
    path = save(quarters().transpose(Image.Transpose.ROTATE_90), tmp_path / "phone.png", exif=exif)
    pixels = read_pixels(path, replace(uncropped(48, 32), bucket=Bucket(16, 16)))
    assert pixels.unique(dim=1).shape[1] == 1
    assert tuple(pixels[:, 0, 0].tolist()) == RED


@pytest.mark.parametrize("orientation", TURNS)
@pytest.mark.parametrize("bucket", [Bucket(32, 32), Bucket(48, 16), Bucket(16, 48)])
def test_flipped_image_is_the_exact_flip_of_its_crop(tmp_path: Path, orientation: int, bucket: Bucket) -> None:
    """Also where the crop is half a pixel off the center, since a mask is flipped after its crop."""
    path = save_turned(noise(67, 41), tmp_path / "noise.png", orientation)
    box = crop_box(67, 41, bucket)
    plain, flipped = read_pixels(path, box), read_pixels(path, box, flipped=True)
    assert torch.equal(flipped, plain.flip(-1))
    assert flipped.is_contiguous()
    assert not torch.equal(flipped, plain)


# --- broken files ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", ["jpg", "png", "webp", "gif", "bmp", "tif"])
@pytest.mark.parametrize("fraction", [0.3, 0.9])
def test_truncated_file_is_detected_by_reading_its_size(tmp_path: Path, suffix: str, fraction: float) -> None:
    path = save(noise(), tmp_path / f"cut.{suffix}")
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * fraction)])
    with pytest.raises(BadFile) as caught:
        read_size(path)
    assert caught.value.path == path
    assert str(caught.value).startswith(f"{path}: ")
    assert caught.value.reason == "is truncated"
    with pytest.raises(BadFile, match="is truncated"):
        read_pixels(path, uncropped(200, 150))


@pytest.mark.parametrize("suffix", ["jpg", "png", "gif"])
@pytest.mark.parametrize("rest", [b"\x00", b"\r\n", b"made by a camera" * 10])
def test_bytes_after_the_end_of_an_image_are_ignored(tmp_path: Path, suffix: str, rest: bytes) -> None:
    path = save(noise(), tmp_path / f"long.{suffix}")
    path.write_bytes(path.read_bytes() + rest)
    assert read_size(path) == (200, 150)
    assert read_pixels(path, uncropped(200, 150)).shape == (3, 150, 200)


def test_empty_file_is_reported_as_empty(tmp_path: Path) -> None:
    path = tmp_path / "image.png"
    path.touch()
    with pytest.raises(BadFile) as caught:
        read_size(path)
    assert caught.value.reason == "is empty (0 bytes)"


@pytest.mark.parametrize("content", [b"<html>not found</html>", b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff"])
def test_file_that_is_not_an_image_is_reported_as_such(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "image.jpg"
    path.write_bytes(content)
    with pytest.raises(BadFile) as caught:
        read_size(path)
    assert caught.value.reason in ("is not an image Pillow can read", "is truncated")


def test_missing_file_is_a_bad_file(tmp_path: Path) -> None:
    with pytest.raises(BadFile, match="none.png: cannot be read: No such file or directory"):
        read_size(tmp_path / "none.png")
    with pytest.raises(BadFile):
        read_pixels(tmp_path / "none.png", uncropped(48, 32))


def test_damage_inside_a_png_is_detected_by_reading_its_pixels(tmp_path: Path) -> None:
    path = save(noise(), tmp_path / "damaged.png")
    content = bytearray(path.read_bytes())
    middle = len(content) // 2
    content[middle : middle + 64] = b"\x00" * 64
    path.write_bytes(bytes(content))
    with pytest.raises(BadFile):
        read_pixels(path, uncropped(200, 150))


def test_image_above_the_pixel_limit_is_rejected(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = save(noise(), tmp_path / "bomb.png")
    monkeypatch.setattr(decoding, "MAX_PIXELS", 29_999)
    for read in (lambda: read_size(path), lambda: read_pixels(path, uncropped(200, 150))):
        with pytest.raises(BadFile) as caught:
            read()
        assert caught.value.reason == "has 30,000 pixels; the limit is 29,999"
    monkeypatch.setattr(decoding, "MAX_PIXELS", 30_000)
    assert read_size(path) == (200, 150)


@pytest.mark.filterwarnings("error")
def test_pillow_s_pixel_limit_has_no_effect_below_ours(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pillow warns above its limit and raises an error above twice the limit."""
    path = save(noise(), tmp_path / "large.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 20_000)
    assert read_size(path) == (200, 150)
    assert read_pixels(path, uncropped(200, 150)).shape == (3, 150, 200)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10_000)
    with pytest.raises(BadFile, match="has 30,000 pixels; the limit is 178,000,000"):
        read_size(path)


def test_our_pixel_limit_is_below_pillow_s() -> None:
    assert Image.MAX_IMAGE_PIXELS is not None
    assert decoding.MAX_PIXELS < 2 * Image.MAX_IMAGE_PIXELS


@pytest.mark.parametrize(("width", "height"), [(400, 1), (1, 400), (101, 1), (5, 501)])
def test_image_with_an_extreme_side_ratio_is_rejected(tmp_path: Path, width: int, height: int) -> None:
    path = save(noise(width, height), tmp_path / "thin.png")
    for read in (lambda: read_size(path), lambda: read_pixels(path, crop_box(width, height, Bucket(16, 16)))):
        with pytest.raises(BadFile) as caught:
            read()
        assert caught.value.reason == f"is {width}x{height} pixels: no bucket has a similar aspect ratio"


@pytest.mark.parametrize(("width", "height"), [(100, 1), (3, 300), (1, 1)])
def test_long_image_is_cropped(tmp_path: Path, width: int, height: int) -> None:
    path = save(noise(width, height), tmp_path / "long.png")
    assert read_size(path) == (width, height)
    assert read_pixels(path, crop_box(width, height, Bucket(16, 16))).shape == (3, 16, 16)


def test_postscript_program_is_not_executed(tmp_path: Path) -> None:
    path = tmp_path / "script.png"
    quarters().save(path, "EPS")
    with pytest.raises(BadFile, match="is PostScript, a program, which is not executed"):
        read_pixels(path, uncropped(48, 32))


@pytest.mark.parametrize(("suffix", "truth"), [("png", "JPEG"), ("jpg", "GIF"), ("webp", "PNG"), ("gif", "WEBP")])
def test_wrong_suffix_is_ignored(tmp_path: Path, suffix: str, truth: str) -> None:
    path = tmp_path / f"image.{suffix}"
    quarters().save(path, truth)
    assert read_size(path) == (48, 32)
    assert read_pixels(path, uncropped(48, 32)).shape == (3, 32, 48)


def test_image_inside_an_archive_is_read_and_reported_like_a_file(tmp_path: Path) -> None:
    content = save_turned(noise(67, 41), tmp_path / "alone.png", 6).read_bytes()
    archive = tmp_path / "shard.tar"
    archive.write_bytes(b"before" + content + b"after")
    box = crop_box(67, 41, Bucket(32, 32))
    member = ImageFile(archive, "fox.png", 6, len(content))
    assert decoding.read_size(member) == (67, 41)
    assert np.array_equal(decoding.read_pixels(member, box), read_pixels(tmp_path / "alone.png", box).numpy())
    with pytest.raises(BadFile) as caught:
        decoding.read_size(ImageFile(archive, "fox.png", 6, len(content) // 2))
    assert str(caught.value) == f"{archive}/fox.png: is truncated"


def test_pixels_are_writeable(tmp_path: Path) -> None:
    """A torch tensor made of a read-only array has undefined behaviour. Also if no copy was needed to reorder the axes."""
    for size in ((48, 32), (1, 1), (1, 7)):
        path = save(noise(*size), tmp_path / "image.png")
        pixels = decoding.read_pixels(ImageFile(path), uncropped(*size))
        assert pixels.flags.writeable
        assert pixels.flags.c_contiguous


@pytest.mark.filterwarnings("error")
def test_broken_exif_is_ignored_without_a_warning(tmp_path: Path) -> None:
    path = save(noise(), tmp_path / "exif.jpg", exif=b"Exif\x00\x00MM\x00*\x00\x00\x00\x08\x00\x05" + b"\xff" * 8)
    assert read_size(path) == (200, 150)
    assert read_pixels(path, uncropped(200, 150)).shape == (3, 150, 200)


@pytest.mark.parametrize("suffix", ["png", "jpg", "webp"])
def test_orientation_in_xmp_data_applies_to_size_and_pixels(tmp_path: Path, suffix: str) -> None:
    xmp = b'<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:Description tiff:Orientation="6"/></x:xmpmeta>'
    path = tmp_path / f"image.{suffix}"
    if suffix == "png":
        chunks = PngImagePlugin.PngInfo()
        chunks.add_itxt("XML:com.adobe.xmp", xmp.decode())
        quarters(64, 32).save(path, pnginfo=chunks)
    else:
        quarters(64, 32).save(path, xmp=xmp)
    with Image.open(path) as image:
        turned = ImageOps.exif_transpose(image).size
    assert turned == (32, 64)
    assert read_size(path) == turned
