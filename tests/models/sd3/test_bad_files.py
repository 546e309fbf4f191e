"""Files that are not what they should be: every message names the file, what was found and what was expected."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from safetensors.torch import load_file, save_file
from torch import Tensor

from models.family import ModelFilesError
from models.sd3.family import SD3Family
from models.tensor_files import open_folder
from tests import public_files
from tests.model_copies import linked_copy, rewrite, settings_for
from tests.public_files import Tensors, original_part

ENCODER_FOLDERS = public_files.ENCODER_FOLDERS
Change = Callable[[Tensors], None]


def errors_of(model: Path, **changes: Any) -> list[tuple[str, str]]:
    with pytest.raises(ModelFilesError) as caught:
        SD3Family.from_files(settings_for(model, **changes))
    assert all(text and f"{key}: {text}" in str(caught.value) for key, text in caught.value.errors)
    return caught.value.errors


def only_error(key: str, model: Path, **changes: Any) -> str:
    """The text of the one error, which has this key."""
    ((named, text),) = errors_of(model, **changes)
    assert named == key
    return text


@pytest.fixture
def model(tiny_model: Path, tmp_path: Path) -> Path:
    return linked_copy(tiny_model, tmp_path / "model")


@pytest.fixture(scope="module")
def native(tiny_model: Path) -> Tensors:
    return original_part(tiny_model, "mmdit")


@pytest.fixture(scope="module")
def renamed(native: Tensors) -> Tensors:
    """Under diffusers' names."""
    return public_files.diffusers_tensors(native)


def zeros(*names: str) -> Tensors:
    return {name: torch.zeros(4, 4) for name in names}


# --- files that cannot be read -----------------------------------------------------------------------------------------

