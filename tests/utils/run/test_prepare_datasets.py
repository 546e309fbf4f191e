"""Datasets before a run: errors, skipped files, and which rank opens them."""

from __future__ import annotations

import json
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import toml
from PIL import Image

from tests.tiny_model import make_tiny_dataset, write_experiment, write_image
from utils.config.load import ConfigError
from utils.data.batches import BatchOrder
from utils.data.sources.readers import Readers
from utils.distributed.world import World
from utils.report.dataset_gather import BAD_FILES, MAX_SHOWN_IN_LOG
from utils.run import datasets
from utils.run.banner import describe, summary
from utils.run.datasets import BAD_FILE_ADVICE, MAX_BAD_FILES_SHOWN, SMALL_IMAGE_ADVICE, num_readers
from utils.run.experiment import Experiment
from utils.run.prepare import prepare

ALONE = World(0, 0, 1, 1)


class DatasetChecks:
    """Writes and prepares experiments on images that the test may damage."""

    def __init__(self, folder: Path, model: Path) -> None:
        self.folder, self._model = folder, model
        self.images = make_tiny_dataset(folder / "images", 6)

    def prepare(self, world: World = ALONE, *, check_only: bool = False, **changes: Any) -> Experiment:
        file = write_experiment(self.folder / "experiment", self._model, self.images, **changes)
        return prepare(file, [], None, world, check_only=check_only)

    def errors(self, **changes: Any) -> list[tuple[str, str, str]]:
        """(name of the file, key, message) of each error."""
        with pytest.raises(ConfigError) as caught:
            self.prepare(**changes)
        return [(error.file.name, error.key, error.message) for error in caught.value.errors]


@pytest.fixture
def checks(tmp_path: Path, tiny_model: Path, readers: Readers, monkeypatch: pytest.MonkeyPatch) -> DatasetChecks:
    monkeypatch.setattr(datasets, "Readers", lambda _: nullcontext(readers))  # all tests share one process
    return DatasetChecks(tmp_path, tiny_model)


def spoil(folder: Path, index: int = 0) -> Path:
    path = write_image(folder, index)
    path.write_bytes(b"no image")
    return path


# --- bad files ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("spoiled", "is_refused"), [("images", False), ("other", True)])
def test_bad_files_are_skipped_in_directories_configured_so(checks: DatasetChecks, spoiled: str, is_refused: bool) -> None:
    other = make_tiny_dataset(checks.folder / "other", 6)
    path = spoil(checks.folder / spoiled)
    directories = [{"path": str(checks.images), "on_bad_file": "skip"}, {"path": str(other)}]
    if is_refused:
        (name, _, _), *_, advice = checks.errors(dataset_file={"directory": directories})
        assert name == path.name
        assert advice == ("dataset.toml", "on_bad_file", BAD_FILE_ADVICE)
    else:
        dataset = checks.prepare(dataset_file={"directory": directories}).dataset
        assert ([bad.path for bad in dataset.bad_files], dataset.num_images) == ([path], 11)


@pytest.mark.parametrize("inner", ["error", "skip"])
def test_settings_of_an_inner_directory_apply_to_its_files(checks: DatasetChecks, inner: str) -> None:
    outer = "skip" if inner == "error" else "error"
    inside = make_tiny_dataset(checks.images / "inside", 3)
    spoil(inside)
    directories = [{"path": str(checks.images), "on_bad_file": outer}, {"path": str(inside), "on_bad_file": inner}]
    if inner == "skip":
        assert checks.prepare(dataset_file={"directory": directories}).dataset.num_images == 6 + 2
    else:
        assert checks.errors(dataset_file={"directory": directories})[-1][1] == "on_bad_file"


@pytest.mark.parametrize("key", ["mask_path", "control_path"])
def test_bad_masks_and_control_images_follow_their_directory(checks: DatasetChecks, key: str) -> None:
    paired_images = make_tiny_dataset(checks.folder / "paired", 6)
    spoil(paired_images)
    directory = {"path": str(checks.images), key: str(paired_images)}
    assert checks.errors(dataset_file={"directory": [directory]})[-1][1] == "on_bad_file"
    dataset = checks.prepare(dataset_file={"directory": [{**directory, "on_bad_file": "skip"}]}).dataset
    assert (dataset.num_images, [bad.path.parent for bad in dataset.bad_files]) == (5, [paired_images])


