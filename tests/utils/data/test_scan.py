"""Scanning a dataset file: images, buckets, resolutions and keys of its examples."""

from __future__ import annotations

import os
from collections.abc import Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from tests.tiny_model import make_tiny_dataset
from tests.utils.data.image_makers import quarters, save
from tests.utils.data.scanning import Scan, names
from utils.data.buckets import Bucket
from utils.data.dataset import Dataset
from utils.data.sources.image_files import ImageFile


def test_every_image_is_found_with_its_caption(scan_folders: Scan, tiny_dataset: Path) -> None:
    dataset = scan_folders(tiny_dataset)
    assert [example.image.path.name for example in dataset.examples] == [f"image_{index:03d}.png" for index in range(12)]
    assert dataset.examples[3].caption() == "a yellow circle, number 3"
    assert dataset.bad_files == []
    assert dataset.num_images == 12
    assert dataset.bucket_counts() == {Bucket(16, 48): 4, Bucket(32, 32): 4, Bucket(48, 16): 4}


def test_order_does_not_depend_on_the_file_system(
    scan_folders: Scan, tiny_dataset: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected, real = scan_folders(tiny_dataset), os.scandir
    monkeypatch.setattr(os, "scandir", lambda path: list(real(path))[::-1])
    assert list(scan_folders(tiny_dataset).examples) == list(expected.examples)


def test_scanning_reads_only_sizes(tiny_dataset: Path) -> None:
    """That sizes are read from headers is tested in sources/test_decoding.py."""

    class Sizes:
        def sizes(self, files: Sequence[ImageFile]) -> Future[list[tuple[int, int]]]:
            future: Future[list[tuple[int, int]]] = Future()
            future.set_result([(32, 32) for _ in files])
            return future

    readers: Any = Sizes()
    dataset = Scan(readers)(tiny_dataset)
    assert (dataset.bucket_counts(), dataset.bad_files) == ({Bucket(32, 32): 12}, [])


def test_keys_contain_only_directory_number_file_name_and_resolution(
    scan_folders: Scan, tiny_dataset: Path, tmp_path: Path
) -> None:
    dataset = scan_folders(tiny_dataset, make_tiny_dataset(tmp_path / "more", 2), resolutions=[32, 64])
    keys = [example.key for example in dataset.examples]
    assert len(set(keys)) == len(keys) == 2 * 14
    assert keys[:2] == ["0/image_000.png@32", "0/image_000.png@64"]
    assert keys[-1] == "1/image_001.png@64"
    assert dataset.num_images == 14


def test_keys_do_not_depend_on_the_folder_s_path(scan_folders: Scan, tiny_dataset: Path, tmp_path: Path) -> None:
    moved = make_tiny_dataset(tmp_path / "moved")
    assert [e.key for e in scan_folders(moved).examples] == [e.key for e in scan_folders(tiny_dataset).examples]


def test_prefix_separates_the_keys_of_several_datasets(scan_folders: Scan, tiny_dataset: Path) -> None:
    sizes = [32, 64]
    plain, prefixed = (scan_folders(tiny_dataset, resolutions=sizes, prefix=part).examples for part in ("", "eval/faces/"))
    assert [example.key for example in prefixed] == [f"eval/faces/{example.key}" for example in plain]


def test_weight_and_flip_belong_to_their_directory(scan_folders: Scan, tiny_dataset: Path, tmp_path: Path) -> None:
    make_tiny_dataset(tmp_path, 1)
    directories = [{"path": tiny_dataset}, {"path": tmp_path, "loss_weight": 0.5, "horizontal_flip": True}]
    examples = scan_folders(directory=directories).examples
    assert {(example.loss_weight, example.may_flip, example.mask) for example in examples[:12]} == {(1.0, False, None)}
    assert [(example.loss_weight, example.may_flip) for example in examples[12:]] == [(0.5, True)]


def test_repeats_belong_to_their_directory(scan_folders: Scan, tiny_dataset: Path, tmp_path: Path) -> None:
    make_tiny_dataset(tmp_path, 1)
    directories = [{"path": tiny_dataset}, {"path": tmp_path, "num_repeats": 3}]
    assert [example.repeats for example in scan_folders(directory=directories).examples] == [1] * 12 + [3]


def test_without_aspect_ratio_buckets_every_image_is_cropped_square(scan_folders: Scan, tiny_dataset: Path) -> None:
    assert set(scan_folders(tiny_dataset, enable_ar_bucket=False).bucket_counts()) == {Bucket(32, 32)}


def test_exif_rotated_image_is_assigned_to_the_bucket_of_its_upright_size(scan_folders: Scan, tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[274] = 6
    save(quarters(64, 32), tmp_path / "phone.jpg", exif=exif)
    (tmp_path / "phone.txt").write_text("a phone's image")
    assert scan_folders(tmp_path).examples[0].bucket == Bucket(16, 48)


# --- bad files, unused files -------------------------------------------------------------------------------------------


def test_one_bad_image_leaves_the_others_usable(scan_folders: Scan, tmp_path: Path) -> None:
    make_tiny_dataset(tmp_path, 4)
    path = tmp_path / "image_001.png"
    path.write_bytes(path.read_bytes()[:50])
    dataset = scan_folders(tmp_path)
    assert [bad.path for bad in dataset.bad_files] == [path]
    assert [example.image.path.name for example in dataset.examples] == [f"image_00{index}.png" for index in (0, 2, 3)]


def test_missing_folder_is_skipped(scan_folders: Scan, tmp_path: Path) -> None:
    """It is a configuration error, whatever on_bad_file is: tests/test_cli.py."""
    dataset = scan_folders(tmp_path / "none")
    assert (len(dataset.examples), dataset.bad_files) == (0, [])


def test_empty_folder_gives_a_warning(scan_folders: Scan, tmp_path: Path) -> None:
    assert scan_folders(tmp_path).warnings == [f"{tmp_path} has no usable image"]


# --- folders in folders ------------------------------------------------------------------------------------------------


def test_names_of_images_in_subfolders_include_the_subfolder(scan_folders: Scan, tmp_path: Path) -> None:
    make_tiny_dataset(tmp_path, 1)
    make_tiny_dataset(tmp_path / "a" / "b", 1)
    dataset = scan_folders(tmp_path, recursive=True)
    assert [example.key for example in dataset.examples] == ["0/a/b/image_000.png@32", "0/image_000.png@32"]
    assert dataset.examples[0].image == ImageFile(tmp_path / "a" / "b" / "image_000.png")
    assert names(scan_folders(tmp_path)) == ["image_000.png"]


def test_directory_overrides_recursive_setting_of_the_file(scan_folders: Scan, tmp_path: Path) -> None:
    make_tiny_dataset(tmp_path, 1)
    make_tiny_dataset(tmp_path / "deep" / "er", 1)
    directories = [{"path": tmp_path, "recursive": False}, {"path": tmp_path / "deep"}]
    assert names(scan_folders(directory=directories, recursive=True)) == ["image_000.png", "er/image_000.png"]


# --- size --------------------------------------------------------------------------------------------------------------


def write_images_of_sizes(folder: Path, *sizes: tuple[int, int]) -> Path:
    """Writes an image of each size, named after the size."""
    for width, height in sizes:
        path = save(quarters(width, height), folder / f"{width}x{height}.png")
        path.with_suffix(".txt").write_text("an image")
    return folder


def test_small_images_are_enlarged_with_a_warning(scan_folders: Scan, tmp_path: Path) -> None:
    write_images_of_sizes(tmp_path, (32, 32), (31, 32), (100, 100))
    dataset = scan_folders(tmp_path, resolutions=[32, 64])
    assert len(dataset.examples) == 6
    assert dataset.warnings == ["2 images are smaller than their bucket and are enlarged: 31x32.png, 32x32.png"]
    assert (dataset.skipped, dataset.too_small) == ([], [])


def test_small_images_are_skipped_only_at_resolutions_above_their_size(scan_folders: Scan, tmp_path: Path) -> None:
    write_images_of_sizes(tmp_path, (32, 32), (31, 32), (100, 100))
    dataset = scan_folders(tmp_path, resolutions=[32, 64], upscale="never")
    keys = [example.key.partition("/")[2] for example in dataset.examples]
    assert keys == ["100x100.png@32", "100x100.png@64", "32x32.png@32"]
    assert all(example.box.scale <= 1 for example in dataset.examples)
    assert [(bad.path.name, bad.reason) for bad in dataset.skipped] == [
        ("31x32.png", 'is 31x32 pixels, smaller than its bucket 32x32; upscale = "never"'),
        ("31x32.png", 'is 31x32 pixels, smaller than its bucket 64x64; upscale = "never"'),
        ("32x32.png", 'is 32x32 pixels, smaller than its bucket 64x64; upscale = "never"'),
    ]
    assert (dataset.warnings, dataset.too_small, dataset.bad_files) == ([], [], [])


def test_image_smaller_than_its_bucket_on_one_side_is_too_small(scan_folders: Scan, tmp_path: Path) -> None:
    write_images_of_sizes(tmp_path, (200, 15), (200, 16))
    dataset = scan_folders(tmp_path, upscale="never")
    assert [(example.image.path.name, str(example.bucket)) for example in dataset.examples] == [("200x16.png", "48x16")]


def test_small_images_are_an_error_with_upscale_error(scan_folders: Scan, tmp_path: Path) -> None:
    write_images_of_sizes(tmp_path, (32, 32), (31, 32))
    dataset = scan_folders(tmp_path, upscale="error")
    assert [(bad.path.name, bad.reason) for bad in dataset.too_small] == [
        ("31x32.png", 'is 31x32 pixels, smaller than its bucket 32x32; upscale = "error"')
    ]
    assert dataset.skipped == []


def test_images_outside_the_pixel_limits_are_skipped(scan_folders: Scan, tmp_path: Path) -> None:
    write_images_of_sizes(tmp_path, (40, 40), (40, 41), (50, 50), (50, 51))
    dataset = scan_folders(tmp_path, min_pixels=40 * 41, max_pixels=50 * 50, resolutions=[16, 32])
    assert sorted({*names(dataset)}) == ["40x41.png", "50x50.png"]
    assert dataset.num_images == 2
    assert [(bad.path.name, bad.reason) for bad in dataset.skipped] == [
        ("40x40.png", "is 40x40 pixels; min_pixels = 1640"),
        ("50x51.png", "is 50x51 pixels; max_pixels = 2500"),
    ]
    assert dataset.bad_files == []


# --- crop --------------------------------------------------------------------------------------------------------------


def write_wide_images(folder: Path, num_images: int = 40) -> Path:
    """Writes images twice as wide as high, of which a square crop drops half."""
    folder.mkdir(exist_ok=True)
    for index in range(num_images):
        path = save(quarters(64, 32), folder / f"{index:02d}.png")
        path.with_suffix(".txt").write_text("an image")
    return folder


def left_edges(dataset: Dataset) -> list[int]:
    return [example.box.left for example in dataset.examples]


def test_crop_is_centered_or_random_per_image(scan_folders: Scan, tmp_path: Path) -> None:
    write_wide_images(tmp_path)
    centered = scan_folders(tmp_path, enable_ar_bucket=False)
    random = scan_folders(tmp_path, enable_ar_bucket=False, crop="random")
    assert set(left_edges(centered)) == {16}
    assert len(set(left_edges(random))) > 10
    assert min(left_edges(random)) < 8 and max(left_edges(random)) > 24, "crops lie on both sides of the center"
    for example in random.examples:
        assert 0 <= example.box.left <= example.box.resized_width - 32
        assert (example.box.top, example.box.resized_width) == (0, 64)


def test_random_crop_does_not_depend_on_other_images_or_the_directory(scan_folders: Scan, tmp_path: Path) -> None:
    """It depends neither on the directory's number nor on other images, so that cached latents stay valid."""
    first, second = write_wide_images(tmp_path / "a"), write_wide_images(tmp_path / "b", 10)
    alone = left_edges(scan_folders(first, enable_ar_bucket=False, crop="random"))
    assert alone == left_edges(scan_folders(first, enable_ar_bucket=False, crop="random", prefix="eval/faces/"))
    both = left_edges(scan_folders(second, first, enable_ar_bucket=False, crop="random"))
    assert both == alone[:10] + alone


def test_random_crop_differs_between_resolutions(scan_folders: Scan, tmp_path: Path) -> None:
    dataset = scan_folders(write_wide_images(tmp_path), enable_ar_bucket=False, crop="random", resolutions=[32, 64])
    small, large = ([left for left in left_edges(dataset)[start::2]] for start in (0, 1))
    assert [2 * left for left in small] != large
    for index in range(len(dataset.examples)):
        assert dataset.examples.box(index) == dataset.examples[index].box


# --- captions ----------------------------------------------------------------------------------------------------------


def test_each_line_is_a_caption_with_caption_per_line(scan_folders: Scan, tmp_path: Path) -> None:
    make_tiny_dataset(tmp_path, 1)
    (tmp_path / "image_000.txt").write_text("a fox\n\n  an owl \n")
    (example,) = scan_folders(tmp_path, caption_per_line=True).examples
    assert (example.captions, example.num_captions) == (("a fox", "an owl"), 2)
    (example,) = scan_folders(tmp_path).examples
    assert example.captions == ("a fox\n\n  an owl",)


def test_number_of_tag_orders_is_as_configured(scan_folders: Scan, tmp_path: Path) -> None:
    make_tiny_dataset(tmp_path, 1)
    (tmp_path / "image_000.txt").write_text("1girl; solo; hat; smile; sky")
    tags: dict[str, Any] = {"cache_shuffle_num": 4, "cache_shuffle_delimiter": "; ", "keep_tokens": 2}
    (example,) = scan_folders(tmp_path, **tags).examples
    orders = [example.caption(number) for number in range(example.num_captions)]
    assert len(orders) == 4
    assert orders[0] == "1girl; solo; hat; smile; sky"
    assert len(set(orders)) > 1
    for order in orders:
        assert order.startswith("1girl; solo; ")
        assert sorted(order.split("; ")) == sorted(orders[0].split("; "))
    (example,) = scan_folders(tmp_path).examples
    assert (example.num_captions, example.shuffle) == (1, None)
