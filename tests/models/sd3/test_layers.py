"""The network as a row of layers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from models.family import BlockLayer
from models.sd3.layers import layer_cost, layer_prefix, make_layer, num_layers, pack, unpack
from models.sd3.mmdit import MMDiT, unpatchify
from models.sd3.weights import NetworkFiles
from models.tensor_files import open_file
from tests.models.sd3.diffusers_reference import diffusers_network, relative_error
from tests.tiny_model import CONTEXT_DIM, POOLED_DIM, tiny_shapes

CONTEXT_LENGTH = 6
TOLERANCE = 1e-5


def make_inputs(height: int, width: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
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


def row_of_layers(tiny_model: Path, dtype: torch.dtype) -> list[nn.Module]:
    file = NetworkFiles(open_file(tiny_model / "mmdit.safetensors"))
    return [file.load_layer(index, CONTEXT_LENGTH, dtype) for index in range(num_layers(file.config))]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("height", "width"), [(8, 8), (4, 12)])
def test_layers_in_a_row_equal_the_whole_network(tiny_model: Path, dtype: torch.dtype, height: int, width: int) -> None:
    inputs = make_inputs(height, width, dtype)
    with torch.no_grad():
        expected = whole_network(tiny_model, dtype)(*inputs)
        value = inputs
        for layer in row_of_layers(tiny_model, dtype):
            value = layer(value)
    assert torch.equal(unpatchify(value, height, width, 2), expected)


@pytest.mark.parametrize("skipped", [(0,), (1,), (0, 1)])
def test_skipped_blocks_are_left_out_as_in_diffusers(tiny_model: Path, skipped: tuple[int, ...]) -> None:
    """The blocks of skip-layer guidance, with and without a second attention."""
    latents, timestep, context, pooled = inputs = make_inputs(4, 12, torch.float32)
    file = tiny_model / "mmdit.safetensors"
    reference = diffusers_network(NetworkFiles(open_file(file)).config, load_file(file))
    with torch.no_grad():
        expected = reference(latents, context, pooled, timestep, skip_layers=list(skipped), return_dict=False)[0]
        whole = reference(latents, context, pooled, timestep, return_dict=False)[0]
        for value, left_out in ((expected, skipped), (whole, ())):
            assert relative_error(run(row_of_layers(tiny_model, torch.float32), inputs, left_out), value) <= TOLERANCE
    assert relative_error(expected, whole) > 0.01


def run(layers: list[nn.Module], inputs: tuple[Tensor, ...], skipped_blocks: tuple[int, ...]) -> Tensor:
    value: Any = inputs
    for index, layer in enumerate(layers):
        if index - 1 in skipped_blocks:
            assert isinstance(layer, BlockLayer)
            layer.skipped = True
        value = layer(value)
    return unpatchify(value, *inputs[0].shape[-2:], 2)


def test_blocks_are_not_skipped_unless_told(tiny_model: Path) -> None:
    layers = row_of_layers(tiny_model, torch.float32)
    blocks = [layer for layer in layers if isinstance(layer, BlockLayer)]
    assert layers[1:-1] == blocks
    assert not any(block.skipped for block in blocks)
    blocks[0].skipped = True
    assert not blocks[1].skipped
    assert "skipped" not in blocks[0].state_dict()


def test_gradients_through_layers_equal_the_whole_network(tiny_model: Path) -> None:
    inputs = make_inputs(4, 12, torch.float32)
    network, layers = whole_network(tiny_model, torch.float32), row_of_layers(tiny_model, torch.float32)
    network(*inputs).square().mean().backward()
    value = inputs
    for layer in layers:
        value = layer(value)
    unpatchify(value, 4, 12, 2).square().mean().backward()
    config = network.config
    for index, layer in enumerate(layers):
        for name, parameter in layer.named_parameters():
            expected = network.get_parameter(layer_prefix(config, index) + name).grad
            assert torch.equal(parameter.grad, expected), layer_prefix(config, index) + name


def test_only_one_tensor_travels_between_layers(tiny_model: Path) -> None:
    value = make_inputs(4, 4, torch.float32)
    for layer in row_of_layers(tiny_model, torch.float32):
        value = layer(value)
        assert isinstance(value, Tensor)
        assert value.is_floating_point()


@pytest.mark.parametrize("length", [0, 1, 7])
def test_unpack_is_the_inverse_of_pack(length: int) -> None:
    tokens, context, conditioning = torch.randn(2, 5, 4), torch.randn(2, length, 4), torch.randn(2, 4)
    packed = pack(tokens, context, conditioning)
    assert packed.shape == (2, length + 5 + 1, 4)
    parts = unpack(packed, length)
    assert all(torch.equal(part, given) for part, given in zip(parts, (tokens, context, conditioning), strict=True))


def test_no_context_packs_like_an_empty_one() -> None:
    tokens, conditioning = torch.randn(2, 5, 4), torch.randn(2, 4)
    assert torch.equal(pack(tokens, None, conditioning), pack(tokens, torch.empty(2, 0, 4), conditioning))


def test_parameter_names_of_all_layers_are_the_native_state_dict(tiny_model: Path) -> None:
    config = NetworkFiles(open_file(tiny_model / "mmdit.safetensors")).config
    names = [
        layer_prefix(config, index) + name
        for index in range(num_layers(config))
        for name in make_layer(config, index, CONTEXT_LENGTH).state_dict()
    ]
    assert len(names) == len(set(names))
    assert set(names) == set(tiny_shapes())


def test_cost_counts_the_multiply_adds_of_an_image_token_and_a_third_of_a_text_token(tiny_model: Path) -> None:
    config = NetworkFiles(open_file(tiny_model / "mmdit.safetensors")).config
    for index in range(1, config.depth + 1):
        layer = make_layer(config, index, CONTEXT_LENGTH)
        linears = [(name, module) for name, module in layer.named_modules() if isinstance(module, nn.Linear)]
        work = {stream: 0 for stream in ("x_block", "context_block")}
        for name, module in linears:
            if "adaLN" not in name:
                work[name.split(".")[0]] += module.weight.numel()
        assert layer_cost(config, index) == pytest.approx(work["x_block"] + work["context_block"] / 3)
