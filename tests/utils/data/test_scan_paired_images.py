"""Masks and control images of a dataset: pairing with images, and warnings about unused files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.tiny_model import make_tiny_dataset
from tests.utils.data.image_makers import left_half, noise, read_size, save
from tests.utils.data.scanning import Scan
from utils.data.dataset import Dataset
from utils.data.sources.image_files import ImageFile


def make_masked(folder: Path, num_images: int = 3) -> tuple[Path, Path]:
    """Creates a folder of images and a folder of their masks."""
    images, masks = make_tiny_dataset(folder / "images", num_images), folder / "masks"
    masks.mkdir()
    for index, image in enumerate(sorted(images.glob("*.png"))):
        width, height = read_size(image)
        save(left_half(width, height), masks / f"{image.stem}{('.png', '.jpg')[index % 2]}")
    return images, masks


def scan_masked(scan_folders: Scan, images: Path, masks: Path, **changes: Any) -> Dataset:
    return scan_folders(**{"directory": [{"path": images, "mask_path": masks}], **changes})


def test_every_image_has_the_mask_of_the_same_name_at_every_resolution(scan_folders: Scan, tmp_path: Path) -> None:
    images, masks = make_masked(tmp_path)
    dataset = scan_masked(scan_folders, images, masks, resolutions=[32, 64])
    assert dataset.bad_files == []
    assert len(dataset.examples) == 6
    for example in dataset.examples:
        assert example.mask is not None
        assert example.mask.path.parent == masks
        assert example.mask.path.stem == example.image.path.stem


def test_a_mask_changes_neither_key_nor_crop(scan_folders: Scan, tmp_path: Path) -> None:
    """So an image's random draws and cache entries do not depend on its mask."""
    images, masks = make_masked(tmp_path)
    plain, masked = scan_folders(images).examples, scan_masked(scan_folders, images, masks).examples
    assert [(example.key, example.box) for example in plain] == [(example.key, example.box) for example in masked]


def test_image_without_a_mask_is_bad_and_the_others_are_used(scan_folders: Scan, tmp_path: Path) -> None:
    images, masks = make_masked(tmp_path)
    (masks / "image_001.jpg").unlink()
    dataset = scan_masked(scan_folders, images, masks)
    (bad,) = dataset.bad_files
    assert bad.path == images / "image_001.png"
    assert bad.reason.startswith("has no mask")
    assert [example.image.path.stem for example in dataset.examples] == ["image_000", "image_002"]


def test_mask_with_another_aspect_ratio_is_bad(scan_folders: Scan, tmp_path: Path) -> None:
    images, masks = make_masked(tmp_path)
    wrong = save(left_half(64, 64), masks / "image_001.jpg")
    (bad,) = scan_masked(scan_folders, images, masks).bad_files
    assert (bad.path, bad.reason) == (
        wrong,
        "is 64x64 pixels, but its image image_001.png is 64x32: the aspect ratios differ",
    )


def test_unused_files_in_the_mask_folder_give_a_warning(scan_folders: Scan, tmp_path: Path) -> None:
    images, masks = make_masked(tmp_path)
    assert not any("mask" in text for text in scan_masked(scan_folders, images, masks).warnings)
    save(left_half(), masks / "gone.png")
    (masks / "notes.txt").write_text("")
    (masks / ".hidden").write_text("")
    (warning,) = [text for text in scan_masked(scan_folders, images, masks).warnings if "mask" in text]
    assert warning == f"{masks}: 2 files are not the mask of any image: gone.png, notes.txt"


def test_directories_can_share_a_mask_folder(scan_folders: Scan, tmp_path: Path) -> None:
    images, masks = make_masked(tmp_path)
    more = tmp_path / "more"
    more.mkdir()
    for suffix in (".png", ".txt"):
        (images / f"image_002{suffix}").rename(more / f"image_002{suffix}")
    dataset = scan_folders(directory=[{"path": path, "mask_path": masks} for path in (images, more)])
    assert (len(dataset.examples), dataset.bad_files) == (3, [])
    assert not any("mask" in text for text in dataset.warnings)


def test_mask_folder_inside_the_image_folder_gives_no_warning(scan_folders: Scan, tmp_path: Path) -> None:
    images, masks = make_masked(tmp_path)
    masks.rename(images / "masks")
    (images / "other").mkdir()
    dataset = scan_masked(scan_folders, images, images / "masks")
    assert len(dataset.examples) == 3
    assert [text for text in dataset.warnings if "subfolders are skipped" in text] == [
        f"{images}: subfolders are skipped (set recursive = true to include them): other"
    ]


