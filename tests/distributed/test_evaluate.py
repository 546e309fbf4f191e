"""Evaluation in complete runs: correct, equal on any layout and after a resume, and without an effect on training."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import toml
import torch
from PIL import Image
from safetensors.torch import load_file

from models.family import ModelFamily
from tests.distributed.lab import Lab, Run
from tests.distributed.launch import newest_run
from tests.distributed.test_layouts import FULL, LORA, assert_same_run, assert_same_weights
from tests.distributed.test_resume import STOP, copy_of, stopped
from tests.tiny_model import make_tiny_dataset, write_image
from utils.checkpoint.manifest import step_folder
from utils.data.encoding.encoded import EncodedData
from utils.data.encoding.plan import CacheSettings, make_plan
from utils.distributed.world import World
from utils.evaluation.points import EvaluationPoint, make_points, noise_of
from utils.evaluation.results import EVALUATIONS, EvaluationResult, read_evaluations
from utils.objective import rectified_flow
from utils.objective.objective import Objective
from utils.run.prepare import prepare

pytestmark = pytest.mark.distributed

NUM_IMAGES = 7
NUM_BINS = 2
BATCH_SIZE = 4
"""The set has 6, 4 and 4 points of three shapes: one batch is partial."""
AVERAGED: dict[str, Any] = {"ema": {"decay": 0.35}, "eval.weights": "ema"}
ADDITIVE: dict[str, Any] = {"objective.model_prediction_type": "additive"}
REPLICAS: dict[str, Any] = {"pipeline.pipeline_stages": 1, "pipeline.gradient_accumulation_steps": 2}
STAGES_AND_REPLICAS: dict[str, Any] = {**REPLICAS, "pipeline.pipeline_stages": 2}


@pytest.fixture(scope="module")
def other_set(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The dataset file of images that are not trained on."""
    folder = tmp_path_factory.mktemp("other_set")
    for index in range(20, 20 + NUM_IMAGES):
        write_image(folder, index)
    table = {
        "resolutions": [32],
        "min_ar": 0.5,
        "max_ar": 2.0,
        "num_ar_buckets": 3,
        "directory": [{"path": str(folder)}],
    }
    (folder.parent / f"{folder.name}.toml").write_text(toml.dumps(table))
    return folder.parent / f"{folder.name}.toml"


def with_eval(changes: Mapping[str, Any], other_set: Path) -> dict[str, Any]:
    """The changes and an evaluation every second step."""
    return {
        "eval": {
            "sets": [{"name": "other", "dataset": str(other_set)}],
            "every_n_steps": 2,
            "num_t_bands": NUM_BINS,
            "batch_size": BATCH_SIZE,
        },
        **changes,
    }


def evaluations(run: Run) -> list[EvaluationResult]:
    return read_evaluations(run.folder / EVALUATIONS)


def file_of(run: Run) -> str:
    return (run.folder / EVALUATIONS).read_text()


# --- losses -------------------------------------------------------------------------------------------------------------


def points_of(run: Run, *overrides: str) -> tuple[ModelFamily, EncodedData, list[EvaluationPoint]]:
    """Returns the network of the run, or another with overrides; its cache; its evaluation points."""
    experiment = prepare(run.experiment, overrides, None, World(0, 0, 1, 1), check_only=True)
    config = experiment.config.experiment
    tables = list(experiment.eval_sets.values())
    assert not any(table.num_unhashed() for table in tables), "the run has hashed them"
    plan = make_plan(experiment.family, tables, [], CacheSettings(config.cache_folder, posterior=False, text_dtype=None))
    assert plan.num_bytes == 0, "everything is cached"
    objective = Objective(config.objective, experiment.family.shift_at)
    points = make_points(experiment.eval_sets, NUM_BINS, config.seed, objective.shift_at)
    return experiment.family, EncodedData(plan.folders), points


@torch.no_grad()
def direct_losses(run: Run, network: Path, seed: int = 7, additive: bool = False) -> list[float]:
    """Returns the loss of every point, computed one at a time through the layers of a network file in sequence."""
    family, data, points = points_of(run, f"model.mmdit={network}")
    layers = [layer.build() for layer in family.layers]
    found = []
    for point in points:
        latents = data.latents(point.example)[None]
        noise = noise_of(point, tuple(latents.shape[1:]), seed)[None]
        sigma = torch.tensor([point.sigma])
        noisy = rectified_flow.add_noise(latents, noise, sigma)
        text = {name: tensor[None] for name, tensor in data.text(point.example.caption()).items()}
        sample = family.sample(noisy, sigma, text)
        value: Any = sample.tensors
        for layer in layers:
            value = layer(value)
        velocity = family.velocity(value, sample.shape) + (noisy if additive else 0)
        found.append(float((velocity - (noise - latents)).double().square().mean()))
    return found


