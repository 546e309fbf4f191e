"""Held-out images, and validation of dataset files against the model."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from tests.tiny_model import make_tiny_dataset
from tests.utils.data.scanning import LATENT, Scan, config_of
from utils.data.dataset import dataset_buckets, directory_errors, hold_out, resolution_errors
from utils.data.examples import ExampleTable


def image_names(examples: ExampleTable) -> set[str]:
    return {example.image.path.name for example in examples}


def test_held_out_images_are_excluded_from_training_at_all_resolutions(scan_folders: Scan, tiny_dataset: Path) -> None:
    examples = scan_folders(tiny_dataset, resolutions=[32, 64]).examples
    training, held_out = hold_out(examples, 3, seed=0)
    assert len(image_names(held_out)) == 3
    assert image_names(training) | image_names(held_out) == image_names(examples)
    assert not image_names(training) & image_names(held_out)
    assert len(held_out) == 2 * 3
    for part in (training, held_out):
        assert [example for example in examples if example in list(part)] == list(part), "the order is kept"


def test_image_in_two_directories_is_in_only_one_part(scan_folders: Scan, tiny_dataset: Path, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tiny_dataset)
    training, held_out = hold_out(scan_folders(tiny_dataset, tmp_path / "link").examples, 4, seed=0)
    assert not image_names(training) & image_names(held_out)
    assert len(held_out) == 2 * 4
    alone, _ = hold_out(scan_folders(tiny_dataset).examples, 4, seed=0)
    assert image_names(alone) == image_names(training), "a second name of an image does not change the choice"


def test_choice_depends_only_on_the_seed(scan_folders: Scan, tiny_dataset: Path) -> None:
    examples = scan_folders(tiny_dataset).examples
    choices = [frozenset(image_names(hold_out(examples, 4, seed)[1])) for seed in (0, 0, 1, 2, 3)]
    assert choices[0] == choices[1]
    assert len(set(choices)) > 2
    backwards = ExampleTable(
        examples.directories,
        examples.containers,
        examples.buckets,
        examples.images,
        examples.masks,
        examples.controls,
        examples.rows[::-1],
    )
    assert image_names(hold_out(backwards, 4, 0)[1]) == choices[0]


def test_more_resolutions_or_held_out_images_keep_the_first_choices(scan_folders: Scan, tiny_dataset: Path) -> None:
    few, more = (image_names(hold_out(scan_folders(tiny_dataset).examples, count, 5)[1]) for count in (3, 6))
    assert few < more
    assert image_names(hold_out(scan_folders(tiny_dataset, resolutions=[64]).examples, 3, 5)[1]) == few


@pytest.mark.parametrize("seed", range(5))
def test_adding_or_removing_an_image_changes_at_most_one_choice(scan_folders: Scan, tiny_dataset: Path, seed: int) -> None:
    examples = scan_folders(tiny_dataset).examples
    all_chosen = image_names(hold_out(examples, 4, seed)[1])
    for index, removed in enumerate(examples):
        chosen = image_names(hold_out(examples.where(np.arange(len(examples)) != index), 4, seed)[1])
        if removed.image.path.name in all_chosen:
            assert len(all_chosen - chosen) == 1
        else:
            assert chosen == all_chosen


def test_deleting_an_image_file_changes_at_most_one_choice(scan_folders: Scan, tmp_path: Path) -> None:
    make_tiny_dataset(tmp_path, 12)
    before = image_names(hold_out(scan_folders(tmp_path).examples, 4, 0)[1])
    (tmp_path / sorted(before)[0]).unlink()
    assert len(before - image_names(hold_out(scan_folders(tmp_path).examples, 4, 0)[1])) == 1
    not_chosen = sorted({path.name for path in tmp_path.glob("*.png")} - before)
    before = image_names(hold_out(scan_folders(tmp_path).examples, 4, 0)[1])
    (tmp_path / next(name for name in not_chosen if name not in before)).unlink()
    assert image_names(hold_out(scan_folders(tmp_path).examples, 4, 0)[1]) == before


def test_held_out_images_are_not_flipped(scan_folders: Scan, tiny_dataset: Path) -> None:
    dataset = scan_folders(directory=[{"path": tiny_dataset, "horizontal_flip": True, "loss_weight": 2.0}])
    training, held_out = hold_out(dataset.examples, 4, seed=0)
    assert {example.may_flip for example in training} == {True}
    assert {(example.may_flip, example.loss_weight) for example in held_out} == {(False, 2.0)}


def test_holding_out_no_images_keeps_all_for_training(scan_folders: Scan, tiny_dataset: Path) -> None:
    examples = scan_folders(tiny_dataset).examples
    training, held_out = hold_out(examples, 0, seed=0)
    assert (list(training), list(held_out)) == (list(examples), [])


@pytest.mark.parametrize("num_images", [12, 13])
def test_at_least_one_training_image_must_remain(scan_folders: Scan, tiny_dataset: Path, num_images: int) -> None:
    examples = scan_folders(tiny_dataset, resolutions=[32, 64]).examples
    with pytest.raises(ValueError, match="no image would remain for training: the dataset has 12 images"):
        hold_out(examples, num_images, seed=0)
    training, _ = hold_out(examples, 11, seed=0)
    assert len(image_names(training)) == 1


# --- resolutions -------------------------------------------------------------------------------------------------------


def test_invalid_resolution_error_suggests_the_nearest_multiples(tmp_path: Path) -> None:
    errors = resolution_errors(config_of(tmp_path, resolutions=[64, 100, 50]), LATENT)
    assert errors == [
        ("resolutions[1]", "= 100: must be a multiple of 16; use 96 or 112"),
        ("resolutions[2]", "= 50: must be a multiple of 16; use 48 or 64"),
    ]


def test_resolution_is_rejected_if_its_longest_side_exceeds_the_position_table(tmp_path: Path) -> None:
    ((key, message),) = resolution_errors(config_of(tmp_path, resolutions=[128, 256]), LATENT)
    assert key == "resolutions[1]"
    assert message == "= 256: needs sides of 368 pixels; the network supports at most 256"
    assert resolution_errors(config_of(tmp_path, resolutions=[256], enable_ar_bucket=False), LATENT) == []


def test_bucket_sides_are_multiples_of_the_model_s_pixel_multiple() -> None:
    for resolution in (64, 128):
        buckets = dataset_buckets(config_of(Path("x")), resolution, LATENT.pixel_multiple)
        assert all(bucket.width % 16 == bucket.height % 16 == 0 for bucket in buckets)


def test_resolution_errors_name_the_key_that_contains_the_value(tmp_path: Path) -> None:
    directories = [{"path": tmp_path}, {"path": tmp_path, "resolutions": [32, 24]}, {"path": tmp_path}]
    keys = [key for key, _ in resolution_errors(config_of(directory=directories, resolutions=[40, 32]), LATENT)]
    assert keys == ["resolutions[0]", "directory[1].resolutions[1]"], "an error shared by two directories is listed once"


# --- folders -----------------------------------------------------------------------------------------------------------


def test_directory_path_must_be_a_folder_or_an_archive(tmp_path: Path) -> None:
    for name in ("a.zip", "b.TAR", "c.parquet"):
        (tmp_path / name).write_text("")
    paths = [tmp_path, tmp_path / "none", tmp_path / "a.zip", tmp_path / "b.TAR", tmp_path / "c.parquet"]
    assert directory_errors(config_of(*paths)) == [
        (f"directory[{index}].path", f"{paths[index]} is neither a folder nor a .tar or .parquet file") for index in (1, 2)
    ]


@pytest.mark.parametrize("key", ["mask_path", "control_path"])
def test_paired_images_must_be_in_a_separate_existing_folder(tmp_path: Path, key: str) -> None:
    images = make_tiny_dataset(tmp_path / "images", 1)
    (tmp_path / "link").symlink_to(images)

    def error(folder: Path) -> str:
        ((error_key, message),) = directory_errors(config_of(directory=[{"path": images, key: folder}]))
        assert error_key == f"directory[0].{key}"
        return message

    assert error(tmp_path / "none") == f"{tmp_path / 'none'} is not a folder"
    assert error(images) == error(tmp_path / "link") == "must be a different folder than path"
    assert directory_errors(config_of(directory=[{"path": images, key: tmp_path}])) == []
