"""What is held out of a dataset, and what is refused of a dataset file."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from tests.tiny_model import make_tiny_dataset
from tests.utils.data.scanning import LATENT, Scan, config_of
from utils.data.dataset import dataset_buckets, directory_errors, hold_out, resolution_errors
from utils.data.examples import ExampleTable


def images(examples: ExampleTable) -> set[str]:
    return {example.image.path.name for example in examples}


def test_held_out_images_are_never_trained_on_at_any_size(scan_folders: Scan, tiny_dataset: Path) -> None:
    examples = scan_folders(tiny_dataset, resolutions=[32, 64]).examples
    training, held_out = hold_out(examples, 3, seed=0)
    assert len(images(held_out)) == 3
    assert images(training) | images(held_out) == images(examples)
    assert not images(training) & images(held_out)
    assert len(held_out) == 2 * 3
    for part in (training, held_out):
        assert [example for example in examples if example in list(part)] == list(part), "in their order"


def test_a_image_of_two_directories_is_in_one_part(scan_folders: Scan, tiny_dataset: Path, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tiny_dataset)
    training, held_out = hold_out(scan_folders(tiny_dataset, tmp_path / "link").examples, 4, seed=0)
    assert not images(training) & images(held_out)
    assert len(held_out) == 2 * 4
    alone, _ = hold_out(scan_folders(tiny_dataset).examples, 4, seed=0)
    assert images(alone) == images(training), "a second name of an image changes no choice"


def test_the_choice_is_a_function_of_the_seed(scan_folders: Scan, tiny_dataset: Path) -> None:
    examples = scan_folders(tiny_dataset).examples
    choices = [frozenset(images(hold_out(examples, 4, seed)[1])) for seed in (0, 0, 1, 2, 3)]
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
    assert images(hold_out(backwards, 4, 0)[1]) == choices[0]


def test_sizes_and_more_held_out_images_leave_the_first_choice(scan_folders: Scan, tiny_dataset: Path) -> None:
    few, more = (images(hold_out(scan_folders(tiny_dataset).examples, count, 5)[1]) for count in (3, 6))
    assert few < more
    assert images(hold_out(scan_folders(tiny_dataset, resolutions=[64]).examples, 3, 5)[1]) == few


@pytest.mark.parametrize("seed", range(5))
def test_a_image_that_comes_or_goes_changes_one_choice_at_most(scan_folders: Scan, tiny_dataset: Path, seed: int) -> None:
    examples = scan_folders(tiny_dataset).examples
    all_chosen = images(hold_out(examples, 4, seed)[1])
    for index, gone in enumerate(examples):
        chosen = images(hold_out(examples.where(np.arange(len(examples)) != index), 4, seed)[1])
        if gone.image.path.name in all_chosen:
            assert len(all_chosen - chosen) == 1
        else:
            assert chosen == all_chosen


def test_a_image_that_is_removed_from_its_folder_changes_one_choice_at_most(scan_folders: Scan, tmp_path: Path) -> None:
    make_tiny_dataset(tmp_path, 12)
    before = images(hold_out(scan_folders(tmp_path).examples, 4, 0)[1])
    (tmp_path / sorted(before)[0]).unlink()
    assert len(before - images(hold_out(scan_folders(tmp_path).examples, 4, 0)[1])) == 1
    left = sorted({path.name for path in tmp_path.glob("*.png")} - before)
    before = images(hold_out(scan_folders(tmp_path).examples, 4, 0)[1])
    (tmp_path / next(name for name in left if name not in before)).unlink()
    assert images(hold_out(scan_folders(tmp_path).examples, 4, 0)[1]) == before


def test_held_out_images_are_not_flipped(scan_folders: Scan, tiny_dataset: Path) -> None:
    found = scan_folders(directory=[{"path": tiny_dataset, "horizontal_flip": True, "loss_weight": 2.0}])
    training, held_out = hold_out(found.examples, 4, seed=0)
    assert {example.may_flip for example in training} == {True}
    assert {(example.may_flip, example.loss_weight) for example in held_out} == {(False, 2.0)}


def test_holding_out_nothing_leaves_everything(scan_folders: Scan, tiny_dataset: Path) -> None:
    examples = scan_folders(tiny_dataset).examples
    training, held_out = hold_out(examples, 0, seed=0)
    assert (list(training), list(held_out)) == (list(examples), [])


@pytest.mark.parametrize("num_images", [12, 13])
def test_something_must_be_left_to_train_on(scan_folders: Scan, tiny_dataset: Path, num_images: int) -> None:
    examples = scan_folders(tiny_dataset, resolutions=[32, 64]).examples
    with pytest.raises(ValueError, match="no image would remain for training: the dataset has 12 images"):
        hold_out(examples, num_images, seed=0)
    training, _ = hold_out(examples, 11, seed=0)
    assert len(images(training)) == 1


# --- resolutions -------------------------------------------------------------------------------------------------------


def test_a_resolution_off_the_grid_is_answered_with_its_neighbours(tmp_path: Path) -> None:
    errors = resolution_errors(config_of(tmp_path, resolutions=[64, 100, 50]), LATENT)
    assert errors == [
        ("resolutions[1]", "= 100: must be a multiple of 16; use 96 or 112"),
        ("resolutions[2]", "= 50: must be a multiple of 16; use 48 or 64"),
    ]


def test_a_resolution_beyond_the_position_table_is_refused_by_its_longest_side(tmp_path: Path) -> None:
    ((key, message),) = resolution_errors(config_of(tmp_path, resolutions=[128, 256]), LATENT)
    assert key == "resolutions[1]"
    assert message == "= 256: needs sides of 368 pixels; the network supports at most 256"
    assert resolution_errors(config_of(tmp_path, resolutions=[256], enable_ar_bucket=False), LATENT) == []


def test_the_buckets_of_every_resolution_fit_its_model() -> None:
    for resolution in (64, 128):
        buckets = dataset_buckets(config_of(Path("x")), resolution, LATENT.pixel_multiple)
        assert all(bucket.width % 16 == bucket.height % 16 == 0 for bucket in buckets)


def test_a_resolution_is_named_where_it_is_written(tmp_path: Path) -> None:
    directories = [{"path": tmp_path}, {"path": tmp_path, "resolutions": [32, 24]}, {"path": tmp_path}]
    keys = [key for key, _ in resolution_errors(config_of(directory=directories, resolutions=[40, 32]), LATENT)]
    assert keys == ["resolutions[0]", "directory[1].resolutions[1]"], "once, though two directories have it"


# --- folders -----------------------------------------------------------------------------------------------------------


def test_what_is_no_folder_and_no_archive_is_refused(tmp_path: Path) -> None:
    for name in ("a.zip", "b.TAR", "c.parquet"):
        (tmp_path / name).write_text("")
    paths = [tmp_path, tmp_path / "none", tmp_path / "a.zip", tmp_path / "b.TAR", tmp_path / "c.parquet"]
    assert directory_errors(config_of(*paths)) == [
        (f"directory[{index}].path", f"{paths[index]} is neither a folder nor a .tar or .parquet file") for index in (1, 2)
    ]


@pytest.mark.parametrize("key", ["mask_path", "control_path"])
def test_paired_images_must_be_in_a_folder_of_their_own(tmp_path: Path, key: str) -> None:
    images = make_tiny_dataset(tmp_path / "images", 1)
    (tmp_path / "link").symlink_to(images)

    def error(folder: Path) -> str:
        ((place, message),) = directory_errors(config_of(directory=[{"path": images, key: folder}]))
        assert place == f"directory[0].{key}"
        return message

    assert error(tmp_path / "none") == f"{tmp_path / 'none'} is not a folder"
    assert error(images) == error(tmp_path / "link") == "must be a different folder than path"
    assert directory_errors(config_of(directory=[{"path": images, key: tmp_path}])) == []