def exported(run: Run, *inner: str) -> Path:
    return run.folder.joinpath("weights", f"step_{run.last_step:06d}", *inner, "mmdit.safetensors")


def test_losses_agree_with_the_layers_of_the_network_run_in_sequence(lab: Lab, other_set: Path) -> None:
    run = lab.shared_run(2, with_eval(FULL, other_set))
    first, *_, last = evaluations(run)
    assert [result.step for result in evaluations(run)] == [0, 2, 4, 6]
    assert len(first.losses) == NUM_IMAGES * NUM_BINS
    assert first.losses == pytest.approx(direct_losses(run, lab.model / "mmdit.safetensors"), rel=1e-6)
    assert last.losses == pytest.approx(direct_losses(run, exported(run)), rel=1e-6)
    assert last.loss == pytest.approx(sum(last.losses) / len(last.losses), rel=1e-14)
    assert all(abs(one / other - 1) > 1e-4 for one, other in zip(first.losses, last.losses, strict=True))


def test_losses_of_averaged_weights_agree_with_the_exported_average(lab: Lab, other_set: Path) -> None:
    run = lab.shared_run(2, with_eval(AVERAGED, other_set))
    last = evaluations(run)[-1]
    assert last.losses == pytest.approx(direct_losses(run, exported(run, "ema")), rel=1e-6)
    assert last.losses != pytest.approx(direct_losses(run, exported(run)), rel=1e-4)
    plain = evaluations(lab.shared_run(2, with_eval(FULL, other_set)))
    assert evaluations(run)[0].losses == plain[0].losses, "there is no average before the first step"


def test_an_additive_output_is_converted_to_a_velocity(lab: Lab, other_set: Path) -> None:
    run = lab.shared_run(2, with_eval(ADDITIVE, other_set))
    expected = direct_losses(run, lab.model / "mmdit.safetensors", additive=True)
    assert evaluations(run)[0].losses == pytest.approx(expected, rel=1e-6)


def test_the_points_depend_on_seed_and_images_only(lab: Lab, other_set: Path) -> None:
    """They do not depend on density, bounds or dropout of the objective; another seed gives other points."""
    plain = evaluations(lab.shared_run(1, with_eval(FULL, other_set)))[0]
    narrow = {"objective.min_t": 0.4, "objective.max_t": 0.6, "objective.caption_dropout_rate": 1.0, "max_steps": 1}
    narrow["objective.encoder_dropout_rate"] = 1.0
    same = evaluations(lab.run(1, lab.experiment(with_eval(narrow, other_set))))[0]
    assert (same.fingerprint, same.losses) == (plain.fingerprint, plain.losses)
    other = evaluations(lab.run(1, lab.experiment(with_eval({"seed": 8, "max_steps": 1}, other_set))))[0]
    assert other.fingerprint != plain.fingerprint


# --- layouts -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("changes", [FULL, LORA, AVERAGED], ids=["full", "lora", "averaged"])
def test_any_number_of_stages_gives_the_same_bits(lab: Lab, other_set: Path, changes: dict[str, Any]) -> None:
    wanted = with_eval(changes, other_set)
    assert file_of(lab.shared_run(1, wanted)) == file_of(lab.shared_run(2, wanted))


def test_three_stages_give_the_same_bits(lab: Lab, other_set: Path) -> None:
    """The stage in the middle gets neither inputs nor targets."""
    wanted = with_eval(FULL, other_set)
    assert file_of(lab.shared_run(1, wanted)) == file_of(lab.shared_run(3, wanted))


@pytest.mark.parametrize(
    ("num_processes", "changes"), [(2, REPLICAS), (4, STAGES_AND_REPLICAS)], ids=["2 replicas", "2 stages, 2 replicas"]
)
def test_replicas_give_the_same_bits_for_the_same_weights(
    lab: Lab, other_set: Path, num_processes: int, changes: dict[str, Any]
) -> None:
    """Before training the bits are equal; then the losses differ as much as the weights do."""
    one = evaluations(lab.shared_run(1, with_eval(FULL, other_set)))
    replicas = evaluations(lab.shared_run(num_processes, with_eval(changes, other_set)))
    assert one[0] == replicas[0]
    assert [result.step for result in one] == [result.step for result in replicas]
    for result, other in zip(one, replicas, strict=True):
        assert result.losses == pytest.approx(other.losses, rel=1e-3)