NOT_SAFETENSORS = {
    "empty": (b"", "is empty"),
    "lfs": (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 5\n", "is a git-lfs pointer"),
    "page": (b"<!doctype html><html>Access to this model is restricted", "is a web page"),
    "page_after_a_blank_line": (b"\n  <html>", "is a web page"),
    "zip": (b"PK\x03\x04" + bytes(60), "is a pickled file, which is not supported: convert it to safetensors"),
    "pickle": (b"\x80\x02}q\x00X\x05\x00\x00\x00" + bytes(60), "is a pickled file"),
    "gguf": (b"GGUF\x03\x00\x00\x00" + bytes(60), "is a GGUF file"),
    "noise": (b"\xff" * 64, "is not a readable safetensors file"),
    "noise_with_a_brace": (b"\xff" * 8 + b"{" + b"\xff" * 64, "is not a readable safetensors file"),
    "no_json": (b"\x10" + bytes(7) + b"{" + b"x" * 15, "is not a readable safetensors file"),
}


@pytest.mark.parametrize("key", ["mmdit", "t5xxl"])
@pytest.mark.parametrize("what", NOT_SAFETENSORS)
def test_a_file_of_another_format_is_told_for_what_it_is(tiny_model: Path, tmp_path: Path, what: str, key: str) -> None:
    content, message = NOT_SAFETENSORS[what]
    path = tmp_path / "given.safetensors"
    path.write_bytes(content)
    assert only_error(key, tiny_model, **{key: path}).startswith(f"{path} {message}")


@pytest.mark.parametrize("key", ["mmdit", "vae", "clip_l", "clip_g", "t5xxl"])
def test_a_missing_file_is_named(tiny_model: Path, tmp_path: Path, key: str) -> None:
    path = tmp_path / "none.safetensors"
    assert only_error(key, tiny_model, **{key: path}) == f"{path} does not exist"


@pytest.mark.parametrize("kept", [0.5, 0.999, 0.001])
def test_a_download_that_was_cut_off_is_told_with_its_size(tiny_model: Path, tmp_path: Path, kept: float) -> None:
    content = (tiny_model / "mmdit.safetensors").read_bytes()
    path = tmp_path / "half.safetensors"
    path.write_bytes(content[: int(len(content) * kept)])
    text = only_error("mmdit", tiny_model, mmdit=path)
    assert f"{path} is truncated: it has {path.stat().st_size:,} bytes" in text
    assert "download it again" in text


def test_a_cut_off_file_whose_header_s_length_begins_like_a_pickle_is_still_cut_off(
    tiny_model: Path, tmp_path: Path
) -> None:
    header = json.dumps({"weight": {"dtype": "F32", "shape": [64], "data_offsets": [0, 256]}}).ljust(0x180).encode()
    path = tmp_path / "half.safetensors"
    path.write_bytes(len(header).to_bytes(8, "little") + header + bytes(100))
    assert path.read_bytes()[0] == 0x80
    assert "is truncated" in only_error("mmdit", tiny_model, mmdit=path)


# --- files of something else -------------------------------------------------------------------------------------------

OTHERS = {
    "sdxl": (zeros("model.diffusion_model.input_blocks.0.0.weight", "model.diffusion_model.out.2.weight"), "the UNet of"),
    "sd1_diffusers": (zeros("down_blocks.0.resnets.0.conv1.weight", "conv_in.weight"), "a UNet or autoencoder in"),
    "flux": (zeros("double_blocks.0.img_attn.qkv.weight", "pos_embed"), "a Flux transformer"),
    "flux_diffusers": (
        zeros("transformer_blocks.0.attn.to_q.weight", "single_transformer_blocks.0.attn.to_q.weight"),
        "a Flux transformer in diffusers' layout",
    ),
    "lora_native": (zeros("lora_unet_joint_blocks_0_x_block_attn_qkv.lora_down.weight"), "a LoRA"),
    "lora_diffusers": (zeros("transformer.transformer_blocks.0.attn.to_q.lora_A.weight"), "a LoRA"),
    "lora_older_suffix": (zeros("transformer.transformer_blocks.0.attn.to_q.lora.down.weight"), "a LoRA"),
    "lokr": (zeros("lora_unet_joint_blocks_0_x_block_attn_qkv.lokr_w1"), "a LoKr adapter"),
    "autoencoder": (zeros("first_stage_model.decoder.conv_in.weight"), "an autoencoder"),
    "unknown": (zeros("alpha", "beta", "gamma", "zeta"), "something unknown (its first tensors: alpha, beta, gamma)"),
    "nothing": ({}, "a file without tensors"),
}


@pytest.mark.parametrize("what", OTHERS)
def test_another_network_given_as_mmdit_is_told_for_what_it_is(tiny_model: Path, tmp_path: Path, what: str) -> None:
    tensors, name = OTHERS[what]
    path = public_files.write_file(tmp_path / "other.safetensors", tensors)
    text = only_error("mmdit", tiny_model, mmdit=path)
    assert text.startswith(f"{path} is {name}")
    assert "not a whole SD3 network: it has no " in text


@pytest.mark.parametrize(("part", "name"), [("clip_l", "a CLIP text encoder"), ("t5xxl", "a T5 text encoder")])
def test_an_encoder_given_as_mmdit_is_told_for_what_it_is(tiny_model: Path, part: str, name: str) -> None:
    path = tiny_model / ENCODER_FOLDERS[part] / "model.safetensors"
    assert only_error("mmdit", tiny_model, mmdit=path).startswith(f"{path} is {name}, not a whole SD3 network")


def test_a_controlnet_given_as_mmdit_is_told_for_what_it_is(tiny_model: Path, tmp_path: Path, native: Tensors) -> None:
    """Its tensors are mostly a network's: diffusers makes it out of one."""
    from diffusers import SD3ControlNetModel

    network = public_files.diffusers_network(native)
    SD3ControlNetModel.from_transformer(network, num_layers=2, num_extra_conditioning_channels=0).save_pretrained(tmp_path)
    text = only_error("mmdit", tiny_model, mmdit=tmp_path)
    assert text.startswith(f"{tmp_path} is a ControlNet, not a whole SD3 network")


@pytest.mark.parametrize(
    ("key", "kind"),
    [
        ("vae", "a whole autoencoder"),
        ("clip_l", "a whole CLIP-L text encoder"),
        ("clip_g", "a whole CLIP-G text encoder"),
        ("t5xxl", "a whole T5 text encoder"),
    ],
)
def test_the_network_given_as_another_part_is_told_for_what_it_is(tiny_model: Path, key: str, kind: str) -> None:
    path = tiny_model / "mmdit.safetensors"
    text = only_error(key, tiny_model, **{key: path})
    assert text.startswith(f"{path} is an SD3 network with native keys, not {kind}")


def test_diffusers_autoencoder_as_a_bare_file_is_told_to_be_given_as_a_folder(tiny_model: Path) -> None:
    path = tiny_model / "vae" / "diffusion_pytorch_model.safetensors"
    text = only_error("vae", tiny_model, vae=path)
    assert f"{path} is a UNet or autoencoder in diffusers' layout" in text
    assert "set the path of its folder" in text


# --- the network's tensors ---------------------------------------------------------------------------------------------

TINY = "by its shapes SD3.5-medium-like (width 128, depth 3),"


def change_one(kind: str, bias: str, prefix: str) -> tuple[Change, str]:
    """A change to the tensors, and what is said of it."""
    if kind == "missing":
        return lambda tensors: tensors.__delitem__(bias), f"misses tensor {bias} (128,)"
    if kind == "extra":
        extra = prefix + "guidance_embedder.weight"
        return lambda tensors: tensors.update(zeros(extra)), f"has tensor {extra}, which this network does not have"

    def misshape(tensors: Tensors) -> None:
        tensors[bias] = torch.zeros(130)

    return misshape, f"tensor {bias} has shape (130,), expected (128,)"


@pytest.mark.parametrize("kind", ["missing", "extra", "misshapen"])
@pytest.mark.parametrize("layout", ["native", "diffusers"])
def test_one_tensor_that_does_not_fit_is_named_as_the_file_names_it(
    tiny_model: Path, tmp_path: Path, native: Tensors, renamed: Tensors, layout: str, kind: str
) -> None:
    is_native = layout == "native"
    tensors = dict(native if is_native else renamed)
    bias = "joint_blocks.1.x_block.mlp.fc2.bias" if is_native else "transformer_blocks.1.attn.to_k.bias"
    change, message = change_one(kind, bias, "")
    change(tensors)
    path = public_files.write_file(tmp_path / "changed.safetensors", tensors)
    assert only_error("mmdit", tiny_model, mmdit=path) == f"{path}, {TINY} {message}"


@pytest.mark.parametrize("layout", ["native", "diffusers"])
@pytest.mark.parametrize(
    ("native_name", "diffusers_name"),
    [
        ("x_embedder.proj.weight", "pos_embed.proj.weight"),
        ("pos_embed", "pos_embed.pos_embed"),
        ("context_embedder.weight", "context_embedder.weight"),
    ],
)
def test_a_missing_tensor_that_defines_the_shape_is_named_as_the_file_names_it(
    tiny_model: Path,
    tmp_path: Path,
    native: Tensors,
    renamed: Tensors,
    native_name: str,
    diffusers_name: str,
    layout: str,
) -> None:
    tensors, name = (native, native_name) if layout == "native" else (renamed, diffusers_name)
    path = public_files.write_file(
        tmp_path / "changed.safetensors", {key: value for key, value in tensors.items() if key != name}
    )
    assert only_error("mmdit", tiny_model, mmdit=path).endswith(f"not a whole SD3 network: it has no {name}")


@pytest.mark.parametrize(
    "name",
    [
        "joint_blocks.0.x_block.attn.ln_k.weight",
        "joint_blocks.0.x_block.attn2.qkv.weight",
        "joint_blocks.2.context_block.attn.qkv.weight",
    ],
)
def test_a_missing_tensor_that_tells_the_variant_does_not_make_it_another(
    tiny_model: Path, tmp_path: Path, native: Tensors, name: str
) -> None:
    shape = tuple(native[name].shape)
    tensors = {key: value for key, value in native.items() if key != name}
    path = public_files.write_file(tmp_path / "changed.safetensors", tensors)
    assert only_error("mmdit", tiny_model, mmdit=path) == f"{path}, {TINY} misses tensor {name} {shape}"


@pytest.mark.parametrize("layout", ["native", "diffusers"])
def test_a_network_that_lacks_a_block_names_its_tensors_and_counts_the_rest(
    tiny_model: Path, tmp_path: Path, native: Tensors, renamed: Tensors, layout: str
) -> None:
    tensors, block = (native, "joint_blocks.1.") if layout == "native" else (renamed, "transformer_blocks.1.")
    lacking = [name for name in tensors if name.startswith(block)]
    kept = {name: value for name, value in tensors.items() if name not in lacking}
    found = errors_of(tiny_model, mmdit=public_files.write_file(tmp_path / "changed.safetensors", kept))
    assert {key for key, _ in found} == {"mmdit"}
    assert all(f"misses tensor {block}" in text for _, text in found[:-1])
    assert f"and {len(lacking) - len(found) + 1} more tensors" in found[-1][1]


def test_a_network_without_its_last_block_is_not_taken_for_a_shorter_one(
    tiny_model: Path, tmp_path: Path, native: Tensors
) -> None:
    """The block before it has what a last one has not."""
    kept = {name: value for name, value in native.items() if not name.startswith("joint_blocks.2.")}
    found = errors_of(tiny_model, mmdit=public_files.write_file(tmp_path / "changed.safetensors", kept))
    assert any("joint_blocks.1.context_block.mlp.fc1.weight, which this network does not have" in text for _, text in found)


# --- shards ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def shards(tmp_path: Path, native: Tensors) -> Path:
    folder = tmp_path / "transformer"
    public_files.diffusers_network(native).save_pretrained(folder, max_shard_size="2MB")
    return folder


def test_a_missing_shard_is_named(tiny_model: Path, shards: Path) -> None:
    (shards / "diffusion_pytorch_model-00002-of-00004.safetensors").unlink()
    text = only_error("mmdit", tiny_model, mmdit=shards)
    assert f"{shards} lacks diffusion_pytorch_model-00002-of-00004.safetensors" in text
    assert "diffusion_pytorch_model.safetensors.index.json lists" in text


def test_an_index_that_names_a_tensor_which_is_not_there_is_refused(tiny_model: Path, shards: Path) -> None:
    path = shards / "diffusion_pytorch_model.safetensors.index.json"
    index = json.loads(path.read_text())
    index["weight_map"]["proj_out.gate"] = "diffusion_pytorch_model-00001-of-00004.safetensors"
    path.write_text(json.dumps(index))
    text = only_error("mmdit", tiny_model, mmdit=shards)
    assert f"{shards / 'diffusion_pytorch_model-00001-of-00004.safetensors'} has no tensor proj_out.gate" in text


@pytest.mark.parametrize("content", ["{ half", "[]", "{}", '{"weight_map": []}', '{"weight_map": {"a": 1}}'])
def test_an_index_that_is_none_is_named(tiny_model: Path, shards: Path, content: str) -> None:
    (shards / "diffusion_pytorch_model.safetensors.index.json").write_text(content)
    assert "diffusion_pytorch_model.safetensors.index.json" in only_error("mmdit", tiny_model, mmdit=shards)


# --- ways of storing ---------------------------------------------------------------------------------------------------

LINEAR = "joint_blocks.1.x_block.attn.proj.weight"


@pytest.mark.parametrize("part", ["mmdit", "t5xxl"])
def test_weights_of_another_type_are_refused_by_name(tiny_model: Path, tmp_path: Path, part: str) -> None:
    """As bitsandbytes' NF4 and eight-bit integers have them."""
    tensors = original_part(tiny_model, part)
    name = LINEAR if part == "mmdit" else "encoder.block.0.layer.0.SelfAttention.q.weight"
    tensors[name] = tensors[name].to(torch.uint8)
    path = public_files.write_file(tmp_path / "changed.safetensors", tensors)
    (tmp_path / "tokenizer_3").symlink_to(tiny_model / "tokenizer_3")
    text = only_error(part, tiny_model, **{part: path})
    assert str(path) in text
    assert f"stores {name} as U8; readable are BF16, F16, F32, F64, F8_E4M3, F8_E5M2" in text


@pytest.mark.parametrize("shape", [(4, 4), (2,), (1, 128), (64, 2), (8, 16)])
def test_scales_by_blocks_are_refused_by_name(
    tiny_model: Path, tmp_path: Path, native: Tensors, shape: tuple[int, ...]
) -> None:
    """(1, 128), (64, 2) and (8, 16) are as many scales as the weight has rows."""
    tensors = {**native, LINEAR: native[LINEAR].to(public_files.FP8)}
    tensors[LINEAR.removesuffix(".weight") + ".weight_scale"] = torch.ones(shape)
    path = public_files.write_file(tmp_path / "changed.safetensors", tensors)
    text = only_error("mmdit", tiny_model, mmdit=path)
    assert f"scales {LINEAR} in blocks of {shape}; readable are one scale per tensor or one per row" in text


# --- folders -----------------------------------------------------------------------------------------------------------


def test_a_folder_with_several_sets_of_weights_asks_for_one_file(tiny_model: Path, tmp_path: Path) -> None:
    for name in ("first.safetensors", "second.safetensors"):
        (tmp_path / name).symlink_to(tiny_model / "mmdit.safetensors")
    text = only_error("mmdit", tiny_model, mmdit=tmp_path)
    assert f"{tmp_path} has several sets of weights (first.safetensors, second.safetensors)" in text
    assert "set the path of one file" in text


@pytest.mark.parametrize("key", ["vae", "clip_l", "clip_g", "t5xxl"])
@pytest.mark.parametrize("content", [None, "{ half a", "[]"])
def test_a_missing_or_broken_config_json_is_named(model: Path, key: str, content: str | None) -> None:
    path = model / {**ENCODER_FOLDERS, "vae": "vae"}[key] / "config.json"
    path.unlink()
    if content is not None:
        path.write_text(content)
    text = only_error(key, model)
    assert "config.json" in text
    assert str(path.parent) in text


@pytest.mark.parametrize("key", ["mmdit", "vae", "clip_l", "clip_g", "t5xxl"])
def test_a_folder_of_pickled_weights_is_not_read(model: Path, key: str) -> None:
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
def test_a_config_json_without_a_setting_names_it(model: Path, key: str, setting: str) -> None:
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
def test_tensors_that_do_not_fit_their_config_json_are_named(
    model: Path, key: str, changes: dict[str, Any], message: str
) -> None:
    folder = model / {**ENCODER_FOLDERS, "vae": "vae"}[key]
    path = folder / "config.json"
    rewrite(path, json.dumps({**json.loads(path.read_text()), **changes}))
    found = errors_of(model)
    assert {named for named, _ in found} == {key}
    assert all(str(folder) in text for _, text in found)
    assert any(message in text for _, text in found)


# --- parts that do not fit each other ----------------------------------------------------------------------------------


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


def test_a_t5_of_another_width_is_refused(model: Path) -> None:
    """As T5-XL is 2048 wide, T5-XXL 4096."""
    folder = write_t5(model / "other", model, 96)
    assert only_error("t5xxl", model, t5xxl=folder) == "has width 96, the network's context has 192"


def test_a_clip_with_fewer_positions_than_tokens_is_refused(model: Path) -> None:
    folder = write_clip(model / "other", model, "clip_g", max_position_embeddings=6)
    text = only_error("clip_max_token_length", model, clip_g=folder)
    assert text == "= 8: clip_g has 6 positions"


def test_an_autoencoder_of_four_channels_is_refused(tiny_model: Path, tmp_path: Path) -> None:
    """Of Stable Diffusion 1, 2 and XL, as a native file."""
    from diffusers import AutoencoderKL

    config = json.loads((tiny_model / "vae" / "config.json").read_text())
    changes = {"latent_channels": 4, "use_quant_conv": True, "use_post_quant_conv": True}
    AutoencoderKL.from_config({**config, **changes}).save_pretrained(tmp_path / "vae")
    tensors = load_file(tmp_path / "vae" / "diffusion_pytorch_model.safetensors")
    path = tmp_path / "sdxl_vae.safetensors"
    public_files.write_file(path, public_files.ldm_autoencoder(tensors, tmp_path / "vae"))
    for given in (path, tmp_path / "vae"):
        text = only_error("vae", tiny_model, vae=given)
        assert text == f"{given} has 4 latent channels, the network has 16"


def test_clip_folders_that_have_changed_places_are_refused(tiny_model: Path) -> None:
    """Their widths add up to the same either way, and the network would be conditioned on nonsense."""
    found = errors_of(tiny_model, clip_l=tiny_model / "text_encoder_2", clip_g=tiny_model / "text_encoder")
    assert found == [("clip_l", "is wider than clip_g: the two are swapped")]


def test_clip_files_that_have_changed_places_are_refused(tiny_model: Path, tmp_path: Path) -> None:
    """The released CLIP-L file has no projection, CLIP-G's has to have one."""
    tensors = load_file(tiny_model / "text_encoder" / "model.safetensors")
    del tensors["text_projection.weight"]
    small = public_files.write_file(tmp_path / "clip_l.safetensors", tensors)
    large = tmp_path / "clip_g.safetensors"
    large.symlink_to(tiny_model / "text_encoder_2" / "model.safetensors")
    public_files.link_tokenizers(tiny_model, tmp_path)
    text = only_error("clip_g", tiny_model, clip_l=large, clip_g=small)
    assert f"{small} is a CLIP text encoder, not a whole CLIP-G text encoder: it has no text_projection.weight" in text


# --- parts that are not there ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def network_only(native: Tensors, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("network_only") / "network.safetensors"
    return public_files.write_file(path, native, public_files.NETWORK_PREFIX)


@pytest.mark.parametrize("key", ["vae", "clip_l", "clip_g", "t5xxl"])
def test_a_part_that_is_not_in_the_single_file_asks_for_its_path(tiny_model: Path, network_only: Path, key: str) -> None:
    text = only_error(key, tiny_model, mmdit=network_only, **{key: None})
    assert f"is not set, and {network_only} does not contain it; set {key} = PATH" in text
    assert (f"{key} = false" in text) == (key != "vae")  # nothing is trained without an autoencoder


@pytest.mark.parametrize("key", ["vae", "clip_l", "clip_g", "t5xxl"])
def test_a_part_that_is_not_in_the_pipeline_s_folder_names_the_folder(
    tiny_model: Path, tmp_path: Path, native: Tensors, key: str
) -> None:
    public_files.diffusers_network(native).save_pretrained(tmp_path / "transformer")
    text = only_error(key, tiny_model, mmdit=tmp_path, **{key: None})
    folder = {**ENCODER_FOLDERS, "vae": "vae"}[key]
    assert f"{tmp_path} has no folder {folder}; set {key} = PATH" in text


@pytest.mark.parametrize("key", ["clip_l", "clip_g", "t5xxl"])
@pytest.mark.parametrize("value", [True, 1, 0, []])
def test_an_encoder_is_a_path_or_false(tiny_model: Path, key: str, value: object) -> None:
    with pytest.raises(ValidationError, match="must be a path, or false to train without it") as caught:
        settings_for(tiny_model, **{key: value})
    assert [error["loc"] for error in caught.value.errors()] == [(key,)]


# --- several at once ---------------------------------------------------------------------------------------------------


def test_errors_of_all_parts_are_told_at_once(model: Path, tmp_path: Path) -> None:
    """A missing file, a broken one, a misfit, a missing folder and a tokenizer: each is found at another time."""
    (tmp_path / "network.safetensors").write_bytes(b"GGUF" + bytes(60))
    shutil.rmtree(model / "vae")
    path = model / "text_encoder" / "config.json"
    rewrite(path, json.dumps({**json.loads(path.read_text()), "hidden_size": 96}))
    given = {"t5xxl_tokenizer": str(model / "tokenizer_2"), "clip_g": tmp_path / "none.safetensors"}
    found = errors_of(model, mmdit=tmp_path / "network.safetensors", **given)
    assert {key for key, _ in found} == {"mmdit", "vae", "clip_l", "clip_g", "t5xxl_tokenizer"}


def test_an_unreadable_file_that_should_hold_all_is_told_once(tiny_model: Path, tmp_path: Path) -> None:
    path = tmp_path / "none.safetensors"
    found = errors_of(tiny_model, mmdit=path, vae=None, clip_l=None, clip_g=None, t5xxl=None)
    assert found == [("mmdit", f"{path} does not exist")]


def test_a_whole_part_that_is_changed_in_one_tensor_is_refused(tiny_model: Path, tmp_path: Path) -> None:
    """Inside a complete file, under its prefix there."""
    parts: dict[str, dict[str, Tensor]] = {part: original_part(tiny_model, part) for part in ("mmdit", "clip_l")}
    del parts["clip_l"]["text_model.final_layer_norm.bias"]
    path = public_files.write_complete_file(tmp_path / "complete.safetensors", parts)
    public_files.link_tokenizers(tiny_model, tmp_path)
    text = only_error("clip_l", tiny_model, mmdit=path, clip_l=None)
    assert text == f"{path} misses tensor text_model.final_layer_norm.bias (64,)"


def test_files_that_are_whole_are_not_refused(tiny_model: Path, tmp_path: Path) -> None:
    """What this file's changes are made to."""
    path = tmp_path / "whole.safetensors"
    save_file(original_part(tiny_model, "mmdit"), path)
    assert (
        SD3Family.from_files(settings_for(tiny_model, mmdit=path)).config
        == SD3Family.from_files(settings_for(tiny_model)).config
    )


def test_of_shards_that_overlap_the_index_says_whose_tensor_counts(tmp_path: Path) -> None:
    save_file({"x": torch.zeros(2), "y": torch.ones(2)}, tmp_path / "model-1.safetensors")
    save_file({"x": torch.full((2,), 5.0)}, tmp_path / "model-2.safetensors")
    index = {"weight_map": {"x": "model-1.safetensors", "y": "model-1.safetensors", "z": "model-2.safetensors"}}
    save_file({"x": torch.full((2,), 5.0), "z": torch.ones(1)}, tmp_path / "model-2.safetensors")
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    assert torch.equal(open_folder(tmp_path).read_one("x", torch.float32), torch.zeros(2))


@pytest.mark.parametrize("key", ["mmdit", "vae", "t5xxl"])
def test_a_name_that_the_system_does_not_take_is_refused(tiny_model: Path, key: str) -> None:
    ((found, text),) = errors_of(tiny_model, **{key: Path("a" * 300)})
    assert found == key
    assert "File name too long" in text
