"""A resumed run equals an uninterrupted one, however it ended; a run that cannot be resumed is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests.distributed.lab import Lab, Run
from tests.distributed.launch import newest_run
from tests.distributed.test_layouts import FULL, LORA, REPLICA_TOLERANCE, assert_close_run, assert_same_run
from tests.tiny_model import make_tiny_dataset
from utils.checkpoint.manifest import find_checkpoints
from utils.config.load import ConfigError
from utils.data.batches import BatchOrder
from utils.data.cache.shards import KEYS
from utils.distributed.world import World
from utils.run.experiment import Experiment
from utils.run.prepare import prepare

pytestmark = pytest.mark.distributed

STOP = 4
LONG: dict[str, Any] = {
    "max_steps": 32,
    "optimizer": {"lr_scheduler": "cosine", "lr_warmup_steps": 3},
    "save.keep_last": 3,
}


def checkpoint_steps(run: Path) -> list[int]:
    return [saved.step for saved in find_checkpoints(run / "checkpoints")]


def assert_each_step_once(run: Run) -> None:
    assert [line["step"] for line in run.metrics] == list(range(1, run.last_step + 1))


def stopped(lab: Lab, changes: dict[str, Any]) -> Run:
    """A new two-stage run that ended after step STOP, to be resumed."""
    return lab.run(2, lab.experiment(changes), "--set", f"max_steps={STOP}")


def copy_of(run: Run, folder: Path) -> Path:
    """The experiment file of a copy of the run's folder, which tests may damage; it reads the same dataset."""
    shutil.copytree(run.experiment.parent, folder)
    text = (folder / "experiment.toml").read_text().replace(str(run.experiment.parent / "output"), str(folder / "output"))
    (folder / "experiment.toml").write_text(text)
    return folder / "experiment.toml"


# --- a planned stop ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("changes", [FULL, LORA], ids=["full", "lora"])
def test_resumed_run_equals_uninterrupted_run(lab: Lab, changes: dict[str, Any]) -> None:
    run = stopped(lab, changes)
    assert run.last_step == STOP
    assert STOP % prepare_resume(run.experiment, "").batch_order().steps_per_epoch, "the middle of an epoch"
    resumed = lab.run(2, run.experiment, "--resume")
    assert resumed.folder == run.folder
    assert_each_step_once(resumed)
    assert_same_run(lab.shared_run(2, changes), resumed)


def test_two_stage_run_resumes_in_one_stage_exactly(lab: Lab) -> None:
    run = stopped(lab, FULL)
    assert_same_run(lab.shared_run(2, FULL), lab.run(1, run.experiment, "--resume"))


def test_run_resumes_with_other_replicas_to_reduction_order(lab: Lab) -> None:
    """From two stages to two replicas, and back from the checkpoint of the replicas."""
    replicas = ("--set", "pipeline.pipeline_stages=1", "--set", "pipeline.gradient_accumulation_steps=2")
    run = stopped(lab, {**FULL, "save.checkpoint_every_n_steps": 1})
    on_replicas = lab.run(2, run.experiment, "--resume", "--set", f"max_steps={STOP + 1}", *replicas)
    assert "x 2 replicas" in on_replicas.output
    back = lab.run(2, run.experiment, "--resume")
    assert_each_step_once(back)
    assert_close_run(lab.shared_run(2, FULL), back, REPLICA_TOLERANCE)


def test_bfloat16_run_resumes_exactly(lab: Lab) -> None:
    """The checkpoint has the float32 weights; the working weights are rounded from them."""
    changes = {"model.dtype": "bfloat16"}
    assert_same_run(lab.shared_run(2, changes), lab.run(2, stopped(lab, changes).experiment, "--resume"))


def test_resume_accepts_the_folder_of_an_older_run(lab: Lab, tmp_path: Path) -> None:
    """--resume RUN resumes that run although there is a newer one."""
    experiment = copy_of(lab.shared_run(1, FULL), tmp_path / "copy")
    run = newest_run(experiment.parent / "output")
    newer = run.with_name("9999-12-31_23-59-59")
    newer.mkdir()
    shutil.copy(run / "config.toml", newer)
    assert prepare_resume(experiment, str(run)).resume_run == run
    assert prepare_resume(experiment, "").resume_run == newer


