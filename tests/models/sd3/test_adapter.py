"""The family as the trainer sees it, and what is said of files that do not fit."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import models
from models.base import ModelFilesError
from models.sd3.adapter import SD3Adapter
from models.sd3.text_encoders import join_text
from tests.model_copies import linked_copy, rewrite, settings_for
from tests.tiny_model import CONTEXT_DIM, DEPTH, POOLED_DIM, tiny_shapes


def problems_of(model: Path, **changes: object) -> list[tuple[str, str]]:
    with pytest.raises(ModelFilesError) as caught:
        SD3Adapter(settings_for(model, **changes))
    return caught.value.problems


def change_config(folder: Path, **changes: object) -> None:
    path = folder / "config.json"
    rewrite(path, json.dumps({**json.loads(path.read_text()), **changes}))


@pytest.fixture(scope="module")
def adapter(tiny_model: Path) -> SD3Adapter:
    return SD3Adapter(settings_for(tiny_model))


def test_the_registry_finds_the_family() -> None:
    assert "sd3" in models.family_names()
    assert models.adapter_class("sd3") is SD3Adapter
    with pytest.raises(KeyError):
        models.adapter_class("sd4")


def test_layers_hold_every_parameter_of_the_file_once(adapter: SD3Adapter) -> None:
    named = {layer.prefix + name: shape for layer in adapter.layers for name, shape in layer.shapes.items()}
    assert sum(len(layer.shapes) for layer in adapter.layers) == len(named)
    assert named == {name: shape for name, shape in tiny_shapes().items() if name != "pos_embed"}
    assert [layer.name for layer in adapter.layers] == [
        "embedders",
        *(f"joint_blocks.{index}" for index in range(DEPTH)),
        "final_layer",
    ]


def test_a_layer_is_built_in_the_training_precision(tiny_model: Path) -> None:
    layer = SD3Adapter(settings_for(tiny_model, dtype="bfloat16")).layers[1].build()
    assert {parameter.dtype for parameter in layer.parameters()} == {torch.bfloat16}


def test_latent_geometry_is_the_network_s(adapter: SD3Adapter) -> None:
    assert (adapter.latent.channels, adapter.latent.pixel_multiple, adapter.latent.max_side_pixels) == (16, 16, 256)


def test_timestep_is_a_thousand_sigma_in_float32_whatever_the_latents_are(adapter: SD3Adapter) -> None:
    text = {
        f"{name}.sequence": torch.randn(2, 8, width).to(torch.bfloat16)
        for name, width in (("clip_l", 16), ("clip_g", 32), ("t5xxl", 64))
    }
    text |= {f"{name}.pooled": torch.randn(2, width).to(torch.bfloat16) for name, width in (("clip_l", 16), ("clip_g", 32))}
    latents = torch.randn(2, 16, 4, 4).to(torch.bfloat16)
    noisy, timestep, context, pooled = adapter.network_inputs(latents, torch.tensor([0.999, 0.5131]), text)
    assert timestep.dtype == torch.float32
    torch.testing.assert_close(timestep, torch.tensor([999.0, 513.1]))
    assert torch.equal(noisy, latents)
    assert torch.equal(context, join_text(text, CONTEXT_DIM)[0])
    assert context.shape == (2, 16, CONTEXT_DIM)
    assert pooled.shape == (2, POOLED_DIM)
    assert context.dtype == pooled.dtype == torch.bfloat16


def test_default_targets_are_attention_and_mlp_of_both_streams_and_the_final_layer(adapter: SD3Adapter) -> None:
    from utils.lora import match_targets

    chosen = match_targets(adapter.linear_modules, adapter.default_lora_targets)
    assert "joint_blocks.0.x_block.attn.qkv" in chosen
    assert f"joint_blocks.{DEPTH - 1}.context_block.attn.qkv" in chosen
    assert {name for name in chosen if name.startswith("final_layer.")} == {
        "final_layer.linear",
        "final_layer.adaLN_modulation.1",
    }
    assert not [name for name in chosen if "joint_blocks" in name and "adaLN" in name]
    assert len(chosen) == 4 * (2 * DEPTH) - 3 + 2


def test_description_names_variant_and_precision(adapter: SD3Adapter) -> None:
    assert adapter.describe() == "SD3.5-medium-like (width 128, depth 3), float32"


def test_opening_a_model_reads_no_weights(tiny_model: Path, tmp_path: Path) -> None:
    """Of the encoders only config.json is needed, of the network only the header."""
    folder = linked_copy(tiny_model, tmp_path / "model")
    for path in folder.glob("text_encoder*/model.safetensors"):
        rewrite(path, "not read before encoding")
    rewrite(folder / "vae" / "diffusion_pytorch_model.safetensors", "not read before encoding")
    assert len(SD3Adapter(settings_for(folder)).layers) == DEPTH + 2


# --- what is refused ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("key", "folder"),
    [("vae", "vae"), ("clip_l", "text_encoder"), ("clip_g", "text_encoder_2"), ("t5xxl", "text_encoder_3")],
)
@pytest.mark.parametrize("content", [None, "{ half a", "[]"])
def test_a_missing_or_broken_config_json_is_named(
    tiny_model: Path, tmp_path: Path, key: str, folder: str, content: str | None
) -> None:
    model = linked_copy(tiny_model, tmp_path / "model")
    (model / folder / "config.json").unlink()
    if content is not None:
        (model / folder / "config.json").write_text(content)
    ((named, text),) = problems_of(model)
    assert named == key
    assert "config.json" in text
    assert str(model / folder) in text


@pytest.mark.parametrize(
    ("key", "folder"), [("clip_l", "text_encoder"), ("clip_g", "text_encoder_2"), ("t5xxl", "text_encoder_3")]
)
def test_an_encoder_without_safetensors_is_named(tiny_model: Path, tmp_path: Path, key: str, folder: str) -> None:
    model = linked_copy(tiny_model, tmp_path / "model")
    (model / folder / "model.safetensors").rename(model / folder / "pytorch_model.bin")
    assert [(named, "no .safetensors file" in text) for named, text in problems_of(model)] == [(key, True)]


@pytest.mark.parametrize(
    ("key", "tokenizer", "wanted"),
    [
        ("clip_l", "tokenizer", "vocab.json and merges.txt"),
        ("clip_g", "tokenizer_2", "vocab.json and merges.txt"),
        ("t5xxl", "tokenizer_3", "tokenizer.json or spiece.model"),
    ],
)
def test_a_missing_tokenizer_says_which_files_to_put_where(
    tiny_model: Path, tmp_path: Path, key: str, tokenizer: str, wanted: str
) -> None:
    model = linked_copy(tiny_model, tmp_path / "model")
    shutil.rmtree(model / tokenizer)
    ((named, text),) = problems_of(model)
    assert named == key
    assert wanted in text
    assert str(model / tokenizer) in text


@pytest.mark.parametrize("tokenizer", ["tokenizer", "tokenizer_2"])
@pytest.mark.parametrize("missing", ["vocab.json", "merges.txt"])
def test_half_a_clip_tokenizer_is_refused_before_it_is_used(
    tiny_model: Path, tmp_path: Path, tokenizer: str, missing: str
) -> None:
    model = linked_copy(tiny_model, tmp_path / "model")
    (model / tokenizer / missing).unlink()
    assert len(problems_of(model)) == 1


@pytest.mark.parametrize(
    ("change", "key", "message"),
    [
        (lambda m: change_config(m / "text_encoder", hidden_size=24), "clip_l", "add up to 56, the network takes 48"),
        (lambda m: change_config(m / "text_encoder_2", projection_dim=40), "clip_l", "add up to 56, the network takes 48"),
        (lambda m: change_config(m / "text_encoder_2", hidden_size=64), "clip_g", "wider than the network's context, 64"),
        (lambda m: change_config(m / "text_encoder_3", d_model=80), "t5xxl", "is 80 wide, the network's context is 64"),
        (
            lambda m: change_config(m / "text_encoder_2", max_position_embeddings=6),
            "clip_max_token_length",
            "clip_g has 6 positions",
        ),
        (lambda m: change_config(m / "vae", latent_channels=4), "vae", "has 4 latent channels"),
    ],
)
def test_an_encoder_that_does_not_fit_the_network_is_refused(
    tiny_model: Path, tmp_path: Path, change: Callable[[Path], None], key: str, message: str
) -> None:
    model = linked_copy(tiny_model, tmp_path / "model")
    change(model)
    ((named, text),) = problems_of(model)
    assert named == key
    assert message in text


def test_all_folders_problems_are_told_at_once(tiny_model: Path, tmp_path: Path) -> None:
    model = linked_copy(tiny_model, tmp_path / "model")
    shutil.rmtree(model / "vae")
    shutil.rmtree(model / "text_encoder")
    shutil.rmtree(model / "tokenizer_3")
    assert {key for key, _ in problems_of(model)} == {"vae", "clip_l", "t5xxl"}


def test_problems_of_the_network_and_of_the_folders_are_told_at_once(tiny_model: Path, tmp_path: Path) -> None:
    model = linked_copy(tiny_model, tmp_path / "model")
    shutil.rmtree(model / "vae")
    keys = {key for key, _ in problems_of(model, mmdit=tmp_path / "none.safetensors")}
    assert keys == {"mmdit", "vae"}


def test_clip_folders_that_have_changed_places_are_refused(tiny_model: Path, tmp_path: Path) -> None:
    """Their widths add up to the same either way, and the network would be conditioned on nonsense."""
    found = problems_of(tiny_model, clip_l=tiny_model / "text_encoder_2", clip_g=tiny_model / "text_encoder")
    assert ("clip_l", "is wider than clip_g: the two folders have changed places") in found


def test_a_folder_for_the_network_is_told_to_be_one(tiny_model: Path) -> None:
    (problem,) = problems_of(tiny_model, mmdit=tiny_model)
    assert problem == ("mmdit", f"{tiny_model} is a folder; give the .safetensors file with native keys")
