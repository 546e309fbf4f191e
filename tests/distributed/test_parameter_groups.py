"""Parameter groups in whole runs: own learning rates and weight decays, in any layout, in the logs and after a resume."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.distributed.lab import Lab
from tests.distributed.test_layouts import assert_same_run

pytestmark = pytest.mark.distributed

GROUPS: dict[str, Any] = {
    "optimizer": {
        "learning_rate": 1e-3,
        "args": {"weight_decay": 0.1},
        "groups": [
            {"name": "blocks", "pattern": r"joint_blocks\..*", "learning_rate": 2e-3, "weight_decay": 0.0},
            {"name": "norms", "pattern": r".*ln_[qk]\.weight", "learning_rate": 1e-30, "weight_decay": 0.0},
        ],
    }
}


def test_two_stages_equal_one_bitwise(lab: Lab) -> None:
    one, two = lab.shared_run(1, GROUPS), lab.shared_run(2, GROUPS)
    assert max(line["grad_norm"] for line in one.metrics) > 1.0, "the clipping must bite"
    assert_same_run(one, two)


def test_each_group_has_its_learning_rate_in_the_metrics(lab: Lab) -> None:
    for line in lab.shared_run(1, GROUPS).metrics:
        assert (line["learning_rate"], line["learning_rate_blocks"], line["learning_rate_norms"]) == (1e-3, 2e-3, 1e-30)


def test_last_matching_group_applies(lab: Lab) -> None:
    """The norms are in the blocks, but their own group comes later: with its learning rate nothing moves."""
    run, start = lab.shared_run(1, GROUPS), load_file(lab.model / "mmdit.safetensors")
    norms = [name for name in start if name.endswith(("ln_q.weight", "ln_k.weight"))]
    assert norms and all(torch.equal(run.weights[name], start[name]) for name in norms)
    assert not torch.equal(
        run.weights["joint_blocks.0.x_block.attn.qkv.weight"], start["joint_blocks.0.x_block.attn.qkv.weight"]
    )


def test_resumed_run_equals_uninterrupted_one(lab: Lab) -> None:
    half = lab.run(2, lab.experiment(GROUPS), "--set", "max_steps=4")
    assert_same_run(lab.shared_run(2, GROUPS), lab.run(2, half.experiment, "--resume"))


def test_other_groups_are_another_training(lab: Lab) -> None:
    half = lab.run(1, lab.experiment(GROUPS), "--set", "max_steps=2")
    refused = lab.finish(1, half.experiment, "--resume", "--set", 'optimizer.groups=[{name="blocks", pattern=".*"}]')
    assert refused.exit_code == 1
    assert "optimizer.groups was" in refused.output


def test_group_that_matches_nothing_is_an_error(lab: Lab) -> None:
    changes = {"optimizer": {"learning_rate": 1e-3, "groups": [{"name": "none", "pattern": "joint_blocks"}]}}
    refused = lab.finish(1, lab.experiment(changes))
    assert refused.exit_code == 1
    assert "optimizer.groups[0].pattern: = 'joint_blocks': matches no trained parameter" in refused.output


# --- LoRA+ and the weight decay of norms and biases --------------------------------------------------------------------

DORA: dict[str, Any] = {"adapter": {"type": "lora", "rank": 4, "dora": True, "targets": ["attn", "final_layer"]}}
BASE: dict[str, Any] = {"learning_rate": 1e-3, "lr_warmup_steps": 2, "args": {"weight_decay": 0.1}}
DIVIDED: dict[str, Any] = {
    **DORA,
    "optimizer": {
        **BASE,
        "loraplus_lr_ratio": 16.0,
        "decay_norms_and_biases": False,
        "groups": [{"name": "blocks", "pattern": r"joint_blocks\..*", "lr_mult": 0.5, "weight_decay": 0.3}],
    },
}
BY_HAND: dict[str, Any] = {
    **DORA,
    "optimizer": {
        **BASE,
        "groups": [
            {"name": "up", "pattern": r".*lora_B.*", "learning_rate": 16e-3},
            {"name": "magnitudes", "pattern": r".*magnitude.*", "weight_decay": 0.0},
            {"name": "blocks", "pattern": r"joint_blocks\..*lora_A.*", "lr_mult": 0.5, "weight_decay": 0.3},
            {"name": "blocks_up", "pattern": r"joint_blocks\..*lora_B.*", "lr_mult": 8.0, "weight_decay": 0.3},
            {
                "name": "blocks_magnitudes",
                "pattern": r"joint_blocks\..*magnitude.*",
                "learning_rate": 5e-4,
                "weight_decay": 0.0,
            },
        ],
    },
}


def test_divided_groups_train_as_groups_by_hand_in_any_layout(lab: Lab) -> None:
    one, two, by_hand = lab.shared_run(1, DIVIDED), lab.shared_run(2, DIVIDED), lab.shared_run(1, BY_HAND)
    assert_same_run(one, two)
    assert one.weights.keys() == by_hand.weights.keys()
    assert all(torch.equal(weights, by_hand.weights[name]) for name, weights in one.weights.items())
    assert [line["loss"] for line in one.metrics] == [line["loss"] for line in by_hand.metrics]


def test_the_metrics_and_the_banner_have_the_learning_rates_of_up_matrices(lab: Lab) -> None:
    run = lab.shared_run(1, DIVIDED)
    assert "default 0.001, default.up 0.016, blocks 0.0005, blocks.up 0.008" in run.output
    for line in run.metrics:
        rates = {name: value for name, value in line.items() if name.startswith("learning_rate")}
        assert list(rates) == [
            "learning_rate",
            "learning_rate_default.up",
            "learning_rate_blocks",
            "learning_rate_blocks.up",
        ]
        assert list(rates.values()) == pytest.approx([line["learning_rate"] * factor for factor in (1, 16, 0.5, 8)])


def test_divided_groups_resume_exactly(lab: Lab) -> None:
    half = lab.run(2, lab.experiment(DIVIDED), "--set", "max_steps=4")
    assert_same_run(lab.shared_run(2, DIVIDED), lab.run(2, half.experiment, "--resume"))


def test_errors_of_the_keys_are_reported_before_the_run(lab: Lab) -> None:
    changes = {"optimizer": {"type": "Rprop", "learning_rate": 1e-3, "decay_norms_and_biases": False}}
    refused = lab.finish(1, lab.experiment(changes), "--set", "optimizer.loraplus_lr_ratio=16.0")
    assert refused.exit_code == 1
    assert "optimizer.decay_norms_and_biases: = false: Rprop has no weight decay; remove the key" in refused.output
    assert 'optimizer.loraplus_lr_ratio: = 16.0: is for adapter.type = "lora" only' in refused.output
