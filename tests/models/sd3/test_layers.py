"""The network as a row of layers."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from models.sd3.layers import layer_cost, layer_prefix, make_layer, num_layers, pack, unpack
from models.sd3.mmdit import MMDiT, unpatchify
from models.sd3.weights import NetworkFiles
from models.tensor_files import open_file
from tests.tiny_model import CONTEXT_DIM, POOLED_DIM, tiny_shapes

CONTEXT_LENGTH = 6


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
