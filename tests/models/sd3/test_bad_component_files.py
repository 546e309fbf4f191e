"""Invalid, missing or mismatched components: every message names the file, what was found and what was expected."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from safetensors.torch import load_file, save_file
from torch import Tensor

from models.sd3.family import SD3Family
from models.tensor_files import open_folder
from tests import public_files
from tests.model_copies import rewrite, settings_for
from tests.models.sd3.bad_files import ENCODER_FOLDERS, errors_of, only_error
from tests.public_files import Tensors, original_part

# --- folders -----------------------------------------------------------------------------------------------------------


def test_folder_with_several_sets_of_weights_is_refused(tiny_model: Path, tmp_path: Path) -> None:
    for name in ("first.safetensors", "second.safetensors"):
        (tmp_path / name).symlink_to(tiny_model / "mmdit.safetensors")
    text = only_error("mmdit", tiny_model, mmdit=tmp_path)
    assert f"{tmp_path} has several sets of weights (first.safetensors, second.safetensors)" in text
    assert "set the path of one file" in text


@pytest.mark.parametrize("key", ["vae", "clip_l", "clip_g", "t5xxl"])
@pytest.mark.parametrize("content", [None, "{ half a", "[]"])
def test_missing_or_invalid_config_json_is_named(model: Path, key: str, content: str | None) -> None:
    path = model / {**ENCODER_FOLDERS, "vae": "vae"}[key] / "config.json"
    path.unlink()
    if content is not None:
        path.write_text(content)
    text = only_error(key, model)
    assert "config.json" in text
    assert str(path.parent) in text


@pytest.mark.parametrize("key", ["mmdit", "vae", "clip_l", "clip_g", "t5xxl"])
def test_folder_of_pickled_weights_is_refused(model: Path, key: str) -> None:
    if key == "mmdit":
        (model / "transformer").mkdir()
        (model / "transformer" / "diffusion_pytorch_model.bin").write_bytes(b"PK")
        folder, changes = model / "transformer", {"mmdit": model / "transformer"}
    else:
        folder, changes = model / {**ENCODER_FOLDERS, "vae": "vae"}[key], {}
        for path in folder.glob("*.safetensors"):
            path.rename(path.with_suffix(".bin"))
    text = only_error(key, model, **changes)
    assert f"{folder} has no .safetensors file" in text
    assert "pickled" in text


@pytest.mark.parametrize(
    ("key", "setting"), [("clip_l", "hidden_size"), ("clip_g", "num_hidden_layers"), ("t5xxl", "d_model")]
)
def test_setting_missing_in_config_json_is_named(model: Path, key: str, setting: str) -> None:
    path = model / ENCODER_FOLDERS[key] / "config.json"
    config = json.loads(path.read_text())
    del config[setting]
    rewrite(path, json.dumps(config))
    assert only_error(key, model) == f"{path} has no {setting}"


@pytest.mark.parametrize(
    ("key", "changes", "message"),
    [
        ("clip_l", {"hidden_size": 96}, "has shape (49408, 64), expected (49408, 96)"),
        ("t5xxl", {"num_layers": 3}, "misses tensor encoder.block.2.layer.0.SelfAttention.q.weight (128, 192)"),
        ("vae", {"layers_per_block": 2}, "misses tensor encoder.down_blocks.0.resnets.1.norm1.weight (32,)"),
        ("vae", {"latent_channels": 4}, "has 4 latent channels, the network has 16"),
        ("vae", {"block_out_channels": [32, 32, 64]}, "downscales images by 4, SD3's autoencoder by 8"),
    ],
)
def test_tensors_that_contradict_config_json_are_named(model: Path, key: str, changes: dict[str, Any], message: str) -> None:
    folder = model / {**ENCODER_FOLDERS, "vae": "vae"}[key]
    path = folder / "config.json"
    rewrite(path, json.dumps({**json.loads(path.read_text()), **changes}))
    found = errors_of(model)
    assert {named for named, _ in found} == {key}
    assert all(str(folder) in text for _, text in found)
    assert any(message in text for _, text in found)


# --- components that do not match the network --------------------------------------------------------------------------


def write_clip(folder: Path, model: Path, key: str, **changes: int) -> Path:
    from transformers import CLIPTextConfig, CLIPTextModelWithProjection

    config = CLIPTextConfig.from_pretrained(model / ENCODER_FOLDERS[key])
    CLIPTextModelWithProjection(CLIPTextConfig(**{**config.to_dict(), **changes})).save_pretrained(folder)
    return folder


def write_t5(folder: Path, model: Path, width: int) -> Path:
    from transformers import T5Config, T5EncoderModel

    config = T5Config.from_pretrained(model / "text_encoder_3")
    T5EncoderModel(T5Config(**{**config.to_dict(), "d_model": width, "vocab_size": 64})).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("changed", ["clip_l", "clip_g"])
def test_clips_of_another_width_are_refused(model: Path, tmp_path: Path, changed: str) -> None:
    width = {"hidden_size": 192, "projection_dim": 192} if changed == "clip_g" else {"hidden_size": 128}
    folder = write_clip(model / "other", model, changed, **width)
    found = errors_of(model, **{changed: folder, f"{changed}_tokenizer": str(model / "tokenizer")})
    assert ("clip_l", "pooled width of clip_l and clip_g is 256, the network has 192 for both CLIPs") in found
    assert ("clip_l", "clip_l and clip_g are wider than the network's context, 192") in found


def test_t5_of_another_width_is_refused(model: Path) -> None:
    """For example T5-XL (2048) instead of T5-XXL (4096)."""
    folder = write_t5(model / "other", model, 96)
    assert only_error("t5xxl", model, t5xxl=folder) == "has width 96, the network's context has 192"


def test_clip_with_fewer_positions_than_tokens_is_refused(model: Path) -> None:
    folder = write_clip(model / "other", model, "clip_g", max_position_embeddings=6)
    text = only_error("clip_max_token_length", model, clip_g=folder)
    assert text == "= 8: clip_g has 6 positions"


def test_autoencoder_of_four_channels_is_refused(tiny_model: Path, tmp_path: Path) -> None:
    """Autoencoders of Stable Diffusion 1, 2 and XL, as a native file and as a folder."""
    from diffusers import AutoencoderKL

    config = json.loads((tiny_model / "vae" / "config.json").read_text())
    changes = {"latent_channels": 4, "use_quant_conv": True, "use_post_quant_conv": True}
    AutoencoderKL.from_config({**config, **changes}).save_pretrained(tmp_path / "vae")
    tensors = load_file(tmp_path / "vae" / "diffusion_pytorch_model.safetensors")
    path = tmp_path / "sdxl_vae.safetensors"
    public_files.write_file(path, public_files.ldm_autoencoder(tensors, tmp_path / "vae"))
    for source in (path, tmp_path / "vae"):
        text = only_error("vae", tiny_model, vae=source)
        assert text == f"{source} has 4 latent channels, the network has 16"


def test_swapped_clip_folders_are_refused(tiny_model: Path) -> None:
    """The sum of their widths is right, but the features would be wrong."""
    found = errors_of(tiny_model, clip_l=tiny_model / "text_encoder_2", clip_g=tiny_model / "text_encoder")
    assert found == [("clip_l", "is wider than clip_g: the two are swapped")]


def test_swapped_clip_files_are_refused(tiny_model: Path, tmp_path: Path) -> None:
    """The released CLIP-L file has no projection, which CLIP-G requires."""
    tensors = load_file(tiny_model / "text_encoder" / "model.safetensors")
    del tensors["text_projection.weight"]
    small = public_files.write_file(tmp_path / "clip_l.safetensors", tensors)
    large = tmp_path / "clip_g.safetensors"
    large.symlink_to(tiny_model / "text_encoder_2" / "model.safetensors")
    public_files.link_tokenizers(tiny_model, tmp_path)
    text = only_error("clip_g", tiny_model, clip_l=large, clip_g=small)
    assert f"{small} is a CLIP text encoder, not a whole CLIP-G text encoder: it has no text_projection.weight" in text


# --- missing components ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def network_only(native: Tensors, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("network_only") / "network.safetensors"
    return public_files.write_file(path, native, public_files.NETWORK_PREFIX)


@pytest.mark.parametrize("key", ["vae", "clip_l", "clip_g", "t5xxl"])
def test_component_missing_in_the_single_file_is_refused(tiny_model: Path, network_only: Path, key: str) -> None:
    text = only_error(key, tiny_model, mmdit=network_only, **{key: None})
    assert f"is not set, and {network_only} does not contain it; set {key} = PATH" in text
    assert (f"{key} = false" in text) == (key != "vae")  # the autoencoder cannot be off


@pytest.mark.parametrize("key", ["vae", "clip_l", "clip_g", "t5xxl"])
def test_component_missing_in_the_pipeline_folder_is_refused(
    tiny_model: Path, tmp_path: Path, native: Tensors, key: str
) -> None:
    public_files.diffusers_network(native).save_pretrained(tmp_path / "transformer")
    text = only_error(key, tiny_model, mmdit=tmp_path, **{key: None})
    folder = {**ENCODER_FOLDERS, "vae": "vae"}[key]
    assert f"{tmp_path} has no folder {folder}; set {key} = PATH" in text


@pytest.mark.parametrize("key", ["clip_l", "clip_g", "t5xxl"])
@pytest.mark.parametrize("value", [True, 1, 0, []])
def test_encoder_setting_must_be_a_path_or_false(tiny_model: Path, key: str, value: object) -> None:
    with pytest.raises(ValidationError, match="must be a path, or false to train without it") as caught:
        settings_for(tiny_model, **{key: value})
    assert [error["loc"] for error in caught.value.errors()] == [(key,)]


# --- several errors ----------------------------------------------------------------------------------------------------


def test_errors_of_all_components_are_reported_at_once(model: Path, tmp_path: Path) -> None:
    """A missing file, an invalid one, a wrong size, a missing folder and a tokenizer; found at different stages."""
    (tmp_path / "network.safetensors").write_bytes(b"GGUF" + bytes(60))
    shutil.rmtree(model / "vae")
    path = model / "text_encoder" / "config.json"
    rewrite(path, json.dumps({**json.loads(path.read_text()), "hidden_size": 96}))
    changes = {"t5xxl_tokenizer": str(model / "tokenizer_2"), "clip_g": tmp_path / "none.safetensors"}
    found = errors_of(model, mmdit=tmp_path / "network.safetensors", **changes)
    assert {key for key, _ in found} == {"mmdit", "vae", "clip_l", "clip_g", "t5xxl_tokenizer"}


def test_missing_file_for_all_components_is_reported_once(tiny_model: Path, tmp_path: Path) -> None:
    path = tmp_path / "none.safetensors"
    found = errors_of(tiny_model, mmdit=path, vae=None, clip_l=None, clip_g=None, t5xxl=None)
    assert found == [("mmdit", f"{path} does not exist")]


def test_missing_tensor_of_a_component_in_a_complete_file_is_named(tiny_model: Path, tmp_path: Path) -> None:
    parts: dict[str, dict[str, Tensor]] = {part: original_part(tiny_model, part) for part in ("mmdit", "clip_l")}
    del parts["clip_l"]["text_model.final_layer_norm.bias"]
    path = public_files.write_complete_file(tmp_path / "complete.safetensors", parts)
    public_files.link_tokenizers(tiny_model, tmp_path)
    text = only_error("clip_l", tiny_model, mmdit=path, clip_l=None)
    assert text == f"{path} misses tensor text_model.final_layer_norm.bias (64,)"


def test_unchanged_files_are_accepted(tiny_model: Path, tmp_path: Path) -> None:
    """The tests above change copies of these files."""
    path = tmp_path / "unchanged.safetensors"
    save_file(original_part(tiny_model, "mmdit"), path)
    assert (
        SD3Family.from_files(settings_for(tiny_model, mmdit=path)).config
        == SD3Family.from_files(settings_for(tiny_model)).config
    )


def test_index_decides_which_of_overlapping_shards_a_tensor_is_read_from(tmp_path: Path) -> None:
    save_file({"x": torch.zeros(2), "y": torch.ones(2)}, tmp_path / "model-1.safetensors")
    save_file({"x": torch.full((2,), 5.0)}, tmp_path / "model-2.safetensors")
    index = {"weight_map": {"x": "model-1.safetensors", "y": "model-1.safetensors", "z": "model-2.safetensors"}}
    save_file({"x": torch.full((2,), 5.0), "z": torch.ones(1)}, tmp_path / "model-2.safetensors")
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    assert torch.equal(open_folder(tmp_path).read_one("x", torch.float32), torch.zeros(2))


@pytest.mark.parametrize("key", ["mmdit", "vae", "t5xxl"])
def test_path_that_is_too_long_is_refused(tiny_model: Path, key: str) -> None:
    ((found, text),) = errors_of(tiny_model, **{key: Path("a" * 300)})
    assert found == key
    assert "File name too long" in text