def test_long_lists_of_bad_files_are_shortened(checks: DatasetChecks) -> None:
    for index in range(10, 13 + MAX_BAD_FILES_SHOWN):
        spoil(checks.images, index)
    errors = checks.errors()
    assert len(errors) == MAX_BAD_FILES_SHOWN + 2
    assert errors[-2:] == [
        ("dataset.toml", "", "3 more files cannot be used"),
        ("dataset.toml", "on_bad_file", BAD_FILE_ADVICE),
    ]


def test_refused_run_lists_every_bad_file(checks: DatasetChecks) -> None:
    paths = [spoil(checks.images, index) for index in range(10, 13 + MAX_BAD_FILES_SHOWN)]
    checks.errors()
    lines = (checks.folder / "experiment" / "output" / BAD_FILES).read_text().splitlines()
    assert [json.loads(line)["path"] for line in lines] == list(map(str, paths))


@pytest.mark.parametrize("num_bad", [1, MAX_SHOWN_IN_LOG, MAX_SHOWN_IN_LOG + 3])
def test_banner_shows_the_first_skipped_files(checks: DatasetChecks, num_bad: int) -> None:
    for index in range(10, 10 + num_bad):
        spoil(checks.images, index)
    experiment = checks.prepare(dataset_file={"on_bad_file": "skip"})
    order = BatchOrder(experiment.dataset.examples, experiment.global_batch, 0)
    lines = [line.strip() for line in describe(experiment, order, "nowhere").splitlines() if "skipped: " in line]
    assert lines[0] == f"skipped: {checks.images / 'image_010.png'}: is not an image Pillow can read"
    assert len(lines) == min(num_bad, MAX_SHOWN_IN_LOG + 1)
    rest = f"skipped: 3 more files; a run lists all of them in {checks.folder / 'experiment' / 'output' / BAD_FILES}"
    assert (lines[-1] == rest) == (num_bad > MAX_SHOWN_IN_LOG)


@pytest.mark.parametrize(
    ("group", "each", "in_all", "num_steps"),
    [
        (None, "2.7 (0.7 repeated, 1.33x)", "8 (2 repeated, 1.33x)", 2),
        (4, "4 (2 repeated, 2.00x)", "12 (6 repeated, 2.00x)", 3),
    ],
)
def test_banner_shows_how_often_images_are_repeated(
    checks: DatasetChecks, group: int | None, each: str, in_all: str, num_steps: int
) -> None:
    """Two images of each of three buckets, in steps of four."""
    experiment = checks.prepare(**{"pipeline.bucket_group": group})
    rows = dict(summary(experiment, experiment.batch_order()))
    assert rows["global batch"].endswith(f" x 2 micro-batches x 1 replicas; {group or 2} at a time of one bucket")
    assert rows["draws per epoch"] == f"{in_all}; by bucket 16x48: {each}, 32x32: {each}, 48x16: {each}"
    assert rows["steps"] == f"4, {num_steps} per epoch"


def test_check_with_bad_files_writes_nothing(checks: DatasetChecks) -> None:
    spoil(checks.images)
    checks.errors(check_only=True)
    assert not (checks.folder / "experiment" / "output").exists()


def test_skipped_files_of_an_evaluation_set_are_reported(checks: DatasetChecks) -> None:
    other = make_tiny_dataset(checks.folder / "other", 3)
    bad = spoil(other)
    Image.new("RGB", (300, 300)).save(other / "image_001.png")
    file = checks.folder / "other.toml"
    table = {"resolutions": [32], "on_bad_file": "skip", "max_pixels": 80000, "directory": [{"path": str(other)}]}
    file.write_text(toml.dumps(table))
    dataset = checks.prepare(eval={"sets": [{"name": "other", "dataset": str(file)}]}).dataset
    assert [bad_file.path for bad_file in dataset.bad_files] == [bad]
    assert [skipped.path.name for skipped in dataset.skipped] == ["image_001.png"]