def test_missing_mask_folder_and_the_image_folder_itself_are_skipped(scan_folders: Scan, tmp_path: Path) -> None:
    """They are configuration errors; an image is never used as its own mask."""
    images, _ = make_masked(tmp_path)
    (tmp_path / "link").symlink_to(images)
    for masks in (tmp_path / "none", images, tmp_path / "link"):
        dataset = scan_masked(scan_folders, images, masks)
        assert (len(dataset.examples), dataset.bad_files) == (0, [])


def test_masks_of_images_in_subfolders_are_in_subfolders_of_the_same_name(scan_folders: Scan, tmp_path: Path) -> None:
    images, masks = make_masked(tmp_path)
    make_masked(tmp_path / "deep")
    (tmp_path / "deep" / "images").rename(images / "deep")
    (tmp_path / "deep" / "masks").rename(masks / "deep")
    dataset = scan_masked(scan_folders, images, masks, recursive=True)
    assert (len(dataset.examples), dataset.bad_files, dataset.warnings) == (6, [], [])
    for example in dataset.examples:
        assert example.mask is not None
        below = example.image.path.relative_to(images)
        assert example.mask.path.relative_to(masks).with_suffix("") == below.with_suffix("")


# --- control images --------------------------------------------------------------------------------------------------


def with_control(images: Path, control: Path, **more: Any) -> dict[str, Any]:
    return {"directory": [{"path": images, "control_path": control, **more}]}


def test_every_image_has_the_control_image_of_the_same_name(scan_folders: Scan, tmp_path: Path) -> None:
    images, control = make_masked(tmp_path)
    plain, dataset = scan_folders(images), scan_folders(**with_control(images, control), resolutions=[32, 64])
    assert dataset.bad_files == []
    for example in dataset.examples:
        assert example.control is not None
        assert example.control.path.parent == control
        assert example.control.path.stem == example.image.path.stem
        assert example.mask is None
    small = [(example.key, example.box) for example in dataset.examples if example.key.endswith("@32")]
    assert small == [(example.key, example.box) for example in plain.examples]


def test_masks_and_control_images_are_separate(scan_folders: Scan, tmp_path: Path) -> None:
    images, masks = make_masked(tmp_path)
    control = tmp_path / "control"
    control.mkdir()
    for image in images.glob("*.png"):
        save(noise(*read_size(image)), control / image.name)
    dataset = scan_folders(**with_control(images, control, mask_path=masks))
    assert len(dataset.examples) == 3
    for example in dataset.examples:
        assert example.control == ImageFile(control / example.image.path.name)
        assert example.mask is not None and example.mask.path.parent == masks


def test_image_without_a_usable_control_image_is_bad_and_the_others_are_used(scan_folders: Scan, tmp_path: Path) -> None:
    images, control = make_masked(tmp_path, 4)
    (control / "image_000.png").unlink()
    wrong = save(left_half(64, 64), control / "image_001.jpg")
    damaged = control / "image_002.png"
    damaged.write_bytes(damaged.read_bytes()[:40])
    dataset = scan_folders(**with_control(images, control))
    assert [example.image.path.stem for example in dataset.examples] == ["image_003"]
    assert {bad.path: bad.reason.partition(":")[0] for bad in dataset.bad_files} == {
        images / "image_000.png": "has no control image",
        wrong: "is 64x64 pixels, but its image image_001.png is 64x32",
        damaged: next(bad.reason.partition(":")[0] for bad in dataset.bad_files if bad.path == damaged),
    }
    assert len(dataset.bad_files) == 3


def test_unused_files_in_the_control_folder_give_a_warning(scan_folders: Scan, tmp_path: Path) -> None:
    images, control = make_masked(tmp_path)
    save(left_half(), control / "gone.png")
    dataset = scan_folders(**with_control(images, control))
    assert f"{control}: 1 files are not the control image of any image: gone.png" in dataset.warnings


@pytest.mark.parametrize("key", ["mask_path", "control_path"])
def test_linked_mask_or_control_folder_inside_the_image_folder_is_not_scanned_for_images(
    scan_folders: Scan, tmp_path: Path, key: str
) -> None:
    images, masks = make_masked(tmp_path)
    (images / "inside").symlink_to(masks)
    dataset = scan_folders(directory=[{"path": images, key: images / "inside"}], recursive=True)
    assert (len(dataset.examples), dataset.bad_files, dataset.warnings) == (3, [], [])