# --- kill -9 -----------------------------------------------------------------------------------------------------------


def test_killed_run_resumes_exactly(lab: Lab) -> None:
    experiment = lab.experiment(LONG)
    output = experiment.parent / "output"

    def past_a_checkpoint() -> bool:
        metrics = list(output.glob("*/metrics.jsonl"))
        if not metrics or not list(output.glob("*/checkpoints/step_*")):
            return False
        return metrics[0].read_text().count("\n") >= 5

    lab.start(2, experiment).kill_when(past_a_checkpoint)
    steps = checkpoint_steps(newest_run(output))
    assert steps
    assert steps[-1] < LONG["max_steps"]
    resumed = lab.run(2, experiment, "--resume")
    assert_each_step_once(resumed)
    assert_same_run(lab.shared_run(2, LONG), resumed)


def cached(cache: Path) -> dict[str, Tensor]:
    """All cached tensors: encoder/size/key/name -> tensor. Fails if an entry is in more than one shard."""
    tensors: dict[str, Tensor] = {}
    for shard in cache.glob("*/*/*.safetensors"):
        stacked = load_file(shard)
        for row, key in enumerate(stacked.pop(KEYS)):
            for name, column in stacked.items():
                place = f"{shard.parent.relative_to(cache)}/{key.numpy().tobytes().hex()}/{name}"
                assert place not in tensors, "the entry was encoded twice"
                tensors[place] = column[row]
    return tensors


def test_killed_caching_continues_to_the_same_cache(lab: Lab, tmp_path: Path) -> None:
    """Killed twice: when the first encoder starts, and after the first shard of a later one."""
    dataset = make_tiny_dataset(tmp_path / "images", num_images=40)
    own_cache = {**FULL, "cache_dir": None}
    experiment = lab.experiment(own_cache, dataset)
    cache = experiment.parent / "output" / "cache"

    lab.start(2, experiment).kill_when(lambda: bool(list(cache.glob("writers/*.lock"))))
    lab.start(2, experiment, "--resume").kill_when(lambda: bool(list(cache.glob("vae-*/*/*.safetensors"))))
    assert len(list(cache.glob("*-*"))) < 4, "at least one encoder must not have started"
    resumed = lab.run(2, experiment, "--resume")

    undisturbed = lab.run(2, lab.experiment(own_cache, dataset))
    assert_same_run(undisturbed, resumed)
    whole, interrupted = cached(undisturbed.experiment.parent / "output" / "cache"), cached(cache)
    assert whole.keys() == interrupted.keys()
    assert all(torch.equal(whole[name], interrupted[name]) for name in whole)


def test_run_without_a_checkpoint_restarts_in_its_folder(lab: Lab, tmp_path: Path) -> None:
    experiment = copy_of(lab.shared_run(1, FULL), tmp_path / "copy")
    run = newest_run(experiment.parent / "output")
    shutil.rmtree(run / "checkpoints")
    again = lab.run(1, experiment, "--resume")
    assert again.folder == run
    assert_each_step_once(again)
    assert_same_run(lab.shared_run(1, FULL), again)


# --- what counts as a checkpoint ---------------------------------------------------------------------------------------


def test_partial_checkpoint_is_ignored(lab: Lab, tmp_path: Path) -> None:
    experiment = copy_of(stopped_one_process(lab), tmp_path / "copy")
    checkpoints = newest_run(experiment.parent / "output") / "checkpoints"
    unnamed = checkpoints / ".step_000006.tmp"
    unnamed.mkdir()
    (unnamed / "layer_000.safetensors").write_bytes(b"cut off")
    shutil.copytree(checkpoints / f"step_{STOP:06d}", checkpoints / "step_000005")
    (checkpoints / "step_000005" / "state.json").unlink()
    saved = prepare_resume(experiment, "").resume_from
    assert saved is not None
    assert saved.step == STOP
    assert_same_run(lab.shared_run(1, FULL), lab.run(1, experiment, "--resume"))
    assert not unnamed.exists()


