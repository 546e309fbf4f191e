"""The family's interface to the trainer, and errors of its configuration."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch

import models
from models.family import ModelFilesError
from models.sd3.family import SD3Family
from models.sd3.settings import MergedAdapter
from models.sd3.text_conditioning import join_text
from models.tensor_files import TensorFiles
from tests.model_copies import linked_copy, rewrite, settings_for
from tests.tiny_model import CLIP_G_WIDTH, CLIP_L_WIDTH, CONTEXT_DIM, DEPTH, POOLED_DIM, tiny_shapes


@pytest.fixture(scope="module")
def family(tiny_model: Path) -> SD3Family:
    return SD3Family.from_files(settings_for(tiny_model))


def test_registry_finds_the_family() -> None:
    assert "sd3" in models.family_names()
    assert models.family_class("sd3") is SD3Family
    with pytest.raises(KeyError):
        models.family_class("sd4")


def test_layers_have_every_parameter_of_the_file_once(family: SD3Family) -> None:
    named = {layer.prefix + name: shape for layer in family.layers for name, shape in layer.shapes.items()}
    assert sum(len(layer.shapes) for layer in family.layers) == len(named)
    assert named == {name: shape for name, shape in tiny_shapes().items() if name != "pos_embed"}
    assert [layer.name for layer in family.layers] == [
        "embedders",
        *(f"joint_blocks.{index}" for index in range(DEPTH)),
        "final_layer",
    ]


def test_layers_are_built_in_the_training_precision(tiny_model: Path) -> None:
    layer = SD3Family.from_files(settings_for(tiny_model, dtype="bfloat16")).layers[1].build()
    assert {parameter.dtype for parameter in layer.parameters()} == {torch.bfloat16}


def test_latent_geometry_is_that_of_the_network(family: SD3Family) -> None:
    assert (family.latent.channels, family.latent.pixel_multiple, family.latent.max_side_pixels) == (16, 16, 256)


def test_timestep_is_1000_sigma_in_float32_for_any_dtype_of_the_latents(family: SD3Family) -> None:
    text = {
        f"{name}.sequence": torch.randn(2, 8, width).to(torch.bfloat16)
        for name, width in (("clip_l", CLIP_L_WIDTH), ("clip_g", CLIP_G_WIDTH), ("t5xxl", CONTEXT_DIM))
    }
    text |= {
        f"{name}.pooled": torch.randn(2, width).to(torch.bfloat16)
        for name, width in (("clip_l", CLIP_L_WIDTH), ("clip_g", CLIP_G_WIDTH))
    }
    latents = torch.randn(2, 16, 4, 4).to(torch.bfloat16)
    sample = family.sample(latents, torch.tensor([0.999, 0.5131]), text)
    assert sample.shape == family.sample_shape(2, 4, 4)
    assert sample.tensors.keys() == set(family.input_names)
    noisy, timestep, context, pooled = (sample.tensors[name] for name in family.input_names)
    assert timestep.dtype == torch.float32
    torch.testing.assert_close(timestep, torch.tensor([999.0, 513.1]))
    assert torch.equal(noisy, latents)
    assert torch.equal(context, join_text(text, family.text_tokens, family.config)[0])
    assert context.shape == (2, 16, CONTEXT_DIM)
    assert pooled.shape == (2, POOLED_DIM)
    assert context.dtype == pooled.dtype == torch.bfloat16


def test_every_adaptable_module_is_in_exactly_one_target_group(family: SD3Family) -> None:
    for module in family.adaptable_modules:
        assert sum(bool(re.fullmatch(pattern, module)) for pattern in family.lora_target_groups.values()) == 1, module


def test_default_targets_are_attention_and_mlp_of_both_streams_and_the_final_layer(family: SD3Family) -> None:
    patterns = [family.lora_target_groups[group] for group in family.default_lora_targets]
    chosen = {name for name in family.adaptable_modules if any(re.fullmatch(pattern, name) for pattern in patterns)}
    assert "joint_blocks.0.x_block.attn.qkv" in chosen
    assert f"joint_blocks.{DEPTH - 1}.context_block.attn.qkv" in chosen
    assert {name for name in chosen if name.startswith("final_layer.")} == {
        "final_layer.linear",
        "final_layer.adaLN_modulation.1",
    }
    assert not [name for name in chosen if "joint_blocks" in name and "adaLN" in name]
    assert len(chosen) == 4 * (2 * DEPTH) - 3 + 2


def test_block_of_a_module_follows_from_its_name(family: SD3Family) -> None:
    assert family.num_blocks == DEPTH
    blocks = {family.block_of(name) for name in family.adaptable_modules}
    assert blocks == {None, *range(DEPTH)}
    assert family.block_of("final_layer.linear") is None
    assert family.block_of("joint_blocks.2.x_block.attn.qkv") == 2


def test_description_has_variant_and_precision(family: SD3Family) -> None:
    assert family.describe() == "SD3.5-medium-like (width 128, depth 3), float32"


def test_opening_a_model_reads_no_weights(tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: object) -> None:
        raise AssertionError("a tensor was read")

    monkeypatch.setattr(TensorFiles, "read", refuse)
    assert len(SD3Family.from_files(settings_for(tiny_model)).layers) == DEPTH + 2


def change_config(folder: Path, **changes: object) -> None:
    path = folder / "config.json"
    settings = {**json.loads(path.read_text()), **changes}
    rewrite(path, json.dumps({key: value for key, value in settings.items() if value is not None}))


def test_unusual_scaling_factor_is_noted(tiny_model: Path, tmp_path: Path) -> None:
    model = linked_copy(tiny_model, tmp_path / "model")
    assert not SD3Family.from_files(settings_for(model)).notes
    change_config(model / "vae", scaling_factor=1.05)
    (note,) = SD3Family.from_files(settings_for(model)).notes
    assert note == f"{model / 'vae'} has scaling_factor 1.05; SD3's autoencoder has 1.5305"


@pytest.mark.parametrize(
    ("folder", "changes", "message"),
    [
        ("vae", {"scaling_factor": 0.3611, "shift_factor": 0.1159}, "is the autoencoder of Flux"),
        ("vae", {"scaling_factor": 0.13025}, "is the autoencoder of Stable Diffusion XL"),
        ("vae", {"scaling_factor": None, "shift_factor": None}, "has no scaling_factor and no shift_factor"),
        ("vae", {"block_out_channels": 5}, "block_out_channels = 5: must be a list of integers above 0"),
        ("vae", {"block_out_channels": []}, "must be a list of integers above 0"),
        ("vae", {"layers_per_block": "2"}, "layers_per_block = '2': must be an integer above 0"),
        ("text_encoder", {"num_hidden_layers": "2"}, "num_hidden_layers = '2': must be an integer above 0"),
        ("text_encoder", {"text_config": 3}, "text_config = 3: must be a table"),
        ("text_encoder_3", {"num_heads": 0}, "num_heads = 0: must be an integer above 0"),
    ],
)
def test_invalid_settings_in_config_json_are_refused(
    tiny_model: Path, tmp_path: Path, folder: str, changes: dict[str, object], message: str
) -> None:
    model = linked_copy(tiny_model, tmp_path / "model")
    change_config(model / folder, **changes)
    with pytest.raises(ModelFilesError, match=re.escape(message)):
        SD3Family.from_files(settings_for(model))


@pytest.mark.parametrize("strength", [float("nan"), float("inf")])
def test_strength_must_be_finite(strength: float) -> None:
    with pytest.raises(ValueError, match="finite"):
        MergedAdapter(path=Path("lora.safetensors"), strength=strength)
