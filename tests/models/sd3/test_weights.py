"""Public files of the network: checked by name and shape, read layer by layer."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from models import tensor_files
from models.family import ModelFilesError
from models.sd3.layers import layer_prefix, num_layers
from models.sd3.network_shapes import adaptable_modules, layer_shapes
from models.sd3.weights import NetworkFiles
from models.tensor_files import open_file
from tests.tiny_model import random_weights, tiny_shapes


def write_network(folder: Path, change: Callable[[dict[str, Tensor]], None]) -> Path:
    """Writes the tiny network's file with a change."""
    tensors = random_weights(tiny_shapes())
    change(tensors)
    path = folder / "changed.safetensors"
    save_file(tensors, path)
    return path


def errors_of(path: Path) -> str:
    """Returns the messages of all errors, which must have the key "mmdit"."""
    with pytest.raises(ModelFilesError) as caught:
        NetworkFiles(open_file(path))
    assert {key for key, _ in caught.value.errors} == {"mmdit"}
    return "\n".join(text for _, text in caught.value.errors)


def test_adaptable_modules_are_all_linear_layers_and_the_patch_convolution(tiny_model: Path) -> None:
    config = NetworkFiles(open_file(tiny_model / "mmdit.safetensors")).config
    expected = {name.removesuffix(".weight"): shape for name, shape in tiny_shapes().items() if len(shape) in (2, 4)}
    assert adaptable_modules(config) == expected
    assert len(expected["x_embedder.proj"]) == 4


# --- reading -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_layers_have_the_values_of_the_file(tiny_model: Path, dtype: torch.dtype) -> None:
    file = NetworkFiles(open_file(tiny_model / "mmdit.safetensors"))
    written = load_file(tiny_model / "mmdit.safetensors")
    for index in range(num_layers(file.config)):
        for name, value in file.load_layer(index, dtype).state_dict().items():
            assert value.device.type == "cpu"
            native = layer_prefix(file.config, index) + name
            assert torch.equal(value, written[native].to(torch.float32 if native == "pos_embed" else dtype)), native


def test_declared_shapes_of_a_layer_are_those_of_its_parameters(tiny_model: Path) -> None:
    file = NetworkFiles(open_file(tiny_model / "mmdit.safetensors"))
    for index in range(num_layers(file.config)):
        parameters = file.load_layer(index, torch.float32).named_parameters()
        assert layer_shapes(file.config, index) == {name: tuple(parameter.shape) for name, parameter in parameters}


def test_loading_a_layer_reads_only_its_own_tensors(tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[str] = []

    class Recorder:
        def __init__(self, *arguments: Any) -> None:
            self._inner = safe_open(*arguments)

        def __enter__(self) -> Recorder:
            self._file = self._inner.__enter__()
            return self

        def __exit__(self, *arguments: Any) -> None:
            self._inner.__exit__(*arguments)

        def get_tensor(self, name: str) -> Tensor:
            read.append(name)
            return self._file.get_tensor(name)

    file = NetworkFiles(open_file(tiny_model / "mmdit.safetensors"))
    monkeypatch.setattr(tensor_files, "safe_open", Recorder)
    file.load_layer(2, torch.float32)
    assert sorted(read) == sorted(name for name in tiny_shapes() if name.startswith("joint_blocks.1."))
    read.clear()
    file.load_layer(num_layers(file.config) - 1, torch.float32)
    assert sorted(read) == sorted(name for name in tiny_shapes() if name.startswith("final_layer."))


def test_file_with_prefix_and_other_networks_reads_like_a_plain_one(tiny_model: Path, tmp_path: Path) -> None:
    plain = load_file(tiny_model / "mmdit.safetensors")
    path = tmp_path / "checkpoint.safetensors"
    prefixed = {f"model.diffusion_model.{name}": tensor for name, tensor in plain.items()}
    save_file({**prefixed, "first_stage_model.decoder.conv_in.weight": torch.zeros(1)}, path)
    file = NetworkFiles(open_file(path))
    assert file.config == NetworkFiles(open_file(tiny_model / "mmdit.safetensors")).config
    layer = file.load_layer(1, torch.float32)
    assert torch.equal(layer.state_dict()["x_block.mlp.fc1.weight"], plain["joint_blocks.0.x_block.mlp.fc1.weight"])


# --- errors ------------------------------------------------------------------------------------------------------------


def test_file_of_another_network_is_refused_with_the_tensors_it_lacks(tmp_path: Path) -> None:
    path = tmp_path / "flux.safetensors"
    save_file({"double_blocks.0.img_attn.qkv.weight": torch.zeros(4, 4), "pos_embed": torch.zeros(1, 4, 4)}, path)
    text = errors_of(path)
    assert "is a Flux transformer, not a whole SD3 network" in text
    assert "x_embedder.proj.weight" in text
    assert "pos_embed" not in text


def test_network_without_blocks_is_refused(tmp_path: Path) -> None:
    def without_blocks(tensors: dict[str, Tensor]) -> None:
        for name in [name for name in tensors if name.startswith("joint_blocks.")]:
            del tensors[name]

    assert "joint_blocks" in errors_of(write_network(tmp_path, without_blocks))


def test_missing_misshapen_and_unexpected_tensors_are_all_named_at_once(tmp_path: Path) -> None:
    def change(tensors: dict[str, Tensor]) -> None:
        del tensors["joint_blocks.1.x_block.mlp.fc2.bias"]
        tensors["final_layer.linear.weight"] = torch.zeros(32, 128)
        tensors["joint_blocks.0.x_block.attn.to_q.weight"] = torch.zeros(2)

    text = errors_of(write_network(tmp_path, change))
    assert "misses tensor joint_blocks.1.x_block.mlp.fc2.bias (128,)" in text
    assert "tensor final_layer.linear.weight has shape (32, 128), expected (64, 128)" in text
    assert "has tensor joint_blocks.0.x_block.attn.to_q.weight, which this network does not have" in text


def test_long_list_of_errors_is_limited_with_a_count(tmp_path: Path) -> None:
    def change(tensors: dict[str, Tensor]) -> None:
        for name in [name for name in tensors if name.startswith("joint_blocks.1.")]:
            del tensors[name]

    lines = errors_of(write_network(tmp_path, change)).splitlines()
    deleted = [name for name in tiny_shapes() if name.startswith("joint_blocks.1.")]
    assert len(lines) == tensor_files.MAX_ERRORS_SHOWN + 1
    assert f"and {len(deleted) - tensor_files.MAX_ERRORS_SHOWN} more" in lines[-1]


@pytest.mark.parametrize(
    "name", ["x_embedder.proj.weight", "pos_embed", "context_embedder.weight", "y_embedder.mlp.0.weight"]
)
def test_defining_tensor_with_the_wrong_number_of_axes_is_refused_by_name(tmp_path: Path, name: str) -> None:
    def flatten(tensors: dict[str, Tensor]) -> None:
        tensors[name] = tensors[name].flatten()

    assert name in errors_of(write_network(tmp_path, flatten))
