"""utils/optim/torchao_optimizers.py: names, states and steps of the low-bit optimizers of the optional package torchao."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from utils.config.schema.optimizer import OptimizerConfig
from utils.optim import registry
from utils.optim.state_tensors import from_tensors, to_tensors
from utils.optim.torchao_optimizers import put_together

NAMES = {"Adam8bit": 8, "Adam4bit": 4, "AdamFp8": 8, "AdamW8bit": 8, "AdamW4bit": 4, "AdamWFp8": 8}
"""Name in torchao -> bits of each of the two moments."""

needs_torchao = pytest.mark.skipif(
    not registry.is_installed(registry.TORCHAO), reason="pip install --no-deps torchao==0.18.0"
)


def optimizer_of(name: str, weight: nn.Parameter) -> torch.optim.Optimizer:
    config = OptimizerConfig(type=f"torchao.{name}", learning_rate=1e-2)
    optimizer = registry.make_optimizer(config, [{"params": [weight], "names": ["blocks.0.weight"]}])
    assert isinstance(optimizer, torch.optim.Optimizer)
    return optimizer


def train(optimizer: torch.optim.Optimizer, weight: nn.Parameter, steps: range) -> None:
    for step in steps:
        weight.grad = torch.randn(weight.shape, generator=torch.Generator().manual_seed(step))
        for group in optimizer.param_groups:
            group["lr"] = 1e-2 / (1 + step)
        optimizer.step()


@needs_torchao
@pytest.mark.parametrize(("name", "bits"), NAMES.items())
def test_training_resumes_exactly_from_a_file(name: str, bits: int, tmp_path: Path) -> None:
    weight = nn.Parameter(torch.randn(96, 128, generator=torch.Generator().manual_seed(0)))
    optimizer = optimizer_of(name, weight)
    train(optimizer, weight, range(3))
    stored = to_tensors(optimizer.state[weight])
    moments = sum(tensor.nbytes for key, tensor in stored.items() if key.endswith((".codes", ".scale")))
    assert 2 * bits / 8 <= moments / weight.numel() < 2.2 * bits / 8
    save_file(stored, tmp_path / "state.safetensors")
    again = nn.Parameter(weight.detach().clone())
    resumed = optimizer_of(name, again)
    resumed.state[again] = from_tensors(load_file(tmp_path / "state.safetensors"))
    train(optimizer, weight, range(3, 6))
    train(resumed, again, range(3, 6))
    assert torch.equal(weight, again)


@needs_torchao
def test_the_plain_name_is_the_program_s_own_and_others_are_found_without_a_package() -> None:
    found = {name: registry.find(name) for name in ("AdamW8bit", "torchao.adamw8bit", "adamw4bit", "AdamW-FP8")}
    assert {name: kind and kind.package for name, kind in found.items()} == {
        "AdamW8bit": registry.OWN,
        "torchao.adamw8bit": registry.TORCHAO,
        "adamw4bit": registry.TORCHAO,
        "AdamW-FP8": registry.TORCHAO,
    }
    assert registry.find("torchao._AdamW") is None
    ((_, text),) = registry.optimizer_errors(OptimizerConfig(type="CPUOffloadOptimizer", learning_rate=1e-3))
    assert "needs another optimizer" in text


def test_a_package_that_is_not_installed_is_named_in_the_error(monkeypatch: pytest.MonkeyPatch) -> None:
    installed = registry._installed
    monkeypatch.setattr(registry, "_installed", lambda package: () if package == "torchao" else installed(package))
    ((key, text),) = registry.optimizer_errors(OptimizerConfig(type="torchao.AdamW4bit", learning_rate=1e-3))
    assert key == "optimizer.type"
    assert "unknown; " in text and "torchao" in text.partition("pip install ")[2]


def test_a_checkpoint_cannot_name_any_class() -> None:
    with pytest.raises(KeyError):
        put_together("Popen", {"context": torch.tensor(list(b"[]"), dtype=torch.uint8)})