def test_bad_files_of_an_evaluation_set_are_errors_with_its_file(checks: DatasetChecks) -> None:
    other = make_tiny_dataset(checks.folder / "other", 2)
    spoil(other)
    file = checks.folder / "other.toml"
    file.write_text(toml.dumps({"resolutions": [32], "directory": [{"path": str(other)}]}))
    errors = checks.errors(eval={"sets": [{"name": "other", "dataset": str(file)}]})
    assert [(name, key) for name, key, _ in errors] == [("image_000.png", ""), ("other.toml", "on_bad_file")]


# --- small images ----------------------------------------------------------------------------------------------------


def test_small_images_are_errors_only_if_configured(checks: DatasetChecks) -> None:
    size = {"resolutions": [64]}
    Image.new("RGB", (100, 100)).save(checks.images / "image_005.png")
    errors = checks.errors(dataset_file={**size, "upscale": "error", "on_bad_file": "skip"})
    assert len(errors) == 5 + 1
    assert errors[0] == (
        "image_000.png",
        "",
        'is 40x40 pixels, smaller than its bucket 64x64; upscale = "error"',
    )
    assert errors[-1] == ("dataset.toml", "upscale", SMALL_IMAGE_ADVICE)
    assert any("enlarged" in text for text in checks.prepare(dataset_file=size).dataset.warnings)


def test_dataset_without_usable_images_is_an_error(checks: DatasetChecks) -> None:
    (error,) = checks.errors(dataset_file={"resolutions": [64], "upscale": "never"})
    assert error[:2] == ("dataset.toml", "directory")
    (error,) = checks.errors(dataset_file={"max_pixels": 9})
    assert error == ("dataset.toml", "directory", f"no usable image with a caption in {checks.images}")


# --- what is read and written ------------------------------------------------------------------------------------------


def test_other_ranks_open_no_images(checks: DatasetChecks, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets, "Readers", lambda *_: pytest.fail("a rank other than 0 reads images"))
    experiment = checks.prepare(World(1, 1, 2, 2), pipeline={"pipeline_stages": 1})
    assert (len(experiment.dataset.examples), experiment.stored_hashes) == (0, [])


def test_second_start_opens_no_image(checks: DatasetChecks, monkeypatch: pytest.MonkeyPatch) -> None:
    first = checks.prepare().dataset
    monkeypatch.setattr(Readers, "sizes", lambda *_: pytest.fail("an image was opened"))
    second = checks.prepare().dataset
    assert list(first.examples) == list(second.examples)


def test_check_writes_nothing(checks: DatasetChecks) -> None:
    checks.prepare(check_only=True)
    assert {path.name for path in (checks.folder / "experiment").iterdir()} == {"experiment.toml", "dataset.toml"}


def test_run_refused_for_its_settings_writes_nothing(checks: DatasetChecks) -> None:
    changes: dict[str, Any] = {"adapter": {"type": "lora", "targets": ["no"]}, "sampling": {"prompts": ["a"], "width": 40}}
    checks.errors(**changes)
    assert not (checks.folder / "experiment" / "output").exists()


def test_images_in_training_and_evaluation_give_a_warning(checks: DatasetChecks) -> None:
    file = checks.folder / "other.toml"
    file.write_text(toml.dumps({"resolutions": [32], "directory": [{"path": str(checks.images), "max_pixels": 1600}]}))
    experiment = checks.prepare(eval={"sets": [{"name": "other", "dataset": str(file)}], "holdout_images": 1})
    shared = {example.image for example in experiment.dataset.examples}
    num_both = len(shared & {example.image for example in experiment.eval_sets["other"]})
    assert f"{num_both} images of the evaluation set 'other' are also in the training set" in experiment.dataset.warnings
    assert list(experiment.eval_sets) == ["holdout", "other"]
    assert len(experiment.stored_hashes) == 2, "hashes of held-out images are stored with those of the training set"


@pytest.mark.parametrize(("cores", "ranks", "expected"), [(1, 1, 1), (8, 1, 7), (8, 4, 1), (64, 2, 16), (2, 8, 1)])
def test_readers_leave_a_core_to_each_rank(monkeypatch: pytest.MonkeyPatch, cores: int, ranks: int, expected: int) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(cores)))
    assert num_readers(World(0, 0, ranks, ranks)) == expected
