"""Every kind of adapter in whole runs: over stages, with initial weights from a file, and resumed."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.distributed.lab import Lab

pytestmark = pytest.mark.distributed

KINDS: dict[str, dict[str, Any]] = {
    "rslora": {"type": "lora", "rank_stabilized": True, "targets": ["attn", "embedders"], "blocks": "0,2"},
    "dora": {"type": "lora", "dora": True, "targets": ["attn", {"pattern": "embedders", "rank": 2}]},
    "lokr": {"type": "lokr", "targets": ["attn", "mlp", "final_layer", "context_embedder"]},
}


def changes(kind: str, **adapter: Any) -> dict[str, Any]:
    settings = {"rank": 4, "alpha": 8.0, **KINDS[kind], **adapter}
    if any(isinstance(target, dict) for target in settings["targets"]):  # the toml package cannot write mixed lists
        settings["targets"] = [t if isinstance(t, dict) else {"pattern": t} for t in settings["targets"]]
    return {"adapter": settings, "optimizer.learning_rate": 1e-2}


@pytest.mark.parametrize("kind", KINDS)
def test_two_stages_train_the_same_adapter_as_one(lab: Lab, kind: str) -> None:
    """The runs are bitwise equal; the patch embedding, a convolution, is among the targets."""
    one, two = lab.shared_run(1, changes(kind)), lab.shared_run(2, changes(kind))
    assert "stage 2 of 2" in two.output
    assert one.metrics == two.metrics
    assert one.weights.keys() == two.weights.keys()
    assert all(torch.equal(tensor, two.weights[name]) for name, tensor in one.weights.items())


@pytest.mark.parametrize("kind", KINDS)
def test_run_starts_from_the_adapter_file_of_another_run(lab: Lab, kind: str) -> None:
    """With a learning rate close to 0, its exported weights equal those of the file."""
    first = lab.shared_run(2, changes(kind))
    name = "lokr.safetensors" if kind == "lokr" else "lora.safetensors"
    file = first.folder / "weights" / "step_000006" / name
    again = lab.run(2, lab.experiment(changes(kind, init_from=str(file))), "--set", "optimizer.learning_rate=1e-20")
    assert f"initial weights from {file}" in again.output
    assert again.weights.keys() == first.weights.keys()
    for key, tensor in first.weights.items():
        torch.testing.assert_close(again.weights[key], tensor, rtol=1e-6, atol=1e-7)


def test_initial_weights_are_not_rounded_to_the_training_precision(lab: Lab) -> None:
    """In bfloat16 training the optimizer's float32 weights equal the file's bitwise."""
    first = lab.shared_run(2, changes("rslora"))
    file = first.folder / "weights" / "step_000006" / "lora.safetensors"
    settings = {**changes("rslora", init_from=str(file)), "model.dtype": "bfloat16", "max_steps": 1}
    again = lab.run(2, lab.experiment(settings), "--set", "optimizer.learning_rate=1e-20")
    for key, tensor in load_file(file).items():
        torch.testing.assert_close(again.weights[key], tensor, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("kind", ["dora", "lokr"])
def test_resumed_run_equals_uninterrupted_run(lab: Lab, kind: str) -> None:
    straight = lab.shared_run(2, changes(kind))
    stopped = lab.run(2, lab.experiment(changes(kind)), "--set", "max_steps=4")
    resumed = lab.run(2, stopped.experiment, "--resume")
    assert resumed.metrics == straight.metrics
    assert all(torch.equal(tensor, resumed.weights[name]) for name, tensor in straight.weights.items())
