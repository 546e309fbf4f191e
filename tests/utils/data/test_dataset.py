"""Folders to examples: what is found, what is refused, and what is said about it."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from models.base import LatentSpec
from tests.tiny_model import make_tiny_dataset, write_picture
from tests.utils.data.pictures import left_half, quarters, save
from utils.config.schema import DatasetConfig
from utils.data import dataset as dataset_module
from utils.data.buckets import Bucket
from utils.data.dataset import Dataset, Example, hold_out, read_caption, resolution_problems, scan
from utils.data.images import BadFile, read_size

LATENT = LatentSpec(channels=16, downscale=8, patch=2, max_side_pixels=256)


def config_of(*folders: Path, **changes: Any) -> DatasetConfig:
    directories = [{"path": folder} for folder in folders]
    return DatasetConfig(**{"resolutions": [32], "num_ar_buckets": 3, "directory": directories, **changes})


def scan_folders(*folders: Path, **changes: Any) -> Dataset:
    return scan(config_of(*folders, **changes), LATENT.pixel_multiple)


def test_every_picture_is_found_with_its_caption(tiny_dataset: Path) -> None:
    found = scan_folders(tiny_dataset)
    assert [example.image.name for example in found.examples] == [f"picture_{index:03d}.png" for index in range(12)]
    assert found.examples[3].caption == "a yellow circle, number 3"
    assert found.bad_files == []
    assert found.num_images == 12
    assert found.bucket_counts() == {Bucket(16, 48): 4, Bucket(32, 32): 4, Bucket(48, 16): 4}


def test_order_does_not_depend_on_the_file_system(tiny_dataset: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = scan_folders(tiny_dataset)
    listed = list(tiny_dataset.iterdir())
    monkeypatch.setattr(Path, "iterdir", lambda self: iter(listed[::-1]))
    assert scan_folders(tiny_dataset).examples == expected.examples


def test_scanning_decodes_no_whole_picture(tiny_dataset: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from PIL import ImageFile

    def refuse(self: object) -> None:
        raise AssertionError("decoded")

    monkeypatch.setattr(ImageFile.ImageFile, "load", refuse)
    assert len(scan_folders(tiny_dataset).examples) == 12


def test_keys_name_directory_file_and_resolution_and_nothing_of_the_machine(tiny_dataset: Path, tmp_path: Path) -> None:
    found = scan_folders(tiny_dataset, make_tiny_dataset(tmp_path / "more", 2), resolutions=[32, 64])
    keys = [example.key for example in found.examples]
    assert len(set(keys)) == len(keys) == 2 * 14
    assert keys[:2] == ["0/picture_000.png@32", "0/picture_000.png@64"]
    assert keys[-1] == "1/picture_001.png@64"
    assert found.num_images == 14


def test_keys_survive_moving_the_folder(tiny_dataset: Path, tmp_path: Path) -> None:
    moved = make_tiny_dataset(tmp_path / "moved")
    assert [e.key for e in scan_folders(moved).examples] == [e.key for e in scan_folders(tiny_dataset).examples]


def test_a_prefix_keeps_the_keys_of_several_datasets_apart(tiny_dataset: Path) -> None:
    config = config_of(tiny_dataset, resolutions=[32, 64])
    plain, prefixed = (scan(config, LATENT.pixel_multiple, prefix=prefix).examples for prefix in ("", "eval/faces/"))
    assert [example.key for example in prefixed] == [f"eval/faces/{example.key}" for example in plain]


def test_weight_and_flip_belong_to_their_directory(tiny_dataset: Path, tmp_path: Path) -> None:
    make_tiny_dataset(tmp_path, 1)
    directories = [{"path": tiny_dataset}, {"path": tmp_path, "loss_weight": 0.5, "horizontal_flip": True}]
    found = scan_folders(directory=directories).examples
    assert {(example.loss_weight, example.may_flip, example.mask) for example in found[:12]} == {(1.0, False, None)}
    assert [(example.loss_weight, example.may_flip) for example in found[12:]] == [(0.5, True)]


def test_repeats_belong_to_their_directory(tiny_dataset: Path, tmp_path: Path) -> None:
    make_tiny_dataset(tmp_path, 1)
    directories = [{"path": tiny_dataset}, {"path": tmp_path, "num_repeats": 3}]
    assert [example.repeats for example in scan_folders(directory=directories).examples] == [1] * 12 + [3]


def test_without_aspect_ratio_buckets_every_picture_is_cropped_square(tiny_dataset: Path) -> None:
    assert set(scan_folders(tiny_dataset, enable_ar_bucket=False).bucket_counts()) == {Bucket(32, 32)}


def test_a_turned_picture_goes_to_the_bucket_of_its_looks(tmp_path: Path) -> None:
    from PIL import Image

    exif = Image.Exif()
    exif[274] = 6
    save(quarters(64, 32), tmp_path / "phone.jpg", exif=exif)
    (tmp_path / "phone.txt").write_text("a phone's picture")
    assert scan_folders(tmp_path).examples[0].bucket == Bucket(16, 48)


# --- captions ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "caption"),
    [
        (b"a fox", "a fox"),
        (b"  a fox \r\n\r\n", "a fox"),
        (b"", ""),
        (b"\xef\xbb\xbfa fox", "a fox"),
        ("Füchse 狐狸".encode(), "Füchse 狐狸"),
        (b"two\nlines", "two\nlines"),
    ],
)
def test_a_caption_is_its_text_without_space_around_it(tmp_path: Path, content: bytes, caption: str) -> None:
    (tmp_path / "fox.txt").write_bytes(content)
    assert read_caption(tmp_path / "fox.png") == caption


def test_a_picture_without_a_caption_file_is_bad_and_says_what_to_do(tmp_path: Path) -> None:
    path = write_picture(tmp_path, 0)
    path.with_suffix(".txt").unlink()
    (bad,) = scan_folders(tmp_path).bad_files
    assert bad.path == path
    assert bad.reason == "has no caption: picture_000.txt is missing (an empty file is an empty caption)"


def test_a_caption_in_another_encoding_is_named_with_its_first_bad_byte(tmp_path: Path) -> None:
    path = write_picture(tmp_path, 0)
    path.with_suffix(".txt").write_bytes("ein Füchslein".encode("latin-1"))
    (bad,) = scan_folders(tmp_path).bad_files
    assert bad.path == path.with_suffix(".txt")
    assert bad.reason == "is not UTF-8: byte 5 is 0xfc"


@pytest.mark.skipif(os.geteuid() == 0, reason="everything can be read by root")
def test_a_caption_that_may_not_be_read_is_named(tmp_path: Path) -> None:
    path = write_picture(tmp_path, 0).with_suffix(".txt")
    path.chmod(0)
    with pytest.raises(BadFile, match="cannot be read: Permission denied"):
        read_caption(path)


def test_a_folder_in_place_of_a_caption_is_named(tmp_path: Path) -> None:
    path = write_picture(tmp_path, 0).with_suffix(".txt")
    path.unlink()
    path.mkdir()
    (bad,) = scan_folders(tmp_path).bad_files
    assert bad.path == path
    assert bad.reason.startswith("cannot be read: ")


# --- bad files, unused files -------------------------------------------------------------------------------------------


def test_one_bad_picture_leaves_the_others_usable(tmp_path: Path) -> None:
    make_tiny_dataset(tmp_path, 4)
    path = tmp_path / "picture_001.png"
    path.write_bytes(path.read_bytes()[:50])
    found = scan_folders(tmp_path)
    assert [bad.path for bad in found.bad_files] == [path]
    assert [example.image.name for example in found.examples] == [f"picture_00{index}.png" for index in (0, 2, 3)]


def test_a_missing_folder_is_passed_over(tmp_path: Path) -> None:
    """It is refused before, whatever on_bad_file says: tests/test_cli.py."""
    found = scan_folders(tmp_path / "none")
    assert (found.examples, found.bad_files) == ([], [])


def test_folders_in_a_folder_are_warned_of(tmp_path: Path) -> None:
    make_tiny_dataset(tmp_path, 1)
    make_tiny_dataset(tmp_path / "more", 1)
    (warning,) = [text for text in scan_folders(tmp_path).warnings if "more" in text]
    assert warning == f"{tmp_path}: folders in it are not looked into: more"


def test_an_empty_folder_is_warned_of(tmp_path: Path) -> None:
    assert scan_folders(tmp_path).warnings == [f"{tmp_path} has no usable picture"]


def test_files_no_picture_uses_are_named(tmp_path: Path) -> None:
    make_tiny_dataset(tmp_path, 1)
    (tmp_path / "picture_009.txt").write_text("a caption whose picture is gone")
    (tmp_path / "notes.md").write_text("")
    (tmp_path / ".hidden").write_text("")
    warning = next(text for text in scan_folders(tmp_path).warnings if "neither" in text)
    assert warning == f"{tmp_path}: 2 files are neither picture nor caption of one: notes.md, picture_009.txt"


def test_two_pictures_of_one_caption_file_are_warned_of(tmp_path: Path) -> None:
    path = write_picture(tmp_path, 0)
    save(quarters(), path.with_suffix(".jpg"))
    found = scan_folders(tmp_path)
    assert len(found.examples) == 2
    assert any("share one caption file: picture_000.txt" in text for text in found.warnings)


def test_suffixes_in_capitals_are_pictures(tmp_path: Path) -> None:
    path = write_picture(tmp_path, 0)
    path.rename(tmp_path / "picture_000.PNG")
    assert len(scan_folders(tmp_path).examples) == 1


def test_a_long_list_of_names_is_cut_and_says_so(tmp_path: Path) -> None:
    for index in range(9):
        (tmp_path / f"{index}.md").write_text("")
    warning = scan_folders(tmp_path).warnings[0]
    assert warning.endswith("0.md, 1.md, 2.md, 3.md, 4.md and 4 more")


# --- masks -------------------------------------------------------------------------------------------------------------


def make_masked(folder: Path, num_images: int = 3) -> tuple[Path, Path]:
    """Folders of pictures and of their masks, beside each other."""
    pictures, masks = make_tiny_dataset(folder / "pictures", num_images), folder / "masks"
    masks.mkdir()
    for index, image in enumerate(sorted(pictures.glob("*.png"))):
        width, height = read_size(image)
        save(left_half(width, height), masks / f"{image.stem}{('.png', '.jpg')[index % 2]}")
    return pictures, masks


def scan_masked(pictures: Path, masks: Path, **changes: Any) -> Dataset:
    return scan_folders(**{"directory": [{"path": pictures, "mask_path": masks}], **changes})


def test_every_picture_has_the_mask_of_its_name_at_every_size(tmp_path: Path) -> None:
    pictures, masks = make_masked(tmp_path)
    found = scan_masked(pictures, masks, resolutions=[32, 64])
    assert found.bad_files == []
    assert len(found.examples) == 6
    for example in found.examples:
        assert example.mask is not None
        assert example.mask.parent == masks
        assert example.mask.stem == example.image.stem


def test_a_mask_changes_neither_key_nor_crop(tmp_path: Path) -> None:
    """What is drawn for a picture, and its place in the cache, do not depend on it."""
    pictures, masks = make_masked(tmp_path)
    plain, masked = scan_folders(pictures).examples, scan_masked(pictures, masks).examples
    assert [(example.key, example.box) for example in plain] == [(example.key, example.box) for example in masked]


def test_a_picture_without_a_mask_is_bad_and_the_others_are_used(tmp_path: Path) -> None:
    pictures, masks = make_masked(tmp_path)
    (masks / "picture_001.jpg").unlink()
    found = scan_masked(pictures, masks)
    (bad,) = found.bad_files
    assert bad.path == pictures / "picture_001.png"
    assert bad.reason.startswith("has no mask")
    assert [example.image.stem for example in found.examples] == ["picture_000", "picture_002"]


def test_a_mask_of_another_shape_is_bad(tmp_path: Path) -> None:
    pictures, masks = make_masked(tmp_path)
    wrong = save(left_half(64, 64), masks / "picture_001.jpg")
    (bad,) = scan_masked(pictures, masks).bad_files
    assert (bad.path, bad.reason) == (wrong, "is 64x64 pixels, its picture picture_001.png 64x32: not the same shape")


def test_files_that_are_no_mask_are_named(tmp_path: Path) -> None:
    pictures, masks = make_masked(tmp_path)
    assert not any("mask" in text for text in scan_masked(pictures, masks).warnings)
    save(left_half(), masks / "gone.png")
    (masks / "notes.txt").write_text("")
    (masks / ".hidden").write_text("")
    (warning,) = [text for text in scan_masked(pictures, masks).warnings if "mask" in text]
    assert warning == f"{masks}: 2 files are no mask of a picture: gone.png, notes.txt"


def test_directories_may_share_a_folder_of_masks(tmp_path: Path) -> None:
    pictures, masks = make_masked(tmp_path)
    more = tmp_path / "more"
    more.mkdir()
    for suffix in (".png", ".txt"):
        (pictures / f"picture_002{suffix}").rename(more / f"picture_002{suffix}")
    found = scan_folders(directory=[{"path": path, "mask_path": masks} for path in (pictures, more)])
    assert (len(found.examples), found.bad_files) == (3, [])
    assert not any("mask" in text for text in found.warnings)


def test_masks_in_a_folder_inside_are_not_warned_of(tmp_path: Path) -> None:
    pictures, masks = make_masked(tmp_path)
    masks.rename(pictures / "masks")
    (pictures / "other").mkdir()
    found = scan_masked(pictures, pictures / "masks")
    assert len(found.examples) == 3
    assert [text for text in found.warnings if "looked into" in text] == [
        f"{pictures}: folders in it are not looked into: other"
    ]


def test_a_missing_folder_of_masks_and_the_pictures_own_are_passed_over(tmp_path: Path) -> None:
    """They are refused before, as missing folders are; a picture is never taken for its own mask."""
    pictures, _ = make_masked(tmp_path)
    (tmp_path / "link").symlink_to(pictures)
    for masks in (tmp_path / "none", pictures, tmp_path / "link"):
        found = scan_masked(pictures, masks)
        assert (found.examples, found.bad_files) == ([], [])


# --- held out ----------------------------------------------------------------------------------------------------------


def images(examples: Sequence[Example]) -> set[str]:
    return {example.image.name for example in examples}


def test_held_out_pictures_are_never_trained_on_at_any_size(tiny_dataset: Path) -> None:
    examples = scan_folders(tiny_dataset, resolutions=[32, 64]).examples
    training, held_out = hold_out(examples, 3, seed=0)
    assert len(images(held_out)) == 3
    assert images(training) | images(held_out) == images(examples)
    assert not images(training) & images(held_out)
    assert len(held_out) == 2 * 3
    for part in (training, held_out):
        assert [example for example in examples if example in part] == part, "in their order"


def test_a_picture_of_two_directories_is_in_one_part(tiny_dataset: Path, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tiny_dataset)
    training, held_out = hold_out(scan_folders(tiny_dataset, tmp_path / "link").examples, 4, seed=0)
    assert not images(training) & images(held_out)
    assert len(held_out) == 2 * 4
    alone, _ = hold_out(scan_folders(tiny_dataset).examples, 4, seed=0)
    assert images(alone) == images(training), "a second name of a picture changes no choice"


def test_the_choice_is_a_function_of_the_seed(tiny_dataset: Path) -> None:
    examples = scan_folders(tiny_dataset).examples
    choices = [frozenset(images(hold_out(examples, 4, seed)[1])) for seed in (0, 0, 1, 2, 3)]
    assert choices[0] == choices[1]
    assert len(set(choices)) > 2
    assert images(hold_out(examples[::-1], 4, 0)[1]) == choices[0]


def test_sizes_and_more_held_out_pictures_leave_the_first_choice(tiny_dataset: Path) -> None:
    few, more = (images(hold_out(scan_folders(tiny_dataset).examples, count, 5)[1]) for count in (3, 6))
    assert few < more
    assert images(hold_out(scan_folders(tiny_dataset, resolutions=[64]).examples, 3, 5)[1]) == few


@pytest.mark.parametrize("seed", range(5))
def test_a_picture_that_comes_or_goes_changes_one_choice_at_most(tiny_dataset: Path, seed: int) -> None:
    examples = scan_folders(tiny_dataset).examples
    all_chosen = images(hold_out(examples, 4, seed)[1])
    for gone in examples:
        chosen = images(hold_out([example for example in examples if example is not gone], 4, seed)[1])
        if gone.image.name in all_chosen:
            assert len(all_chosen - chosen) == 1
        else:
            assert chosen == all_chosen


def test_held_out_pictures_are_not_mirrored(tiny_dataset: Path) -> None:
    found = scan_folders(directory=[{"path": tiny_dataset, "horizontal_flip": True, "loss_weight": 2.0}])
    training, held_out = hold_out(found.examples, 4, seed=0)
    assert {example.may_flip for example in training} == {True}
    assert {(example.may_flip, example.loss_weight) for example in held_out} == {(False, 2.0)}


def test_holding_out_nothing_leaves_everything(tiny_dataset: Path) -> None:
    examples = scan_folders(tiny_dataset).examples
    assert hold_out(examples, 0, seed=0) == (examples, [])


@pytest.mark.parametrize("num_images", [12, 13])
def test_something_must_be_left_to_train_on(tiny_dataset: Path, num_images: int) -> None:
    examples = scan_folders(tiny_dataset, resolutions=[32, 64]).examples
    with pytest.raises(ValueError, match="of 12 pictures none would be left to train on"):
        hold_out(examples, num_images, seed=0)
    training, _ = hold_out(examples, 11, seed=0)
    assert len(images(training)) == 1


# --- resolutions -------------------------------------------------------------------------------------------------------


def test_a_resolution_off_the_grid_is_answered_with_its_neighbours(tmp_path: Path) -> None:
    problems = resolution_problems(config_of(tmp_path, resolutions=[64, 100, 50]), LATENT)
    assert problems == [
        ("resolutions[1]", "= 100: must be a multiple of 16; use 96 or 112"),
        ("resolutions[2]", "= 50: must be a multiple of 16; use 48 or 64"),
    ]


def test_a_resolution_beyond_the_position_table_is_refused_by_its_longest_side(tmp_path: Path) -> None:
    ((key, message),) = resolution_problems(config_of(tmp_path, resolutions=[128, 256]), LATENT)
    assert key == "resolutions[1]"
    assert message == "= 256: needs sides of 368 pixels, the network reaches 256"
    assert resolution_problems(config_of(tmp_path, resolutions=[256], enable_ar_bucket=False), LATENT) == []


def test_the_buckets_of_every_resolution_fit_its_model() -> None:
    for resolution in (64, 128):
        buckets = dataset_module.dataset_buckets(config_of(Path("x")), resolution, LATENT.pixel_multiple)
        assert all(bucket.width % 16 == bucket.height % 16 == 0 for bucket in buckets)
