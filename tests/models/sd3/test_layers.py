"""The network as pipeline layers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from models.family import BlockLayer
from models.sd3.layers import INPUT_NAMES, layer_outputs, layer_prefix, make_layer, num_layers
from models.sd3.mmdit import MMDiT
from models.sd3.weights import NetworkFiles
from models.shared.embedders import unpatchify
from models.streams import SampleShape, pack, unpack
from models.tensor_files import open_file
from tests.models.sd3.diffusers_reference import diffusers_network, relative_error
from tests.tiny_model import CONTEXT_DIM, POOLED_DIM, tiny_shapes

CONTEXT_LENGTH = 6
TOLERANCE = 1e-5


def make_inputs(height: int, width: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The tensors of INPUT_NAMES."""
    generator = torch.Generator().manual_seed(1)
    latents = torch.randn(3, 16, height, width, generator=generator).to(dtype)
    context = torch.randn(3, CONTEXT_LENGTH, CONTEXT_DIM, generator=generator).to(dtype)
    pooled = torch.randn(3, POOLED_DIM, generator=generator).to(dtype)
    return latents, torch.tensor([999.0, 500.5, 3.0]), context, pooled


def whole_network(tiny_model: Path, dtype: torch.dtype) -> MMDiT:
    file = tiny_model / "mmdit.safetensors"
    network = MMDiT(NetworkFiles(open_file(file)).config)
    network.load_state_dict(load_file(file))
    network.to(dtype).pos_embed = network.pos_embed.float()
    network.load_state_dict({"pos_embed": load_file(file)["pos_embed"]}, strict=False)
    return network


def layers_of(tiny_model: Path, dtype: torch.dtype) -> list[nn.Module]:
    file = NetworkFiles(open_file(tiny_model / "mmdit.safetensors"))
    return [file.load_layer(index, dtype) for index in range(num_layers(file.config))]


def run(
    layers: list[nn.Module], inputs: tuple[Tensor, ...], skipped_blocks: tuple[int, ...] = (), packed: bool = False
) -> Tensor:
    """The velocity that layers compute one after the other; `packed`: with a stage boundary between any two."""
    (batch, _, height, width), config = inputs[0].shape, layers[0].config
    shape = SampleShape(batch, height, width, CONTEXT_LENGTH)
    value: Any = dict(zip(INPUT_NAMES, inputs, strict=True))
    for index, layer in enumerate(layers):
        if index - 1 in skipped_blocks:
            assert isinstance(layer, BlockLayer)
            layer.skipped = True
        value = layer(value)
        specs = layer_outputs(config, index)  # type: ignore[arg-type]
        assert isinstance(value, dict if specs else Tensor)
        if packed and specs:
            value = unpack(pack(value, specs), specs, shape)
    return unpatchify(value, height, width, 2)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("height", "width"), [(8, 8), (4, 12)])
def test_layers_in_sequence_equal_the_whole_network(
    tiny_model: Path, dtype: torch.dtype, height: int, width: int, packed: bool
) -> None:
    inputs = make_inputs(height, width, dtype)
    with torch.no_grad():
        expected = whole_network(tiny_model, dtype)(*inputs)
        assert torch.equal(run(layers_of(tiny_model, dtype), inputs, packed=packed), expected)


@pytest.mark.parametrize("skipped", [(0,), (1,), (0, 1)])
def test_skipping_blocks_gives_the_output_of_diffusers(tiny_model: Path, skipped: tuple[int, ...]) -> None:
    """The blocks of skip-layer guidance, with and without a second attention."""
    latents, timestep, context, pooled = inputs = make_inputs(4, 12, torch.float32)
    file = tiny_model / "mmdit.safetensors"
    reference = diffusers_network(NetworkFiles(open_file(file)).config, load_file(file))
    with torch.no_grad():
        expected = reference(latents, context, pooled, timestep, skip_layers=list(skipped), return_dict=False)[0]
        whole = reference(latents, context, pooled, timestep, return_dict=False)[0]
        for value, skipped_blocks in ((expected, skipped), (whole, ())):
            assert relative_error(run(layers_of(tiny_model, torch.float32), inputs, skipped_blocks), value) <= TOLERANCE
    assert relative_error(expected, whole) > 0.01


def test_blocks_are_not_skipped_unless_set(tiny_model: Path) -> None:
    layers = layers_of(tiny_model, torch.float32)
    blocks = [layer for layer in layers if isinstance(layer, BlockLayer)]
    assert layers[1:-1] == blocks
    assert not any(block.skipped for block in blocks)
    blocks[0].skipped = True
    assert not blocks[1].skipped
    assert "skipped" not in blocks[0].state_dict()


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_through_layers_equal_the_whole_network(tiny_model: Path, dtype: torch.dtype, packed: bool) -> None:
    """Also in bfloat16, where every change in the order of a sum shows."""
    inputs = make_inputs(4, 12, dtype)
    network, layers = whole_network(tiny_model, dtype), layers_of(tiny_model, dtype)
    network(*inputs).square().mean().backward()
    run(layers, inputs, packed=packed).square().mean().backward()
    config = network.config
    for index, layer in enumerate(layers):
        for name, parameter in layer.named_parameters():
            expected = network.get_parameter(layer_prefix(config, index) + name).grad
            assert torch.equal(parameter.grad, expected), layer_prefix(config, index) + name


def test_declared_lengths_are_those_of_the_streams(tiny_model: Path) -> None:
    layers, inputs = layers_of(tiny_model, torch.float32), make_inputs(4, 12, torch.float32)
    shape = SampleShape(3, 4, 12, CONTEXT_LENGTH)
    value: Any = dict(zip(INPUT_NAMES, inputs, strict=True))
    for index, layer in enumerate(layers[:-1]):
        value = layer(value)
        specs = layer_outputs(layers[0].config, index)  # type: ignore[arg-type]
        lengths = {name: tensor.shape[1] for name, tensor in value.items()}
        assert lengths == {spec.name: spec.length(shape) for spec in specs}
        assert lengths == {"image": 12, "conditioning": 1, **({"text": CONTEXT_LENGTH} if index < len(layers) - 2 else {})}


def test_parameter_names_of_all_layers_are_the_native_state_dict(tiny_model: Path) -> None:
    config = NetworkFiles(open_file(tiny_model / "mmdit.safetensors")).config
    names = [
        layer_prefix(config, index) + name
        for index in range(num_layers(config))
        for name in make_layer(config, index).state_dict()
    ]
    assert len(names) == len(set(names))
    assert set(names) == set(tiny_shapes())
