"""Adapters: where they go, how they start, what is taken out of them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from models.sd3.layers import layer_prefix, num_layers
from models.sd3.weights import MMDiTFile, linear_module_names
from tests.tiny_model import CONTEXT_DIM, POOLED_DIM
from utils import lora

TARGETS = ("joint_blocks.1.x_block.attn.qkv", "joint_blocks.1.context_block.mlp.fc2", "final_layer.linear")
PREFIX = "joint_blocks.1."


@pytest.fixture(scope="module")
def file(tiny_model: Path) -> MMDiTFile:
    return MMDiTFile(tiny_model / "mmdit.safetensors")


def block(file: MMDiTFile) -> nn.Module:
    return file.load_layer(2, 6, torch.float32)


def adapter_tensors(layer: nn.Module) -> dict[str, Tensor]:
    return {name: parameter.detach().clone() for name, parameter in layer.named_parameters() if parameter.requires_grad}


def injected(file: MMDiTFile, seed: int = 0, rank: int = 4, alpha: float = 8.0) -> nn.Module:
    layer = block(file)
    lora.inject(layer, PREFIX, TARGETS, rank=rank, alpha=alpha, seed=seed)
    return layer


def test_a_fresh_adapter_changes_nothing(file: MMDiTFile) -> None:
    inputs = torch.randn(2, 6 + 4 + 1, file.config.hidden_size)
    assert torch.equal(injected(file)(inputs), block(file)(inputs))


def test_a_whole_network_of_fresh_adapters_changes_nothing(file: MMDiTFile) -> None:
    value: object = (
        torch.randn(1, 16, 4, 4),
        torch.tensor([700.0]),
        torch.randn(1, 6, CONTEXT_DIM),
        torch.randn(1, POOLED_DIM),
    )
    expected = value
    for index in range(num_layers(file.config)):
        plain, adapted = (file.load_layer(index, 6, torch.float32) for _ in range(2))
        prefix = layer_prefix(file.config, index)
        lora.inject(adapted, prefix, linear_module_names(file.config), rank=2, alpha=1, seed=0)
        value, expected = adapted(value), plain(expected)
        assert torch.equal(value, expected)


def test_only_the_adapter_is_trained(file: MMDiTFile) -> None:
    names = set(adapter_tensors(injected(file)))
    modules = [target.removeprefix(PREFIX) for target in TARGETS if target.startswith(PREFIX)]
    assert names == {f"{module}.{part}.default.weight" for module in modules for part in ("lora_A", "lora_B")}


def test_a_layer_without_targets_is_frozen_and_otherwise_left_alone(file: MMDiTFile) -> None:
    layer = file.load_layer(1, 6, torch.float32)
    names = list(layer.state_dict())
    lora.inject(layer, "joint_blocks.0.", TARGETS, rank=4, alpha=4, seed=0)
    assert not adapter_tensors(layer)
    assert list(layer.state_dict()) == names


def test_second_factor_starts_at_zero_and_the_first_does_not(file: MMDiTFile) -> None:
    for name, tensor in adapter_tensors(injected(file)).items():
        assert bool(tensor.any()) == ("lora_A" in name)


def test_start_depends_on_seed_and_module_and_on_nothing_else(file: MMDiTFile) -> None:
    """Injected alone, after another layer, or in the company of more targets: no layout changes the start."""
    first = adapter_tensors(injected(file))
    torch.manual_seed(123)
    other = file.load_layer(4, 6, torch.float32)
    lora.inject(other, "final_layer.", TARGETS, rank=4, alpha=8.0, seed=0)
    again = block(file)
    lora.inject(again, PREFIX, (*TARGETS, PREFIX + "x_block.attn.proj"), rank=4, alpha=8.0, seed=0)
    later = adapter_tensors(again)
    assert all(torch.equal(later[name], tensor) for name, tensor in first.items())
    changed = adapter_tensors(injected(file, seed=1))
    assert not any(torch.equal(changed[name], tensor) for name, tensor in first.items() if "lora_A" in name)


def test_same_shaped_modules_start_differently(file: MMDiTFile) -> None:
    layer = block(file)
    lora.inject(layer, PREFIX, [PREFIX + "x_block.attn.qkv", PREFIX + "context_block.attn.qkv"], rank=4, alpha=4, seed=0)
    downs = [tensor for name, tensor in adapter_tensors(layer).items() if "lora_A" in name]
    assert len(downs) == 2
    assert not torch.equal(downs[0], downs[1])


def test_the_same_module_of_two_blocks_starts_differently(file: MMDiTFile) -> None:
    name = "x_block.attn.proj"
    downs = []
    for index in (1, 2):
        layer, prefix = file.load_layer(index, 6, torch.float32), layer_prefix(file.config, index)
        lora.inject(layer, prefix, [prefix + name], rank=4, alpha=4, seed=0)
        downs.append(adapter_tensors(layer)[f"{name}.lora_A.default.weight"])
    assert not torch.equal(*downs)


def test_start_has_the_spread_of_a_fresh_linear(file: MMDiTFile) -> None:
    layer = block(file)
    lora.inject(layer, PREFIX, TARGETS, rank=64, alpha=4, seed=0)
    down = adapter_tensors(layer)["x_block.attn.qkv.lora_A.default.weight"]
    bound = 1 / down.shape[1] ** 0.5
    assert 0.98 * bound < float(down.abs().max()) <= bound


@pytest.mark.parametrize(("rank", "alpha"), [(4, 4.0), (4, 8.0), (8, 2.0)])
def test_update_is_scaled_by_alpha_over_rank(file: MMDiTFile, rank: int, alpha: float) -> None:
    layer = injected(file, rank=rank, alpha=alpha)
    module = layer.get_submodule("x_block.attn.qkv")
    inputs = torch.randn(3, file.config.hidden_size)
    with torch.no_grad():
        up = layer.get_parameter("x_block.attn.qkv.lora_B.default.weight").normal_()
        down = layer.get_parameter("x_block.attn.qkv.lora_A.default.weight")
        base = block(file).get_submodule("x_block.attn.qkv")(inputs)
        torch.testing.assert_close(module(inputs), base + inputs @ down.T @ up.T * alpha / rank)


def test_what_is_collected_goes_by_native_names(file: MMDiTFile) -> None:
    layer = injected(file)
    values = {name: parameter.detach() for name, parameter in layer.named_parameters()}
    collected = lora.collect(layer, PREFIX, values, 8.0)
    assert set(collected.pairs) == set(TARGETS[:2])
    assert collected.alpha == 8.0
    down, up = collected.pairs[TARGETS[0]]
    width = file.config.hidden_size
    assert down.shape == (4, width)
    assert up.shape == (3 * width, 4)
    assert down is values["x_block.attn.qkv.lora_A.default.weight"]


def test_patterns_match_whole_names_and_keep_the_network_s_order() -> None:
    names = ["a.attn.qkv", "a.attn2.qkv", "b.attn.qkv", "b.attn.qkv_extra"]
    assert lora.match_targets(names, [r"b\.attn\.qkv", r"a\.attn\d?\.qkv"]) == ["a.attn.qkv", "a.attn2.qkv", "b.attn.qkv"]
    assert lora.match_targets(names, ["attn.qkv"]) == []
    assert lora.match_targets(names, ["a.*", ".*qkv"]) == ["a.attn.qkv", "a.attn2.qkv", "b.attn.qkv"]


def test_a_name_that_is_part_of_another_gets_no_adapter_of_it(file: MMDiTFile) -> None:
    """attn.qkv is the end of nothing else, but peft matches patterns: attn must not mean attn2."""
    layer = file.load_layer(1, 6, torch.float32)
    lora.inject(layer, "joint_blocks.0.", ["joint_blocks.0.x_block.attn.qkv"], rank=2, alpha=2, seed=0)
    assert {name.split(".lora_")[0] for name in adapter_tensors(layer)} == {"x_block.attn.qkv"}
