"""Adapters merged into the network while its layers are read."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from models.sd3.family import SD3Family
from models.sd3.layers import layer_prefix, num_layers
from models.sd3.lora_export import diffusers_adapter, native_adapter
from models.sd3.weights import NetworkFiles
from models.tensor_files import open_file
from tests.model_copies import settings_for
from tests.models.sd3.diffusers_reference import relative_error, to_diffusers
from tests.models.sd3.lora_cases import (
    CONFIG,
    MODULES,
    TOLERANCE,
    WEIGHTS,
    adapted,
    adapted_weights,
    draw_adapters,
    opened,
)
from tests.tiny_model import DEPTH

pytestmark = pytest.mark.usefixtures("one_thread")


def network_files(folder: Path, tensors: Mapping[str, Tensor]) -> NetworkFiles:
    path = folder / "network.safetensors"
    save_file(dict(tensors), path)
    return NetworkFiles(open_file(path))


def layers_read(network: NetworkFiles, dtype: torch.dtype) -> dict[str, Tensor]:
    """Returns native name -> tensor of every layer."""
    return {
        layer_prefix(CONFIG, index) + name: tensor
        for index in range(num_layers(CONFIG))
        for name, tensor in network.load_layer(index, dtype).state_dict().items()
    }


@pytest.mark.parametrize("strength", [1.0, 0.5, -1.0])
@pytest.mark.parametrize("kind", ["lora", "dora", "lokr"])
def test_layers_have_the_merged_adapter(tmp_path: Path, kind: str, strength: float) -> None:
    adapters = draw_adapters(kind)
    network = network_files(tmp_path, WEIGHTS)
    network.merge(opened(tmp_path, native_adapter(adapters)), strength)
    found = layers_read(network, torch.float32)
    expected = adapted_weights(adapters, strength)
    assert found.keys() == WEIGHTS.keys()
    for name in WEIGHTS:
        if name.removesuffix(".weight") in adapters and name.endswith(".weight"):
            assert relative_error(found[name], expected[name]) <= 1e-6, name
            assert relative_error(found[name], WEIGHTS[name]) > 0.01, name
        else:
            assert torch.equal(found[name], WEIGHTS[name]), name


def test_merged_weights_are_rounded_once(tmp_path: Path) -> None:
    """Weights are stored in bfloat16, merged in float32, and rounded after the last merge."""
    stored = {name: tensor.bfloat16() for name, tensor in WEIGHTS.items()}
    first, second = draw_adapters("lora", seed=1), draw_adapters("dora", seed=2)
    network = network_files(tmp_path, stored)
    for index, adapters in enumerate((first, second)):
        (tmp_path / f"{index}").mkdir()
        network.merge(opened(tmp_path / f"{index}", native_adapter(adapters)), 0.3)
    exact, rounded = layers_read(network, torch.float32), layers_read(network, torch.bfloat16)
    for name in set(exact) - {"pos_embed"}:
        assert rounded[name].dtype == torch.bfloat16
        assert torch.equal(rounded[name], exact[name].bfloat16()), name
    name = "joint_blocks.0.x_block.mlp.fc1"
    expected = adapted(adapted(stored[f"{name}.weight"], first[name], 0.3), second[name], 0.3)
    assert relative_error(exact[f"{name}.weight"].double(), expected) <= 1e-6


def test_adapters_are_merged_in_order(tmp_path: Path) -> None:
    """The second, a DoRA, is applied to the weights that the first has changed."""
    first, second = draw_adapters("lora", seed=1), draw_adapters("dora", seed=2)
    network = network_files(tmp_path, WEIGHTS)
    for adapters, strength in ((first, 0.7), (second, 1.0)):
        folder = tmp_path / f"{strength}"
        folder.mkdir()
        network.merge(opened(folder, native_adapter(adapters)), strength)
    found = layers_read(network, torch.float32)
    for name in MODULES:
        expected = adapted(adapted(WEIGHTS[f"{name}.weight"], first[name], 0.7), second[name])
        assert relative_error(found[f"{name}.weight"].double(), expected) <= 1e-6, name
        norms = found[f"{name}.weight"].flatten(1).norm(dim=1)
        assert relative_error(norms, second[name].tensors["magnitude"]) <= 1e-6, name


def test_both_formats_merge_into_a_network_with_diffusers_names(tmp_path: Path) -> None:
    adapters = draw_adapters("dora")
    expected = adapted_weights(adapters)
    for index, tensors in enumerate((native_adapter(adapters), diffusers_adapter(adapters, DEPTH))):
        (tmp_path / f"{index}").mkdir()
        network = network_files(tmp_path / f"{index}", to_diffusers(WEIGHTS, DEPTH))
        network.merge(opened(tmp_path / f"{index}", tensors), 1.0)
        found = layers_read(network, torch.float32)
        assert all(relative_error(found[name], expected[name]) <= TOLERANCE for name in WEIGHTS)


def test_merged_adapters_and_skipped_keys_are_noted(tiny_model: Path, tmp_path: Path) -> None:
    adapters = draw_adapters("lora")
    text_encoder_keys = {"lora_te1_text_model_encoder_layers_0_mlp_fc1.lora_down.weight": torch.zeros(1)}
    path = tmp_path / "adapter.safetensors"
    save_file({**native_adapter(adapters), **text_encoder_keys}, path)
    family = SD3Family.from_files(settings_for(tiny_model, merge_adapters=[{"path": path, "strength": 0.7}]))
    assert family.notes == (
        f"merged into the network: {path} ({len(MODULES)} modules, strength 0.7)",
        f"skipped 1 tensors for text encoders in {path}",
    )
    assert family.network_files == (tiny_model / "mmdit.safetensors", path)
    assert family.network_settings == {"merge strengths": [0.7]}