def test_bfloat16_stages_give_the_same_bits(lab: Lab, other_set: Path) -> None:
    wanted = with_eval({"model.dtype": "bfloat16"}, other_set)
    one, two = lab.shared_run(1, wanted), lab.shared_run(2, wanted)
    assert file_of(one) == file_of(two)
    high = evaluations(lab.shared_run(1, with_eval(FULL, other_set)))
    assert evaluations(one)[0].losses == pytest.approx(high[0].losses, rel=0.02)


# --- no effect ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("num_processes", "changes"), [(1, FULL), (2, FULL), (2, LORA), (2, REPLICAS)], ids=["1", "2", "lora", "replicas"]
)
def test_evaluation_does_not_change_training(lab: Lab, other_set: Path, num_processes: int, changes: dict[str, Any]) -> None:
    plain, evaluated = lab.shared_run(num_processes, changes), lab.shared_run(num_processes, with_eval(changes, other_set))
    assert len(evaluations(evaluated)) == 4
    assert_same_run(plain, evaluated)


def test_evaluation_of_averaged_weights_does_not_change_training(lab: Lab, other_set: Path) -> None:
    plain = lab.shared_run(2, {"ema": AVERAGED["ema"]})
    evaluated = lab.shared_run(2, with_eval(AVERAGED, other_set))
    assert_same_run(plain, evaluated)
    assert_same_weights(load_file(exported(plain, "ema")), load_file(exported(evaluated, "ema")))


# --- resuming ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("changes", [FULL, AVERAGED], ids=["last", "averaged"])
def test_a_resumed_run_compares_as_an_uninterrupted_one(
    lab: Lab, other_set: Path, tmp_path: Path, changes: dict[str, Any]
) -> None:
    """It resumes from a checkpoint before the last evaluation, which is repeated."""
    straight = lab.shared_run(2, with_eval(changes, other_set))
    experiment = copy_of(straight, tmp_path / "copy")
    shutil.rmtree(step_folder(newest_run(experiment.parent / "output") / "checkpoints", straight.last_step))
    resumed = lab.run(2, experiment, "--resume")
    assert [resumed.output.count(f"evaluation at step {step} ") for step in (0, STOP, 6)] == [0, 0, 1]
    assert file_of(resumed) == file_of(straight)
    last = evaluations(resumed)[-1].groups[0]
    assert last.to_start is not None
    assert last.to_start.to_step == 0
    assert_same_run(straight, resumed)


def test_a_run_resumed_with_other_points_starts_a_new_comparison(lab: Lab, other_set: Path, tmp_path: Path) -> None:
    run = stopped(lab, with_eval(FULL, other_set))
    experiment = copy_of(run, tmp_path / "copy")
    resumed = lab.run(2, experiment, "--resume", "--set", "eval.num_t_bands=3")
    assert "3 evaluations in " in resumed.output
    results = evaluations(resumed)
    assert [result.step for result in results] == [0, 2, STOP, STOP + 1, 6]
    assert results[:3] == evaluations(run)
    start = results[-1].groups[0].to_start
    assert start is not None
    assert start.to_step == STOP + 1


# --- output ------------------------------------------------------------------------------------------------------------


def test_each_evaluation_is_printed_once(lab: Lab, other_set: Path) -> None:
    output = lab.shared_run(2, with_eval(FULL, other_set)).output
    assert [output.count(f"evaluation at step {step} ") for step in (0, 2, 4, 6)] == [1, 1, 1, 1]
    assert "change since step 0 (95%)" in output


def test_held_out_images_are_a_set_of_their_own(lab: Lab, other_set: Path) -> None:
    wanted = with_eval({"eval.holdout_images": 3, "max_steps": 2}, other_set)
    result = evaluations(lab.run(2, lab.experiment(wanted)))[-1]
    counts = {group.name: group.num_images for group in result.groups}
    bins = {"t 0.00-0.50": 3 + NUM_IMAGES, "t 0.50-1.00": 3 + NUM_IMAGES}
    assert counts == {"all": 3 + NUM_IMAGES, "set holdout": 3, "set other": NUM_IMAGES, **bins}


