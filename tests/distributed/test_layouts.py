"""Training results do not depend on the layout: the number of stages, of replicas, and the launcher.

The tests compare loss and gradient norm of every step and every exported tensor, bitwise where the arithmetic is the same:
dividing the network into stages moves activations but changes no sum, and the gradient norm is summed in float64.
"""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from tests.distributed.lab import Lab, Run
from tests.distributed.launch import newest_run, read_metrics, read_weights, run_alone, run_deepspeed, run_torchrun
from utils.distributed.world import World
from utils.run.prepare import prepare

pytestmark = pytest.mark.distributed

FULL: dict[str, Any] = {}
LORA: dict[str, Any] = {"adapter": {"type": "lora", "rank": 4, "alpha": 8.0}, "optimizer.learning_rate": 1e-2}
BFLOAT16: dict[str, Any] = {"model.dtype": "bfloat16"}
CLIP = 1.0
REPLICA_TOLERANCE = 1e-5


def numbers(run: Run, key: str) -> Tensor:
    return torch.tensor([line[key] for line in run.metrics], dtype=torch.float64)


def assert_same_run(one: Run, other: Run) -> None:
    """Bitwise equality of every metric of every step and of every exported tensor."""
    assert one.metrics == other.metrics
    assert_same_weights(one.weights, other.weights)


