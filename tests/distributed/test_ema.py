"""The average of the weights: its definition, its independence of the layout, and exact resume."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import toml
import torch
from safetensors.torch import load_file
from torch import Tensor

from tests.distributed.ema_ranks import CASES
from tests.distributed.lab import Lab, Run
from tests.distributed.launch import newest_run, start_ranks
from tests.distributed.test_layouts import FULL, LORA, REPLICA_TOLERANCE, assert_same_weights
from tests.distributed.test_resume import copy_of, prepare_resume
from utils.checkpoint.manifest import step_folder
from utils.config.load import ConfigError
from utils.pipeline.optimizer_step import EMA, MASTER

pytestmark = pytest.mark.distributed

AVERAGED: dict[str, Any] = {"ema": {"decay": 0.35}, "save.checkpoint_every_n_steps": 1, "save.keep_last": 10}
DECAYS = {2: 3 / 12, 3: 4 / 13, 4: 0.35, 5: 0.35, 6: 0.35}
"""Step -> decay: the warm-up and its end. The first step starts the average."""
NO_WARMUP: dict[str, Any] = {**AVERAGED, "ema": {"decay": 0.35, "warmup": False}}
AVERAGED_LORA: dict[str, Any] = {**LORA, **AVERAGED}
TWO_REPLICAS: dict[str, Any] = {"pipeline.pipeline_stages": 1, "pipeline.gradient_accumulation_steps": 2}
BFLOAT16_REPLICAS: dict[str, Any] = {**AVERAGED, **TWO_REPLICAS, "model.dtype": "bfloat16"}
SGD: dict[str, Any] = {**AVERAGED, "optimizer": {"type": "SGD", "learning_rate": 1e-2}}
"""Without momentum, so that the average is the optimizer's only state."""
SGD_REPLICAS: dict[str, Any] = {**SGD, **TWO_REPLICAS}
STOP = 3


def saved(run: Run, step: int) -> dict[str, Tensor]:
    """Everything in a checkpoint: file//parameter//state -> tensor."""
    tensors = {}
    for file in sorted(step_folder(run.folder / "checkpoints", step).glob("*.safetensors")):
        tensors.update({f"{file.stem}//{name}": tensor for name, tensor in load_file(file).items()})
    return tensors


def saved_state(run: Run, step: int, state: str) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in saved(run, step).items() if name.endswith(f"//{state}")}


def averages_of(run: Run, step: int) -> dict[str, Tensor]:
    """By parameter, float32."""
    return {name.removesuffix(EMA): tensor for name, tensor in saved_state(run, step, EMA).items()}


def weights_of(run: Run, step: int) -> dict[str, Tensor]:
    """By parameter, float32."""
    return {name.removesuffix(MASTER): tensor for name, tensor in saved_state(run, step, MASTER).items()}


# --- definition --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "changes",
    [AVERAGED, AVERAGED_LORA, BFLOAT16_REPLICAS, SGD_REPLICAS],
    ids=["full", "lora", "bfloat16 on replicas", "SGD on replicas"],
)
def test_average_is_that_of_the_weights_after_each_step(lab: Lab, changes: dict[str, Any]) -> None:
    """Recomputed in float64 from the float32 weights of the checkpoints."""
    run = lab.shared_run(2, changes)
    average = {name: tensor.double() for name, tensor in weights_of(run, 1).items()}
    assert len(average) > 20
    assert_same_weights(averages_of(run, 1), weights_of(run, 1))
    for step, decay in DECAYS.items():
        weights = weights_of(run, step)
        average = {name: decay * tensor + (1 - decay) * weights[name].double() for name, tensor in average.items()}
        averages = averages_of(run, step)
        assert {tensor.dtype for tensor in averages.values()} == {torch.float32}
        torch.testing.assert_close(
            {name: tensor.double() for name, tensor in averages.items()}, average, rtol=1e-6, atol=1e-7
        )
    lag = max(float((averages[name] - weights[name]).abs().max()) for name in weights)
    assert lag > 1e-4, "the average lags behind the weights"


def test_decay_without_warmup_applies_from_the_second_step(lab: Lab) -> None:
    run = lab.shared_run(2, NO_WARMUP)
    first, second = weights_of(run, 1), weights_of(run, 2)
    expected = {name: 0.35 * tensor + 0.65 * second[name] for name, tensor in first.items()}
    torch.testing.assert_close(averages_of(run, 2), expected, rtol=1e-6, atol=1e-7)


