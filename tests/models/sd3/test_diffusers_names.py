"""Names in diffusers compared with its own class and converter, at the released sizes on the meta device."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch

from models.sd3 import diffusers_names
from models.sd3.network_shapes import adaptable_modules, network_shapes
from models.sd3.variants import VARIANTS, detect_config
from tests.golden.make_lora_keys import RELEASED
from tests.models.sd3.diffusers_reference import relative_error
from tests.public_files import diffusers_tensors
from tests.tiny_model import DEPTH, random_weights, tiny_shapes


@cache
def network_of(variant: str) -> Any:
    """Returns diffusers' network of the config.json that the program writes, with a small position table to save time."""
    from diffusers import SD3Transformer2DModel

    settings = diffusers_names.transformer_config(VARIANTS[variant])
    with torch.device("meta"):
        network = SD3Transformer2DModel.from_config({**settings, "pos_embed_max_size": 4})
    return network


@pytest.mark.parametrize("variant", RELEASED)
def test_names_and_shapes_equal_those_of_diffusers_network(variant: str) -> None:
    config = VARIANTS[variant]
    native = network_shapes(config)
    ours = {
        diffusers: tuple(part.shape)
        for name, shape in native.items()
        for diffusers, part in diffusers_names.to_diffusers(name, torch.empty(shape, device="meta"), config.depth).items()
    }
    theirs = {name: tuple(tensor.shape) for name, tensor in network_of(variant).state_dict().items()}
    theirs["pos_embed.pos_embed"] = (1, config.pos_embed_max_size**2, config.hidden_size)
    assert ours == theirs
    assert diffusers_names.native_shapes(theirs) == native


@pytest.mark.parametrize("variant", RELEASED)
def test_every_adaptable_module_has_a_name_in_diffusers(variant: str) -> None:
    ours = [name for module in adaptable_modules(VARIANTS[variant]) for name in diffusers_names.diffusers_modules(module)]
    kinds = torch.nn.Linear | torch.nn.Conv2d
    theirs = [name for name, module in network_of(variant).named_modules() if isinstance(module, kinds)]
    assert sorted(ours) == sorted(theirs)


@pytest.mark.parametrize("variant", RELEASED)
def test_native_module_inverts_diffusers_modules(variant: str) -> None:
    for module in adaptable_modules(VARIANTS[variant]):
        names = diffusers_names.diffusers_modules(module)
        for part, name in enumerate(names):
            assert diffusers_names.native_module(name) == (module, part, len(names))


@pytest.mark.parametrize(
    "name", ["pos_embed", "joint_blocks.0.x_block.attn", "transformer_blocks.0.attn.to_q", "proj_out", ""]
)
def test_name_that_is_not_a_native_module_is_refused(name: str) -> None:
    with pytest.raises(KeyError):
        diffusers_names.diffusers_modules(name)


def test_values_equal_those_of_diffusers_converter_and_convert_back() -> None:
    """diffusers' converter determines which modulations have swapped halves."""
    native = random_weights(tiny_shapes())
    ours = {
        name: part for key, value in native.items() for name, part in diffusers_names.to_diffusers(key, value, DEPTH).items()
    }
    theirs = diffusers_tensors(native)
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        assert torch.equal(ours[name], value), name
    for key, value in native.items():
        parts = [theirs[name] for name in diffusers_names.diffusers_names(key)]
        assert torch.equal(diffusers_names.to_native(key, parts, DEPTH), value), key


def test_tensor_with_a_missing_part_has_no_native_shape() -> None:
    shapes = {name: tuple(value.shape) for name, value in diffusers_tensors(random_weights(tiny_shapes())).items()}
    del shapes["transformer_blocks.1.attn.to_k.weight"]
    found = diffusers_names.native_shapes(shapes)
    assert set(tiny_shapes()) - set(found) == {"joint_blocks.1.x_block.attn.qkv.weight"}


def test_network_built_from_the_exported_config_gives_the_same_velocity() -> None:
    from diffusers import SD3Transformer2DModel

    from models.sd3.mmdit import MMDiT

    config = detect_config(tiny_shapes())
    native = random_weights(tiny_shapes())
    ours = MMDiT(config)
    ours.load_state_dict(native)
    theirs = SD3Transformer2DModel.from_config(diffusers_names.transformer_config(config))
    theirs.load_state_dict(diffusers_tensors(native))
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(1, 16, 4, 6, generator=generator)
    context = torch.randn(1, 5, config.context_dim, generator=generator)
    pooled, timestep = torch.randn(1, config.pooled_dim, generator=generator), torch.tensor([400.0])
    with torch.no_grad():
        expected = theirs(latents, context, pooled, timestep, return_dict=False)[0]
        assert relative_error(ours(latents, timestep, context, pooled), expected) <= 1e-5
