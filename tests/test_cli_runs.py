"""Runs from the command line: launchers, bad images, non-finite losses, caching only, and the run folder."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
from safetensors.torch import save_file

from tests.cli_bench import Bench, cut_off, spoil_caption, spoil_pixels, tree
from tests.distributed.lab import Lab
from tests.distributed.launch import newest_run, run_alone, run_deepspeed, run_torchrun, start_ranks
from tests.tiny_model import make_tiny_dataset, random_weights, tiny_shapes
from utils.config.load import load_config
from utils.report.dataset_gather import DATASET_REPORT


@pytest.fixture
def bench(
    tmp_path: Path, tiny_model: Path, tiny_dataset: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> Bench:
    return Bench(tmp_path / "experiment", tiny_model, tiny_dataset, capfd, monkeypatch)


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """Six images that the test may damage."""
    return make_tiny_dataset(tmp_path / "images", num_images=6)


@pytest.fixture(scope="module")
def lab(tiny_model: Path, tiny_dataset: Path, common_folder: Path) -> Lab:
    return Lab(tiny_model, tiny_dataset, common_folder / "lab")


# --- images and captions ---------------------------------------------------------------------------------------------


@pytest.mark.distributed
def test_bad_files_are_skipped_if_configured(lab: Lab, images: Path) -> None:
    """Three of six images are bad, one only when it is decoded; each is logged once, and the others are trained on."""
    bad = [spoil_caption(images), cut_off(images), spoil_pixels(images)]
    experiment = lab.experiment({"dataset_file": {"on_bad_file": "skip"}, "epochs": 1}, images)
    run = lab.run(2, experiment)
    for path in bad:
        assert run.output.count(f"skipped: {path}: ") == 1
    listed = [json.loads(line) for line in (experiment.parent / "output" / "bad_files.jsonl").read_text().splitlines()]
    assert sorted(entry["path"] for entry in listed) == sorted(map(str, bad))
    assert {entry["kind"] for entry in listed} == {"bad"}
    # Images 0, 4 and 5 have three shapes, so each fills a group of its own with repeats; a step has two groups.
    assert run.last_step == 2


@pytest.mark.distributed
@pytest.mark.parametrize("num_processes", [1, 2])
def test_image_that_cannot_be_decoded_ends_caching_with_its_path(lab: Lab, images: Path, num_processes: int) -> None:
    path = spoil_pixels(images)
    experiment = lab.experiment({}, images)
    assert lab.finish(1, experiment, "--check").exit_code == 0, "its header is valid"
    ranks = lab.start(num_processes, experiment)
    finished = ranks.wait(limit_seconds=60)
    assert finished.exit_code == 1
    assert finished.output.count(f"{path}: cannot be decoded: ") == 1
    assert "on_bad_file" in finished.output
    assert "Traceback" not in finished.output


@pytest.mark.distributed
def test_non_finite_loss_stops_the_run_with_the_examples_of_the_batch(lab: Lab, tmp_path: Path) -> None:
    weights = random_weights(tiny_shapes())
    weights["joint_blocks.0.x_block.mlp.fc1.bias"][0] = float("nan")
    save_file(weights, tmp_path / "spoiled.safetensors")
    experiment = lab.experiment({"model.mmdit": str(tmp_path / "spoiled.safetensors")})
    finished = lab.finish(2, experiment)
    assert finished.exit_code == 1
    assert "step 1: loss nan" in finished.output
    assert finished.output.count("0/image_") >= 4
    run = newest_run(experiment.parent / "output")
    assert not (run / "weights").exists()
    assert not (run / "checkpoints").exists()


# --- as real processes -------------------------------------------------------------------------------------------------


@pytest.mark.distributed
def test_torchrun_ends_soon_and_reports_errors_once(bench: Bench) -> None:
    experiment = bench.experiment(**{"optimizer.learning_rat": 1e-4})
    before = tree(bench.folder)
    finished = run_torchrun(2, "--config", str(experiment), limit_seconds=60)
    assert finished.exit_code == 1
    assert finished.output.count("did you mean `learning_rate`?") == 1
    assert finished.seconds < 30
    assert tree(bench.folder) == before


@pytest.mark.distributed
def test_deepspeed_ends_soon_and_reports_errors_once(bench: Bench) -> None:
    experiment = bench.experiment(**{"pipeline.pipeline_stages": 3})
    before = tree(bench.folder)
    finished = run_deepspeed(2, "--config", str(experiment), limit_seconds=60)
    assert finished.exit_code == 1
    assert finished.output.count("must divide the number of processes, 2") == 1
    assert finished.seconds < 30
    assert tree(bench.folder) == before


@pytest.mark.distributed
def test_bad_input_exits_with_1(bench: Bench) -> None:
    missing = bench.folder / "nothing.toml"
    finished = run_alone("--config", str(missing))
    assert finished.exit_code == 1
    assert f"{missing}: does not exist" in finished.output
    assert "Traceback" not in finished.output
    assert not bench.folder.exists()


@pytest.mark.distributed
def test_help_exits_with_0_and_wrong_usage_with_2() -> None:
    shown = run_alone("--help")
    assert shown.exit_code == 0
    assert all(option in shown.output for option in ("--config", "--check", "--cache-only", "--report", "--resume", "--set"))
    assert "local_rank" not in shown.output
    wrong = run_alone("--confg", "x.toml")
    assert wrong.exit_code == 2
    assert "--config" in wrong.output


@pytest.mark.distributed
def test_check_prints_the_banner_and_writes_nothing(bench: Bench) -> None:
    experiment = bench.experiment()
    before = tree(bench.folder)
    finished = run_alone("--config", str(experiment), "--check", "--set", "max_steps=5")
    assert finished.exit_code == 0
    assert "12 (12 examples; by bucket 16x48: 4, 32x32: 4, 48x16: 4)" in finished.output
    assert "5, 3 per epoch" in finished.output
    assert str(bench.folder / "output") in finished.output
    assert tree(bench.folder) == before


# --- caching only ------------------------------------------------------------------------------------------------------


def shards(cache: Path) -> dict[Path, int]:
    """Every shard with its modification time."""
    return {path: path.stat().st_mtime_ns for path in cache.glob("*/*/*.safetensors")}


@pytest.mark.distributed
@pytest.mark.parametrize("option", ["--cache-only", "--report"])
def test_run_after_cache_only_encodes_nothing(lab: Lab, option: str) -> None:
    experiment = lab.experiment({"cache_dir": None, "max_steps": 2})
    output = experiment.parent / "output"
    finished = lab.finish(2, experiment, option)
    assert finished.exit_code == 0, finished.output
    assert {path.name for path in output.iterdir()} == {"cache", DATASET_REPORT}, "and no run folder"
    assert "a yellow circle" in (output / DATASET_REPORT).read_text(encoding="utf-8")
    before = shards(output / "cache")
    assert {path.parents[1].name.rpartition("-")[0] for path in before} == {"vae", "clip_l", "clip_g", "t5xxl"}
    run = lab.run(2, experiment)
    assert "caching: all entries are in" in run.output
    assert "caching " not in run.output
    assert shards(output / "cache") == before
    assert run.last_step == 2


@pytest.mark.distributed
def test_report_option_rewrites_the_dataset_report(lab: Lab) -> None:
    experiment = lab.experiment({"cache_dir": None, "max_steps": 2})
    page = experiment.parent / "output" / DATASET_REPORT
    assert lab.finish(1, experiment, "--cache-only").exit_code == 0
    page.write_text("an old page")
    assert lab.finish(1, experiment, "--cache-only").exit_code == 0
    assert page.read_text() == "an old page", "nothing has changed since"
    assert lab.finish(1, experiment, "--report").exit_code == 0
    assert page.read_text() != "an old page"


@pytest.mark.distributed
def test_cache_without_disk_space_is_an_error(lab: Lab) -> None:
    experiment = lab.experiment({"cache_dir": None, "max_steps": 2})
    log = experiment.parent / "log.txt"
    finished = start_ranks(2, ["--config", str(experiment)], log, "tests.distributed.full_disk_ranks").wait()
    assert finished.exit_code == 1
    assert finished.output.count("of free disk space and caching takes") == 1
    assert f"{experiment}, line" in finished.output or f"{experiment}: cache_dir: " in finished.output
    assert "Traceback" not in finished.output
    assert not shards(experiment.parent / "output" / "cache")


# --- the run folder ----------------------------------------------------------------------------------------------------


@pytest.mark.distributed
def test_run_folder_has_the_resolved_configuration(lab: Lab, tmp_path: Path) -> None:
    """config.toml and dataset.toml load to the configuration that was used, overrides included."""
    changes = {"adapter": {"type": "lora", "rank": 2}, "optimizer.args": {"betas": [0.8, 0.9]}, "sampling.prompts": []}
    run = lab.shared_run(1, changes)
    original, resolved = load_config(run.experiment), load_config(run.folder / "config.toml")
    assert resolved.experiment.model_dump() == original.experiment.model_dump()
    shutil.copy(run.folder / "dataset.toml", tmp_path)
    moved = load_config(run.folder / "config.toml", [f"dataset={tmp_path / 'dataset.toml'}"])
    assert moved.dataset == original.dataset

    again = lab.run(1, run.experiment, "--set", "seed=3", "--set", "max_steps=2")
    overridden = load_config(again.folder / "config.toml").experiment
    assert (overridden.seed, overridden.max_steps) == (3, 2)
    assert again.last_step == 2
    assert again.folder != run.folder


@pytest.mark.distributed
def test_run_folder_has_no_partial_and_no_executable_files(lab: Lab) -> None:
    changes = {"adapter": {"type": "lora", "rank": 2}, "sampling.prompts": [], "monitoring.report": True}
    run = lab.shared_run(1, changes)
    files = [path for path in run.experiment.parent.rglob("*") if path.is_file() and "log_" not in path.name]
    assert {path.suffix for path in files} == {".toml", ".jsonl", ".json", ".safetensors", ".html"}
    assert not [path for path in files if path.name.startswith(".")]
    assert newest_run(run.experiment.parent / "output") == run.folder
    assert not os.access(files[0], os.X_OK)