def test_an_average_can_be_kept_with_every_optimizer(tmp_path: Path) -> None:
    """See ema_ranks.py: on two replicas, with optimizers with and without state, in float32 and bfloat16."""
    finished = start_ranks(2, [], tmp_path / "log.txt", module="tests.distributed.ema_ranks").wait()
    assert finished.exit_code == 0, finished.output
    assert f"{len(CASES)} cases" in finished.output


def test_keeping_an_average_does_not_change_training(lab: Lab) -> None:
    plain, averaged = lab.shared_run(2, FULL), lab.shared_run(2, AVERAGED)
    assert plain.metrics == averaged.metrics
    everything = saved(averaged, averaged.last_step)
    without_average = {name: tensor for name, tensor in everything.items() if not name.endswith(f"//{EMA}")}
    assert_same_weights(saved(plain, plain.last_step), without_average)
    assert "averaged weights" not in plain.output
    (row,) = [line for line in averaged.output.splitlines() if "averaged weights" in line]
    assert "decay 0.35, lower in the first steps" in row


# --- layouts -----------------------------------------------------------------------------------------------------------


def test_average_of_two_stages_equals_that_of_one_bitwise(lab: Lab) -> None:
    one, two = lab.shared_run(1, AVERAGED), lab.shared_run(2, AVERAGED)
    assert_same_weights(saved(one, one.last_step), saved(two, two.last_step))


def test_average_of_two_replicas_equals_that_of_one_to_reduction_order(lab: Lab) -> None:
    """With SGD, whose steps differ by no more than the gradients."""
    one, two = lab.shared_run(1, SGD), lab.shared_run(2, SGD_REPLICAS)
    averages, others = averages_of(one, one.last_step), averages_of(two, two.last_step)
    assert averages.keys() == others.keys()
    for name, average in averages.items():
        assert torch.linalg.vector_norm(others[name] - average) <= REPLICA_TOLERANCE * torch.linalg.vector_norm(average)


# --- resume ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "changes",
    [AVERAGED, AVERAGED_LORA, BFLOAT16_REPLICAS, SGD_REPLICAS],
    ids=["full", "lora", "bfloat16 on replicas", "SGD on replicas"],
)
def test_average_of_a_resumed_run_equals_that_of_an_uninterrupted_run(
    lab: Lab, changes: dict[str, Any], tmp_path: Path
) -> None:
    straight = lab.shared_run(2, changes)
    experiment = copy_of(straight, tmp_path / "copy")
    checkpoints = newest_run(experiment.parent / "output") / "checkpoints"
    for step in range(STOP + 1, straight.last_step + 1):
        shutil.rmtree(step_folder(checkpoints, step))
    resumed = lab.run(2, experiment, "--resume")
    assert straight.metrics == resumed.metrics
    for step in range(STOP + 1, straight.last_step + 1):
        assert_same_weights(saved(straight, step), saved(resumed, step))


def refusal(experiment: Path, *overrides: str) -> str:
    with pytest.raises(ConfigError) as caught:
        prepare_resume(experiment, "", *overrides)
    (error,) = caught.value.errors
    assert "resuming would be a different training" in error.message
    return error.message


@pytest.mark.parametrize("override", ["ema.decay=0.5", "ema.warmup=false"])
def test_resuming_with_other_settings_of_the_average_is_refused(lab: Lab, override: str) -> None:
    message = refusal(lab.shared_run(2, AVERAGED).experiment, override)
    assert message.startswith("ema was {'decay': 0.35, 'warmup': True} in ")


def test_resuming_with_an_average_that_was_not_kept_is_refused(lab: Lab) -> None:
    message = refusal(lab.shared_run(2, FULL).experiment, "ema.decay=0.5")
    assert message.startswith("ema was 'none' in ")


def test_resuming_without_the_average_that_was_kept_is_refused(lab: Lab, tmp_path: Path) -> None:
    settings = toml.loads(lab.shared_run(2, AVERAGED).experiment.read_text())
    del settings["ema"]
    (tmp_path / "experiment.toml").write_text(toml.dumps(settings))
    assert refusal(tmp_path / "experiment.toml").endswith("and is 'none' now; resuming would be a different training")