def stopped_one_process(lab: Lab) -> Run:
    return lab.run(1, lab.experiment(FULL), "--set", f"max_steps={STOP}")


def test_only_the_last_checkpoints_are_kept(lab: Lab) -> None:
    assert checkpoint_steps(lab.shared_run(2, FULL).folder) == [4, 6]
    assert checkpoint_steps(lab.shared_run(2, LONG).folder) == [28, 30, 32]


# --- refused resumes and finished runs ----------------------------------------------------------------------------------


def prepare_resume(experiment: Path, resume: str, *overrides: str) -> Experiment:
    return prepare(experiment, overrides, resume, World(0, 0, 2, 2))


@pytest.mark.parametrize(
    ("override", "key"),
    [
        ("seed=8", "seed"),
        ("pipeline.micro_batch_size_per_gpu=2", "global batch"),
        ("pipeline.bucket_group=4", "pipeline.bucket_group"),
        ("adapter.rank=8", "adapter"),
        ("adapter.alpha=4.0", "adapter"),
        ("optimizer.type=SGD", "optimizer.type"),
    ],
)
def test_resume_with_another_experiment_is_refused(lab: Lab, override: str, key: str) -> None:
    with pytest.raises(ConfigError) as caught:
        prepare_resume(lab.shared_run(2, LORA).experiment, "", override)
    (error,) = caught.value.errors
    assert error.message.startswith(f"{key} was ")
    assert "resuming would be a different training" in error.message


def test_groups_of_the_checkpoint_are_kept_unless_they_are_configured(lab: Lab, tmp_path: Path) -> None:
    experiment = copy_of(lab.shared_run(1, FULL), tmp_path / "copy")
    before = prepare_resume(experiment, "")
    text = experiment.read_text()
    experiment.write_text(text.replace("bucket_group = 2\n", ""))
    again = prepare_resume(experiment, "")
    assert (before.bucket_group, again.bucket_group, again.identity) == (2, 2, before.identity)
    assert prepare(experiment, [], None, World(0, 0, 2, 2)).bucket_group == 1, "a new run"


def test_float32_weights_are_kept_as_in_the_checkpoint_unless_it_is_configured(lab: Lab, tmp_path: Path) -> None:
    experiment = copy_of(lab.shared_run(1, {**FULL, "model.dtype": "bfloat16"}), tmp_path / "copy")
    assert prepare(experiment, [], None, World(0, 0, 2, 2)).master == "split", "a new run"
    assert prepare_resume(experiment, "").master == "split"
    with pytest.raises(ConfigError, match=r"optimizer\.master was 'split' in .* and is 'float32' now; resuming would be"):
        prepare_resume(experiment, "", "optimizer.master=float32")
    for path in experiment.parent.glob("output/*/checkpoints/*/state.json"):
        state = json.loads(path.read_text())
        assert state["identity"].pop("optimizer.master") == "split"
        path.write_text(json.dumps(state))
    assert prepare_resume(experiment, "").master == "float32", "as in versions without the key"


def test_resume_in_a_layout_that_cannot_have_the_groups_is_refused(lab: Lab, tmp_path: Path) -> None:
    experiment = copy_of(lab.shared_run(1, FULL), tmp_path / "copy")
    experiment.write_text(experiment.read_text().replace("bucket_group = 2\n", ""))
    layout = ("pipeline.micro_batch_size_per_gpu=4", "pipeline.gradient_accumulation_steps=1")
    with pytest.raises(ConfigError, match="pipeline.bucket_group was 2 in .* and is 4 now; resuming would be a different"):
        prepare_resume(experiment, "", *layout)


