"""The released variants: recognized by tensor shapes, and built by name without files or memory."""

from __future__ import annotations

import math
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from models.family import BlockLayer, LatentSpec, NoFilesError
from models.sd3 import diffusers_names
from models.sd3.family import SD3Family
from models.sd3.network_shapes import adaptable_modules, network_shapes
from models.sd3.settings import SD3Settings
from models.sd3.variants import VARIANTS, MMDiTConfig, architecture_id, detect_config, variant_name
from tests.golden.make_lora_keys import RANK, RELEASED, golden_path, read_golden, released_shapes
from tests.model_copies import settings_for
from tests.models.sd3.diffusers_reference import to_diffusers
from tests.tiny_model import native_shapes

COUNTS = {
    "SD3-medium": {"parameters": 2_028_328_000, "keys": 491, "table": 56_623_104},
    "SD3.5-medium": {"parameters": 2_243_171_520, "keys": 665, "table": 226_492_416},
    "SD3.5-large": {"parameters": 8_056_627_520, "keys": 923, "table": 89_653_248},
}
"""Counted in the released files: parameters without the position table, tensors, elements of the position table."""
TURBO = "SD3.5-large-turbo"


# --- shapes of the released files --------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", RELEASED)
def test_released_variant_is_recognized_by_its_shapes(variant: str) -> None:
    shape = RELEASED[variant]
    config = detect_config(released_shapes(variant))
    assert config == MMDiTConfig(
        patch_size=2,
        in_channels=16,
        depth=shape["depth"],
        hidden_size=shape["width"],
        context_dim=4096,
        pooled_dim=2048,
        pos_embed_max_size=shape["pos_embed_max_size"],
        qk_norm=shape["qk_norm"],
        dual_attention_layers=shape.get("dual_attention_layers", ()),
    )
    assert config.num_heads == config.depth
    assert variant_name(config).startswith(variant)


@pytest.mark.parametrize("variant", RELEASED)
def test_network_of_a_released_variant_has_the_tensors_of_its_published_file(variant: str) -> None:
    published, counts = released_shapes(variant), COUNTS[variant]
    ours = network_shapes(detect_config(published))
    assert ours == published
    assert len(ours) == counts["keys"]
    assert math.prod(ours.pop("pos_embed")) == counts["table"]
    assert sum(math.prod(shape) for shape in ours.values()) == counts["parameters"]


@pytest.mark.parametrize("variant", RELEASED)
def test_released_variant_is_recognized_by_diffusers_shapes_too(variant: str) -> None:
    native = released_shapes(variant)
    tensors = {name: torch.empty(shape, device="meta") for name, shape in native.items()}
    depth = RELEASED[variant]["depth"]
    published = {name: tuple(tensor.shape) for name, tensor in to_diffusers(tensors, depth).items()}
    assert diffusers_names.native_shapes(published) == native


@pytest.mark.parametrize(
    ("variant", "name"),
    [
        ("SD3-medium", "stable-diffusion-3-medium"),
        ("SD3.5-medium", "stable-diffusion-3-5-medium"),
        ("SD3.5-large", "stable-diffusion-3-5-large"),
    ],
)
def test_architecture_id_is_the_standard_name(variant: str, name: str) -> None:
    assert architecture_id(detect_config(released_shapes(variant))) == name


def test_large_turbo_has_the_shapes_of_large_and_is_named_with_it() -> None:
    assert VARIANTS[TURBO] == VARIANTS["SD3.5-large"]
    assert "large-turbo" in variant_name(VARIANTS[TURBO])


def test_width_that_is_not_a_multiple_of_the_head_width_is_refused() -> None:
    shapes = native_shapes(depth=2, width=100, context_dim=8, pooled_dim=8, pos_embed_max_size=4, qk_norm=False)
    with pytest.raises(ValueError, match="has width 100, which is not a multiple of the head width, 64"):
        detect_config(shapes)


# --- families built by name --------------------------------------------------------------------------------------------


@cache
def family_of(variant: str) -> SD3Family:
    return SD3Family.from_variant(variant)


def test_every_released_variant_can_be_built_by_name() -> None:
    assert set(VARIANTS) == {*RELEASED, TURBO}


@pytest.mark.parametrize("variant", RELEASED)
def test_variant_by_name_has_the_config_of_the_published_file(variant: str) -> None:
    assert family_of(variant).config == detect_config(released_shapes(variant))


@pytest.mark.parametrize("variant", RELEASED)
def test_layers_of_a_variant_have_every_parameter_of_the_published_file_once(variant: str) -> None:
    layers = family_of(variant).layers
    named = {layer.prefix + name: shape for layer in layers for name, shape in layer.shapes.items()}
    assert sum(len(layer.shapes) for layer in layers) == len(named)
    assert named == {name: shape for name, shape in released_shapes(variant).items() if name != "pos_embed"}
    assert sum(layer.num_parameters for layer in layers) == COUNTS[variant]["parameters"]
    assert [layer.block for layer in layers] == [None, *range(RELEASED[variant]["depth"]), None]