def assert_same_weights(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert one.keys() == other.keys()
    different = [name for name in one if not torch.equal(one[name], other[name])]
    assert not different


def assert_close_run(one: Run, other: Run, tolerance: float) -> None:
    """Losses and norms within a relative tolerance; weights that differ by much less than training has changed them."""
    for key in ("loss", "grad_norm"):
        torch.testing.assert_close(numbers(one, key), numbers(other, key), rtol=tolerance, atol=0)
    moved = sum(line["learning_rate"] for line in one.metrics)  # the most by which AdamW changes a weight
    distances = {name: float((tensor - other.weights[name]).abs().max()) for name, tensor in one.weights.items()}
    assert {name: distance for name, distance in distances.items() if distance > moved / 20} == {}


def unmoved(run: Run, start: dict[str, Tensor]) -> set[str]:
    """Names of the tensors in which no weight changed by as much as one step of AdamW; weight decay is a hundredth of it."""
    step = run.metrics[0]["learning_rate"] / 2
    return {name for name, tensor in run.weights.items() if float((tensor - start[name]).abs().max()) < step}


# --- stages ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("changes", [FULL, LORA, {**FULL, **BFLOAT16}], ids=["full", "lora", "full in bfloat16"])
def test_two_stages_equal_one_bitwise(lab: Lab, changes: dict[str, Any]) -> None:
    one, two = lab.shared_run(1, changes), lab.shared_run(2, changes)
    assert "stage 2 of 2" in two.output
    assert "stage 2" not in one.output
    assert max(numbers(one, "grad_norm")) > CLIP, "gradients must be clipped, or a wrong norm would not be detected"
    assert_same_run(one, two)


def test_updates_in_the_backward_pass_change_no_bit(lab: Lab) -> None:
    changes = {
        **BFLOAT16,
        "optimizer.gradient_clipping": 0.0,
        "pipeline.gradient_accumulation_steps": 1,
        "pipeline.micro_batch_size_per_gpu": 2,
    }
    after = lab.run(1, lab.experiment(changes))
    within = lab.run(1, lab.experiment({**changes, "optimizer.step_in_backward": True}))
    assert_same_run(after, within)


@pytest.mark.parametrize(
    ("changes", "mode", "text"),
    [
        (FULL, "all", "activations of its 2 blocks recomputed"),
        (FULL, "matmuls", "activations but products of its 2 blocks recomputed"),
        ({**LORA, **BFLOAT16}, "norms", "norms of its 2 blocks recomputed"),
        ({**LORA, **BFLOAT16}, "auto", "stage 2 of 2: no activations recomputed"),
    ],
    ids=["full all", "full matmuls", "lora norms", "lora auto"],
)
def test_recomputed_activations_change_no_bit(lab: Lab, changes: dict[str, Any], mode: str, text: str) -> None:
    recomputed = lab.run(2, lab.experiment({**changes, "pipeline.recompute": mode}))
    assert text in recomputed.output
    assert_same_run(lab.shared_run(2, changes), recomputed)


def test_three_stages_equal_one_bitwise(lab: Lab) -> None:
    assert_same_run(lab.shared_run(1, FULL), lab.shared_run(3, FULL))


@pytest.mark.parametrize(
    ("changes", "partition", "blocks"),
    [
        (FULL, "measured", r"\[[12], [12]\]"),
        ({**LORA, **BFLOAT16}, "measured", r"\[[12], [12]\]"),
        (FULL, [2, 1], r"\[2, 1\]"),
        (FULL, "uniform", r"\[1, 2\]"),
    ],
    ids=["measured", "measured lora in bfloat16", "list", "uniform"],
)
def test_every_kind_of_partition_equals_one_stage_bitwise(
    lab: Lab, changes: dict[str, Any], partition: str | list[int], blocks: str
) -> None:
    run = lab.run(2, lab.experiment({**changes, "pipeline.partition": partition}))
    (line,) = [line for line in run.output.splitlines() if line.startswith("  partition")]
    assert re.search(rf": {blocks} blocks", line)
    assert ("timing 5 kinds of layers" in run.output) == (partition == "measured")
    assert_same_run(lab.shared_run(1, changes), run)


def test_a_run_resumes_with_another_partition(lab: Lab) -> None:
    run = lab.run(2, lab.experiment({"pipeline.partition": [2, 1]}), "--set", "max_steps=4")
    assert_same_run(lab.shared_run(1, FULL), lab.run(2, run.experiment, "--resume", "--set", "pipeline.partition=[1, 2]"))


def test_training_changes_every_weight(lab: Lab) -> None:
    """Exceptions: the position table, a constant, and the norm of the last block's text queries, which has no effect."""
    run = lab.shared_run(2, FULL)
    last_text = "joint_blocks.2.context_block.attn.ln_q.weight"
    assert unmoved(run, load_file(lab.model / "mmdit.safetensors")) == {"pos_embed", last_text}


def test_training_changes_every_adapter(lab: Lab) -> None:
    run = lab.shared_run(2, LORA)
    ups = {name: tensor for name, tensor in run.weights.items() if name.endswith(("lora_up.weight", "lora_B.weight"))}
    unchanged = [name for name, tensor in ups.items() if not tensor.any()]
    assert len(ups) == 23 + 35
    assert unchanged == ["transformer.transformer_blocks.2.attn.add_q_proj.lora_B.weight"], "its output has no effect"


def test_micro_batches_of_a_step_differ_in_shape(lab: Lab) -> None:
    """The comparisons of this file therefore cover activations whose shape changes inside a step and between steps."""
    experiment = prepare(lab.shared_run(2, FULL).experiment, [], None, World(0, 0, 2, 2))
    order = experiment.batch_order()
    steps = [[draw.example.bucket for draw in order.global_batch(step)] for step in range(order.steps_per_epoch)]
    assert {bucket for buckets in steps for bucket in buckets} == set(experiment.dataset.bucket_counts())
    assert any(len(set(buckets)) == 2 for buckets in steps)
    assert len({tuple(buckets) for buckets in steps}) == len(steps)
    assert order.steps_per_epoch < experiment.num_steps(order), "the run must continue after the first epoch"


def test_losses_in_bfloat16_are_close_to_float32(lab: Lab) -> None:
    low, high = lab.shared_run(2, BFLOAT16), lab.shared_run(2, FULL)
    torch.testing.assert_close(numbers(low, "loss"), numbers(high, "loss"), rtol=0.02, atol=0)


@pytest.mark.parametrize("clipping", [0.0, CLIP])
def test_bfloat16_two_stages_equal_one_bitwise(lab: Lab, clipping: float) -> None:
    changes = {**BFLOAT16, "optimizer.gradient_clipping": clipping}
    one, two = lab.shared_run(1, changes), lab.shared_run(2, changes)
    assert max(numbers(one, "grad_norm")) > CLIP, "gradients must be clipped if clipping is on"
    assert_same_run(one, two)


def test_bfloat16_replicas_equal_one_to_the_order_of_summation(lab: Lab) -> None:
    """Gradients are accumulated in float32, over micro-batches and over replicas."""
    changes = {**BFLOAT16, "pipeline.pipeline_stages": 1, "pipeline.gradient_accumulation_steps": 2}
    one, two = lab.shared_run(1, BFLOAT16), lab.shared_run(2, changes)
    torch.testing.assert_close(numbers(one, "loss"), numbers(two, "loss"), rtol=5e-4, atol=0)
    torch.testing.assert_close(numbers(one, "grad_norm"), numbers(two, "grad_norm"), rtol=2e-3, atol=0)


@pytest.mark.parametrize(
    ("targets", "frozen_stage"),
    [([r"joint_blocks\.2\..*qkv", r"final_layer\.linear"], 1), ([r"joint_blocks\.0\.x_block\.attn\.qkv"], 2)],
    ids=["last blocks", "first block"],
)
def test_stage_without_trained_weights_changes_nothing(lab: Lab, targets: list[str], frozen_stage: int) -> None:
    changes = {**LORA, "adapter.targets": targets}
    one, two = lab.shared_run(1, changes), lab.shared_run(2, changes)
    banner = next(line for line in two.output.splitlines() if f"stage {frozen_stage} of 2" in line)
    assert " 0.00 M trained" in banner
    assert max(numbers(one, "grad_norm")) > 0
    assert_same_run(one, two)


@pytest.mark.parametrize(
    "optimizer",
    [
        {"type": "SGD", "learning_rate": 1e-2, "args": {"momentum": 0.9}},
        {"type": "Adagrad", "learning_rate": 1e-3},
        {"type": "NAdam", "learning_rate": 1e-3, "args": {"betas": [0.9, 0.99]}},
    ],
    ids=lambda optimizer: optimizer["type"],
)
def test_other_optimizers_train_equally_on_two_stages_and_resume_exactly(lab: Lab, optimizer: dict[str, Any]) -> None:
    """Their state is a vector (momentum), created in the constructor (Adagrad), or a number (NAdam)."""
    changes = {"optimizer": optimizer}
    one, two = lab.shared_run(1, changes), lab.run(2, lab.experiment(changes), "--set", "max_steps=4")
    assert two.metrics == one.metrics[:4]
    assert_same_run(one, lab.run(2, two.experiment, "--resume"))


# --- replicas ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("num_processes", "stages"), [(2, 1), (4, 2)], ids=["1 stage", "2 stages"])
def test_two_replicas_equal_one_to_reduction_order(lab: Lab, num_processes: int, stages: int) -> None:
    """Each replica accumulates half as many micro-batches: the same global batch."""
    changes = {"pipeline.pipeline_stages": stages, "pipeline.gradient_accumulation_steps": 2}
    run = lab.shared_run(num_processes, changes)
    assert "x 2 replicas" in run.output
    assert_close_run(lab.shared_run(1, FULL), run, REPLICA_TOLERANCE)


def test_two_replicas_of_an_adapter_equal_one(lab: Lab) -> None:
    changes = {**LORA, "pipeline.pipeline_stages": 1, "pipeline.gradient_accumulation_steps": 2}
    assert_close_run(lab.shared_run(1, LORA), lab.shared_run(2, changes), REPLICA_TOLERANCE)


def test_micro_batch_size_does_not_change_the_global_batch(lab: Lab) -> None:
    """Nor does it change the steps, as long as the groups are the same."""
    changes = {"pipeline.micro_batch_size_per_gpu": 2, "pipeline.gradient_accumulation_steps": 2}
    assert_close_run(lab.shared_run(1, FULL), lab.shared_run(2, changes), REPLICA_TOLERANCE)


# --- launchers ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("launcher", ["python", "torchrun", "deepspeed"])
def test_all_launchers_give_the_same_numbers(lab: Lab, launcher: str) -> None:
    experiment = lab.experiment(FULL)
    arguments = ("--config", str(experiment))
    if launcher == "python":
        finished = run_alone(*arguments)
    else:
        finished = (run_torchrun if launcher == "torchrun" else run_deepspeed)(2, *arguments)
    assert finished.exit_code == 0, finished.output
    reference, folder = lab.shared_run(2, FULL), newest_run(experiment.parent / "output")
    assert read_metrics(folder) == reference.metrics
    assert_same_weights(read_weights(folder, reference.last_step), reference.weights)