def test_checkpoint_of_a_version_without_groups_is_resumed_in_its_order(lab: Lab, tmp_path: Path) -> None:
    """Then all images of a step had one bucket."""
    experiment = copy_of(lab.shared_run(1, FULL), tmp_path / "copy")
    for path in experiment.parent.glob("output/*/checkpoints/*/state.json"):
        state = json.loads(path.read_text())
        assert state["identity"].pop("pipeline.bucket_group") == 2
        path.write_text(json.dumps(state))
    with pytest.raises(ConfigError, match="pipeline.bucket_group was 4 in .* and is 2 now"):
        prepare_resume(experiment, "")
    experiment.write_text(experiment.read_text().replace("bucket_group = 2\n", ""))
    resumed = prepare_resume(experiment, "")
    order, earlier = resumed.batch_order(), BatchOrder(resumed.dataset.examples, 4, resumed.config.experiment.seed)
    assert [order.global_batch(step) for step in range(10)] == [earlier.global_batch(step) for step in range(10)]


def test_resume_on_another_network_is_refused(lab: Lab, tmp_path: Path) -> None:
    tensors = load_file(lab.model / "mmdit.safetensors")
    save_file({**tensors, "final_layer.linear.bias": tensors["final_layer.linear.bias"] + 1}, tmp_path / "other.safetensors")
    with pytest.raises(ConfigError) as caught:
        prepare_resume(lab.shared_run(2, LORA).experiment, "", f"model.mmdit={tmp_path / 'other.safetensors'}")
    (error,) = caught.value.errors
    assert error.message.startswith("the weights file of the network is not the one ")


def test_resume_lists_changed_keys(lab: Lab) -> None:
    experiment = lab.shared_run(2, LORA).experiment
    assert prepare_resume(experiment, "").changed_keys == []
    assert prepare_resume(experiment, "", "optimizer.learning_rate=0.5", "sampling.cfg=2.0").changed_keys == [
        "optimizer.learning_rate was 0.01, is now 0.5",
        "sampling.cfg was 4.5, is now 2.0",
    ]


def test_refused_resume_exits_with_1_and_changes_nothing(lab: Lab) -> None:
    run = lab.shared_run(2, LORA)
    before = {path: path.stat().st_mtime_ns for path in run.experiment.parent.rglob("*") if "log_" not in path.name}
    finished = lab.finish(2, run.experiment, "--resume", "--set", "seed=8")
    assert finished.exit_code == 1
    assert finished.output.count("seed was 7") == 1
    assert before == {path: path.stat().st_mtime_ns for path in run.experiment.parent.rglob("*") if "log_" not in path.name}


def test_resume_of_a_missing_run_is_refused(lab: Lab, tmp_path: Path) -> None:
    experiment, missing = lab.shared_run(1, FULL).experiment, tmp_path / "no_such_run"
    finished = lab.finish(1, experiment, "--resume", str(missing))
    assert finished.exit_code == 1
    assert f"{missing}: is not a run folder: it has no config.toml" in finished.output


def test_resume_without_any_run_starts_one(lab: Lab) -> None:
    run = lab.run(2, lab.experiment(FULL), "--resume", "--set", f"max_steps={STOP}")
    assert [line["loss"] for line in run.metrics] == [line["loss"] for line in lab.shared_run(2, FULL).metrics[:STOP]]


def test_resume_of_a_finished_run_does_nothing(lab: Lab, tmp_path: Path) -> None:
    experiment = copy_of(lab.shared_run(2, FULL), tmp_path / "copy")
    output = experiment.parent / "output"
    kept = {path: path.stat().st_mtime_ns for path in output.glob("*/[cw]*/**/*") if path.is_file()}
    metrics = (newest_run(output) / "metrics.jsonl").read_text()
    assert kept
    lab.run(2, experiment, "--resume")
    assert (newest_run(output) / "metrics.jsonl").read_text() == metrics
    assert {path: path.stat().st_mtime_ns for path in output.glob("*/[cw]*/**/*") if path.is_file()} == kept


def test_length_of_a_run_may_change(lab: Lab) -> None:
    """A larger max_steps trains a finished run further."""
    assert prepare_resume(lab.shared_run(2, FULL).experiment, "", "max_steps=100").resume_from is not None