@pytest.mark.parametrize("variant", RELEASED)
def test_adaptable_modules_of_a_variant_are_those_of_the_golden_lora_file(variant: str) -> None:
    golden = read_golden(golden_path(variant))
    modules = family_of(variant).adaptable_modules
    assert {f"lora_unet_{name.replace('.', '_')}" for name in modules} == {key.partition(".")[0] for key in golden}
    for name, shape in modules.items():
        key = f"lora_unet_{name.replace('.', '_')}"
        assert golden[f"{key}.lora_down.weight"] == (RANK, *shape[1:])
        assert golden[f"{key}.lora_up.weight"][0] == shape[0]


@pytest.mark.parametrize("variant", RELEASED)
def test_layers_of_a_variant_are_built_on_the_meta_device_in_the_dtypes_of_loaded_layers(variant: str) -> None:
    family = family_of(variant)
    assert len(family.layers) == family.num_blocks + 2
    for layer in (family.layers[0], family.layers[1], family.layers[-2], family.layers[-1]):
        module = layer.build()
        assert {tensor.device.type for tensor in module.state_dict().values()} == {"meta"}
        assert {name: tuple(parameter.shape) for name, parameter in module.named_parameters()} == layer.shapes
        assert {parameter.dtype for parameter in module.parameters()} == {torch.bfloat16}
        assert {buffer.dtype for buffer in module.buffers()} <= {torch.float32}
        assert isinstance(module, BlockLayer) == (layer.block is not None)


@pytest.mark.parametrize("variant", RELEASED)
def test_latent_geometry_of_a_variant(variant: str) -> None:
    max_side_pixels = RELEASED[variant]["pos_embed_max_size"] * 16
    expected = LatentSpec(channels=16, downscale=8, patch=2, max_side_pixels=max_side_pixels)
    assert family_of(variant).latent == expected


def comparable(family: SD3Family) -> dict[str, Any]:
    """Returns everything that does not depend on files."""
    shape = family.sample_shape(2, 8, 12)
    return {
        "layers": [(layer.name, layer.prefix, layer.cost(shape), layer.shapes, layer.block) for layer in family.layers],
        "streams": [[(spec.name, spec.length(shape)) for spec in layer.outputs] for layer in family.layers],
        "adaptable modules": family.adaptable_modules,
        "target groups": (family.lora_target_groups, family.default_lora_targets),
        "latent": family.latent,
        "names": (family.export_names, family.native_prefix, family.input_names, family.layer_list_version),
        "sample shape": shape,
        "config": family.diffusers_config(),
        "headers": (family.export_metadata(), family.adapter_metadata(True), family.adapter_metadata(False)),
        "settings": family.network_settings,
        "description": family.describe(),
    }


def test_family_by_name_equals_family_from_files_of_the_same_shape(
    tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    defaults = {key: SD3Settings.model_fields[key].default for key in ("clip_max_token_length", "t5xxl_max_token_length")}
    from_files = SD3Family.from_files(settings_for(tiny_model, dtype="bfloat16", **defaults))
    monkeypatch.setitem(VARIANTS, "tiny", from_files.config)  # type: ignore[arg-type]
    by_name = SD3Family.from_variant("tiny")
    assert comparable(by_name) == comparable(from_files)
    for empty, loaded in zip(by_name.layers, from_files.layers, strict=True):
        tensors = [(name, value.shape, value.dtype) for name, value in empty.build().state_dict().items()]
        assert tensors == [(name, value.shape, value.dtype) for name, value in loaded.build().state_dict().items()]


def test_lora_file_opens_without_the_files_of_the_network(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    module, shape = "final_layer.linear", adaptable_modules(VARIANTS["SD3-medium"])["final_layer.linear"]
    key = f"lora_unet_{module.replace('.', '_')}"
    tensors = {
        f"{key}.lora_down.weight": torch.ones(2, shape[1]),
        f"{key}.lora_up.weight": torch.ones(shape[0], 2),
    }
    save_file(tensors, tmp_path / "lora.safetensors")
    assert list(family_of("SD3-medium").open_lora_file(tmp_path / "lora.safetensors").shapes) == [module]


def test_family_by_name_has_no_files() -> None:
    family = family_of("SD3-medium")
    assert (family.network_files, family.sources, family.notes) == ((), {}, ())


@pytest.mark.parametrize(
    ("what", "use"),
    [
        ("the image encoder", lambda family: family.image_encoder),
        ("a text encoder", lambda family: family.text_encoders),
        ("the image decoder", lambda family: family.load_decoder(torch.device("cpu"), 1024)),
        ("a complete single file", lambda family: family.frozen_tensors()),
    ],
)
def test_family_by_name_refuses_what_requires_files(what: str, use: Any) -> None:
    with pytest.raises(NoFilesError, match=f"{what} requires the model's files; this SD3-medium was created by name"):
        use(family_of("SD3-medium"))


def test_unknown_variant_is_refused_with_the_known_names() -> None:
    with pytest.raises(ValueError, match=r"unknown variant 'SD4'; known are SD3-medium, SD3\.5-medium, SD3\.5-large, SD3"):
        SD3Family.from_variant("SD4")
