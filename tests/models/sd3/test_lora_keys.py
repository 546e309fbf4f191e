"""Keys of exported adapters, and the groups of modules that can have one."""

from __future__ import annotations

import re

import pytest
import torch

from models.family import ModuleAdapter
from models.sd3.family import SD3Family
from models.sd3.lora_export import native_adapter
from models.sd3.network_shapes import adaptable_modules
from models.sd3.variants import detect_config
from tests.golden.make_lora_keys import RANK, RELEASED, golden_path, golden_text, read_golden, released_shapes
from tests.models.sd3.lora_cases import (
    MODULES,
    draw_adapters,
)


@pytest.mark.parametrize("variant", RELEASED)
def test_golden_file_equals_what_its_script_writes(variant: str) -> None:
    assert golden_path(variant).read_text(encoding="utf-8") == golden_text(variant)


@pytest.mark.parametrize("variant", RELEASED)
def test_native_file_of_a_released_network_has_the_golden_keys_and_shapes(variant: str) -> None:
    modules = adaptable_modules(detect_config(released_shapes(variant)))
    adapters = {
        name: ModuleAdapter(
            {
                "down": torch.empty(RANK, *shape[1:], device="meta"),
                "up": torch.empty(shape[0], RANK, *[1] * (len(shape) - 2), device="meta"),
            },
            1.0,
        )
        for name, shape in modules.items()
    }
    assert {key: tuple(tensor.shape) for key, tensor in native_adapter(adapters).items()} == read_golden(
        golden_path(variant)
    )


@pytest.mark.parametrize(("variant", "count"), [("SD3-medium", 237), ("SD3.5-medium", 263), ("SD3.5-large", 377)])
def test_number_of_modules_in_the_blocks_of_released_networks_is_that_of_sd_scripts(variant: str, count: int) -> None:
    modules = adaptable_modules(detect_config(released_shapes(variant)))
    assert sum(name.startswith("joint_blocks.") for name in modules) == count
    assert len(modules) == count + 8


def test_native_keys_of_the_tiny_network_equal_a_list_written_by_hand() -> None:
    golden = golden_path("keys").read_text(encoding="utf-8").splitlines()
    expected = {
        f"{line}.{part}"
        for line in golden
        if not line.startswith("#")
        for part in ("lora_down.weight", "lora_up.weight", "alpha")
    }
    linears = {name: adapter for name, adapter in draw_adapters("lora").items() if len(MODULES[name]) == 2}
    assert set(native_adapter(linears)) == expected


DEFAULT_TARGETS = """
joint_blocks.0.context_block.attn.qkv joint_blocks.0.context_block.attn.proj
joint_blocks.0.context_block.mlp.fc1 joint_blocks.0.context_block.mlp.fc2
joint_blocks.0.x_block.attn.qkv joint_blocks.0.x_block.attn.proj
joint_blocks.0.x_block.mlp.fc1 joint_blocks.0.x_block.mlp.fc2
joint_blocks.1.context_block.attn.qkv joint_blocks.1.context_block.attn.proj
joint_blocks.1.context_block.mlp.fc1 joint_blocks.1.context_block.mlp.fc2
joint_blocks.1.x_block.attn.qkv joint_blocks.1.x_block.attn.proj
joint_blocks.1.x_block.mlp.fc1 joint_blocks.1.x_block.mlp.fc2
joint_blocks.2.context_block.attn.qkv
joint_blocks.2.x_block.attn.qkv joint_blocks.2.x_block.attn.proj
joint_blocks.2.x_block.mlp.fc1 joint_blocks.2.x_block.mlp.fc2
final_layer.linear final_layer.adaLN_modulation.1
""".split()


def in_group(group: str, name: str) -> bool:
    return re.fullmatch(SD3Family.lora_target_groups[group], name) is not None


def test_default_targets_equal_a_list_written_by_hand() -> None:
    chosen = {name for name in MODULES if any(in_group(group, name) for group in SD3Family.default_lora_targets)}
    assert chosen == set(DEFAULT_TARGETS)


@pytest.mark.parametrize("variant", RELEASED)
def test_every_module_is_in_exactly_one_group(variant: str) -> None:
    modules = adaptable_modules(detect_config(released_shapes(variant)))
    for name in modules:
        assert sum(in_group(group, name) for group in SD3Family.lora_target_groups) == 1, name
