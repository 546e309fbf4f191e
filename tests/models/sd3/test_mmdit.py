"""The network compared with diffusers' own, with the same random weights."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from models.sd3.diffusers_names import diffusers_modules, swaps_halves
from models.sd3.mmdit import MMDiT
from models.sd3.variants import MMDiTConfig
from models.shared.attention import Attention
from tests.models.sd3.diffusers_reference import convert_module, diffusers_network, relative_error, to_diffusers
from tests.tiny_model import native_shapes, random_weights

VARIANTS = {
    "SD3-medium": {"depth": 3, "width": 192, "qk_norm": False, "dual": ()},
    "SD3.5-medium": {"depth": 4, "width": 192, "qk_norm": True, "dual": (0, 1)},
    "SD3.5-large": {"depth": 3, "width": 256, "qk_norm": True, "dual": ()},
}
"""The kinds of blocks of the released variants at reduced depth and width; the head width is 64 as in all of them."""

TOLERANCE = 1e-5
SIZES = ((8, 8), (6, 12), (10, 4))


def config_of(variant: str) -> MMDiTConfig:
    shape = VARIANTS[variant]
    return MMDiTConfig(
        patch_size=2,
        in_channels=16,
        depth=shape["depth"],
        hidden_size=shape["width"],
        context_dim=96,
        pooled_dim=80,
        pos_embed_max_size=12,
        qk_norm=shape["qk_norm"],
        dual_attention_layers=shape["dual"],
    )


def weights_of(config: MMDiTConfig) -> dict[str, Tensor]:
    shapes = native_shapes(
        depth=config.depth,
        width=config.hidden_size,
        context_dim=config.context_dim,
        pooled_dim=config.pooled_dim,
        pos_embed_max_size=config.pos_embed_max_size,
        qk_norm=config.qk_norm,
        dual_attention_layers=config.dual_attention_layers,
    )
    return random_weights(shapes, seed=3)


def network_of(config: MMDiTConfig, weights: dict[str, Tensor]) -> MMDiT:
    network = MMDiT(config)
    network.load_state_dict(weights)
    return network


def make_inputs(config: MMDiTConfig, height: int, width: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Returns (latents, timestep, context, pooled) of two samples, one near each end of the path."""
    generator = torch.Generator().manual_seed(height * 100 + width)
    latents = torch.randn(2, 16, height, width, generator=generator, requires_grad=True)
    context = torch.randn(2, 5, config.context_dim, generator=generator, requires_grad=True)
    pooled = torch.randn(2, config.pooled_dim, generator=generator, requires_grad=True)
    return latents, torch.tensor([999.3, 17.25]), context, pooled


def reference_forward(reference: torch.nn.Module, inputs: tuple[Tensor, Tensor, Tensor, Tensor]) -> Tensor:
    latents, timestep, context, pooled = inputs
    return reference(latents, context, pooled, timestep, return_dict=False)[0]


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize(("height", "width"), SIZES)
def test_velocity_equals_diffusers(variant: str, height: int, width: int) -> None:
    config = config_of(variant)
    weights = weights_of(config)
    inputs = make_inputs(config, height, width)
    with torch.no_grad():
        ours = network_of(config, weights)(*inputs)
        theirs = reference_forward(diffusers_network(config, weights), inputs)
    assert ours.shape == theirs.shape == (2, 16, height, width)
    assert relative_error(ours, theirs) <= TOLERANCE


@pytest.mark.parametrize("variant", VARIANTS)
def test_gradients_of_every_parameter_and_input_equal_diffusers(variant: str) -> None:
    config = config_of(variant)
    weights = weights_of(config)
    network, reference = network_of(config, weights), diffusers_network(config, weights)
    ours, theirs = make_inputs(config, 6, 12), make_inputs(config, 6, 12)
    direction = torch.randn(2, 16, 6, 12, generator=torch.Generator().manual_seed(0))
    (network(*ours) * direction).sum().backward()
    (reference_forward(reference, theirs) * direction).sum().backward()
    for our_input, their_input in zip(ours, theirs, strict=True):
        if our_input.requires_grad:
            assert relative_error(our_input.grad, their_input.grad) <= TOLERANCE
    gradients = {name: parameter.grad for name, parameter in network.named_parameters()}
    expected = {name: parameter.grad for name, parameter in reference.named_parameters()}
    converted = to_diffusers(gradients, config.depth)
    assert converted.keys() == expected.keys()
    for name, gradient in expected.items():
        assert relative_error(converted[name], gradient) <= TOLERANCE, name


def test_swapping_number_and_width_of_heads_in_the_second_attention_changes_the_output(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """sd-scripts swaps the two in attn2 only."""
    config = config_of("SD3.5-medium")
    weights = weights_of(config)
    network, inputs = network_of(config, weights), make_inputs(config, 8, 8)
    with torch.no_grad():
        expected = reference_forward(diffusers_network(config, weights), inputs)
        for index in config.dual_attention_layers:
            second = network.joint_blocks[index].x_block.attn2
            monkeypatch.setattr(second, "heads", lambda projected, of=second: swapped_heads(of, projected))
        wrong = network(*inputs)
    assert relative_error(wrong, expected) > 0.05


def swapped_heads(attention: Attention, projected: Tensor) -> tuple[Tensor, ...]:
    """Splits into 64 heads whose width is the right number of heads."""
    split = Attention.heads(attention, projected)
    return tuple(part.transpose(1, 2).flatten(2).unflatten(2, (64, -1)).transpose(1, 2) for part in split)


@pytest.mark.parametrize("variant", VARIANTS)
def test_output_depends_on_every_parameter_except_the_text_queries_of_the_last_block(variant: str) -> None:
    config = config_of(variant)
    network = network_of(config, weights_of(config))
    network(*make_inputs(config, 8, 8)).square().sum().backward()
    unused = [name for name, parameter in network.named_parameters() if not parameter.grad.abs().sum() > 0]
    last = f"joint_blocks.{config.depth - 1}.context_block.attn"
    assert unused == ([f"{last}.ln_q.weight"] if config.qk_norm else [])
    queries = network.get_parameter(f"{last}.qkv.weight").grad[: config.hidden_size]
    assert not queries.any()


@pytest.mark.parametrize("variant", VARIANTS)
def test_diffusers_names_equal_an_independent_table(variant: str) -> None:
    config = config_of(variant)
    modules = {name.rpartition(".")[0] for name in weights_of(config) if name != "pos_embed" and ".ln_" not in name}
    assert len(modules) > 20
    for module in modules:
        names, swapped = convert_module(module, config.depth)
        assert diffusers_modules(module) == tuple(names)
        assert swaps_halves(module, config.depth) == swapped


def test_timesteps_keep_float32_precision_in_a_bfloat16_network() -> None:
    """bfloat16 rounds 999 to 1000."""
    config = config_of("SD3.5-medium")
    network = network_of(config, weights_of(config)).to(torch.bfloat16)
    latents, _, context, pooled = make_inputs(config, 4, 4)
    inputs = latents.to(torch.bfloat16), torch.tensor([999.0, 1000.0]), context.to(torch.bfloat16), pooled[:1].expand(2, -1)
    _, _, conditioning = network.embed(*inputs)
    assert torch.tensor(999.0).to(torch.bfloat16) == 1000
    assert relative_error(conditioning[0].float(), conditioning[1].float()) > 0.05