def test_curves_are_written_for_tensorboard(lab: Lab, other_set: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    wanted = with_eval({"monitoring.tensorboard": True}, other_set)
    run = lab.run(1, lab.experiment(wanted))
    events = EventAccumulator(str(run.folder))
    events.Reload()
    results = evaluations(run)
    for name, value_of in {
        "eval/loss": lambda result: result.groups[0].loss,
        "eval/loss_t_0.50-1.00": lambda result: result.groups[2].loss,
    }.items():
        scalars = [(scalar.step, scalar.value) for scalar in events.Scalars(name)]
        assert scalars == [(result.step, pytest.approx(value_of(result), rel=1e-6)) for result in results]
    assert [scalar.step for scalar in events.Scalars("eval/difference_to_start_high")] == [2, 4, 6]


@pytest.mark.parametrize(("learning_rate", "is_better"), [(1e-3, True), (3e-2, False)], ids=["falling", "rising"])
def test_the_best_weights_are_kept(lab: Lab, other_set: Path, learning_rate: float, is_better: bool) -> None:
    """The weights of the step with the lowest mean loss are kept; none when step 0 was the best."""
    changes = {"eval.keep_best": True, "save.export_every_n_steps": 2, "optimizer.learning_rate": learning_rate}
    run = lab.run(2, lab.experiment(with_eval(changes, other_set)))
    lowest = min(evaluations(run), key=lambda result: result.loss)
    assert (lowest.step > 0) == is_better
    kept = [path.name for path in (run.folder / "best").glob("*")]
    assert kept == ([f"step_{lowest.step:06d}"] if is_better else [])
    for name in kept:
        best, exported_then = (run.folder / folder / name / "mmdit.safetensors" for folder in ("best", "weights"))
        assert_same_weights(load_file(best), load_file(exported_then))


def test_best_weights_after_the_step_that_is_resumed_from_are_removed(lab: Lab, other_set: Path) -> None:
    """A run resumed from step 2 with another learning rate keeps the best weights of step 2 and removes those of step 4."""
    changes = {"eval.keep_best": True, "save.checkpoint_every_n_steps": 2, "max_steps": 4}
    run = lab.run(1, lab.experiment(with_eval(changes, other_set)))
    assert [path.name for path in (run.folder / "best").iterdir()] == ["step_000004"], (
        "the checkpoint of step 4 makes older ones unnecessary"
    )
    shutil.rmtree(run.folder / "checkpoints" / "step_000004")
    (run.folder / "best" / "step_000002").mkdir()
    resumed = lab.run(1, run.experiment, "--resume", "--set", "optimizer.learning_rate=10.0", "--set", "max_steps=3")
    assert "resuming from step 2" in resumed.output
    assert [result.step for result in evaluations(resumed)] == [0, 2, 3]
    assert not evaluations(resumed)[-1].is_best
    assert [path.name for path in (run.folder / "best").iterdir()] == ["step_000002"]


def test_averaged_and_last_weights_are_compared_only_with_step_0(lab: Lab, other_set: Path) -> None:
    run = lab.run(1, lab.experiment(with_eval({**AVERAGED, "max_steps": 2, "eval.weights": "last"}, other_set)))
    resumed = lab.run(1, run.experiment, "--resume", "--set", "max_steps=4", "--set", "eval.weights=ema")
    last = evaluations(resumed)[-1]
    assert (last.step, last.weights) == (4, "ema")
    assert last.to_previous is not None and last.to_previous.to_step == 0
    assert "1 evaluations in" in resumed.output


def test_an_edited_mask_starts_a_new_comparison(lab: Lab, tmp_path: Path) -> None:
    images = make_tiny_dataset(tmp_path / "images", 3)
    masks = tmp_path / "masks"
    masks.mkdir()
    for path in images.glob("*.png"):
        Image.new("L", Image.open(path).size, 255).save(masks / path.name)
    file = tmp_path / "masked.toml"
    table = {"resolutions": [32], "directory": [{"path": str(images), "mask_path": str(masks)}]}
    file.write_text(toml.dumps(table))
    run = lab.run(1, lab.experiment(with_eval({"max_steps": 2}, file)))
    first = next(masks.glob("*.png"))
    Image.new("L", Image.open(first).size, 40).save(first)
    resumed = lab.run(1, run.experiment, "--resume", "--set", "max_steps=3")
    before, after = evaluations(resumed)[-2:]
    assert before.fingerprint != after.fingerprint
    assert after.groups[0].to_start is None
    assert "not compared with them" in resumed.output
