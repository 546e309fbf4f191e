"""Invalid files of the network: every message names the file, what was found and what was expected."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from tests import public_files
from tests.models.sd3.bad_files import ENCODER_FOLDERS, Change, errors_of, only_error, zeros
from tests.public_files import Tensors, original_part

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
def test_file_of_another_format_is_recognized(tiny_model: Path, tmp_path: Path, what: str, key: str) -> None:
    content, message = NOT_SAFETENSORS[what]
    path = tmp_path / "invalid.safetensors"
    path.write_bytes(content)
    assert only_error(key, tiny_model, **{key: path}).startswith(f"{path} {message}")


@pytest.mark.parametrize("key", ["mmdit", "vae", "clip_l", "clip_g", "t5xxl"])
def test_missing_file_is_named(tiny_model: Path, tmp_path: Path, key: str) -> None:
    path = tmp_path / "none.safetensors"
    assert only_error(key, tiny_model, **{key: path}) == f"{path} does not exist"


@pytest.mark.parametrize("kept", [0.5, 0.999, 0.001])
def test_truncated_download_is_reported_with_its_size(tiny_model: Path, tmp_path: Path, kept: float) -> None:
    content = (tiny_model / "mmdit.safetensors").read_bytes()
    path = tmp_path / "half.safetensors"
    path.write_bytes(content[: int(len(content) * kept)])
    text = only_error("mmdit", tiny_model, mmdit=path)
    assert f"{path} is truncated: it has {path.stat().st_size:,} bytes" in text
    assert "download it again" in text


def test_truncated_file_is_recognized_though_its_header_length_starts_like_a_pickle(
    tiny_model: Path, tmp_path: Path
) -> None:
    header = json.dumps({"weight": {"dtype": "F32", "shape": [64], "data_offsets": [0, 256]}}).ljust(0x180).encode()
    path = tmp_path / "half.safetensors"
    path.write_bytes(len(header).to_bytes(8, "little") + header + bytes(100))
    assert path.read_bytes()[0] == 0x80
    assert "is truncated" in only_error("mmdit", tiny_model, mmdit=path)


# --- files of other networks -------------------------------------------------------------------------------------------

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
def test_another_network_as_mmdit_is_recognized(tiny_model: Path, tmp_path: Path, what: str) -> None:
    tensors, name = OTHERS[what]
    path = public_files.write_file(tmp_path / "other.safetensors", tensors)
    text = only_error("mmdit", tiny_model, mmdit=path)
    assert text.startswith(f"{path} is {name}")
    assert "not a whole SD3 network: it has no " in text


@pytest.mark.parametrize(("part", "name"), [("clip_l", "a CLIP text encoder"), ("t5xxl", "a T5 text encoder")])
def test_text_encoder_as_mmdit_is_recognized(tiny_model: Path, part: str, name: str) -> None:
    path = tiny_model / ENCODER_FOLDERS[part] / "model.safetensors"
    assert only_error("mmdit", tiny_model, mmdit=path).startswith(f"{path} is {name}, not a whole SD3 network")


def test_controlnet_as_mmdit_is_recognized(tiny_model: Path, tmp_path: Path, native: Tensors) -> None:
    """Most of its tensors are those of a network: diffusers creates it from one."""
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
def test_network_as_another_component_is_recognized(tiny_model: Path, key: str, kind: str) -> None:
    path = tiny_model / "mmdit.safetensors"
    text = only_error(key, tiny_model, **{key: path})
    assert text.startswith(f"{path} is an SD3 network with native keys, not {kind}")


def test_bare_file_of_a_diffusers_autoencoder_is_refused_in_favour_of_its_folder(tiny_model: Path) -> None:
    path = tiny_model / "vae" / "diffusion_pytorch_model.safetensors"
    text = only_error("vae", tiny_model, vae=path)
    assert f"{path} is a UNet or autoencoder in diffusers' layout" in text
    assert "set the path of its folder" in text


# --- the network's tensors ---------------------------------------------------------------------------------------------

TINY = "by its shapes SD3.5-medium-like (width 128, depth 3),"


def change_one(kind: str, bias: str, prefix: str) -> tuple[Change, str]:
    """Returns a change to the tensors and the error it causes."""
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
def test_one_wrong_tensor_is_named_as_in_the_file(
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
def test_missing_defining_tensor_is_named_as_in_the_file(
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
def test_missing_tensor_does_not_make_the_network_another_variant(
    tiny_model: Path, tmp_path: Path, native: Tensors, name: str
) -> None:
    shape = tuple(native[name].shape)
    tensors = {key: value for key, value in native.items() if key != name}
    path = public_files.write_file(tmp_path / "changed.safetensors", tensors)
    assert only_error("mmdit", tiny_model, mmdit=path) == f"{path}, {TINY} misses tensor {name} {shape}"


@pytest.mark.parametrize("layout", ["native", "diffusers"])
def test_missing_block_is_reported_by_some_of_its_tensors_and_a_count(
    tiny_model: Path, tmp_path: Path, native: Tensors, renamed: Tensors, layout: str
) -> None:
    tensors, block = (native, "joint_blocks.1.") if layout == "native" else (renamed, "transformer_blocks.1.")
    lacking = [name for name in tensors if name.startswith(block)]
    kept = {name: value for name, value in tensors.items() if name not in lacking}
    found = errors_of(tiny_model, mmdit=public_files.write_file(tmp_path / "changed.safetensors", kept))
    assert {key for key, _ in found} == {"mmdit"}
    assert all(f"misses tensor {block}" in text for _, text in found[:-1])
    assert f"and {len(lacking) - len(found) + 1} more tensors" in found[-1][1]


def test_network_without_its_last_block_is_not_mistaken_for_a_shorter_one(
    tiny_model: Path, tmp_path: Path, native: Tensors
) -> None:
    """The block before the last has tensors that a last block does not have."""
    kept = {name: value for name, value in native.items() if not name.startswith("joint_blocks.2.")}
    found = errors_of(tiny_model, mmdit=public_files.write_file(tmp_path / "changed.safetensors", kept))
    assert any("joint_blocks.1.context_block.mlp.fc1.weight, which this network does not have" in text for _, text in found)


# --- shards ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def shards(tmp_path: Path, native: Tensors) -> Path:
    folder = tmp_path / "transformer"
    public_files.diffusers_network(native).save_pretrained(folder, max_shard_size="2MB")
    return folder


def test_missing_shard_is_named(tiny_model: Path, shards: Path) -> None:
    (shards / "diffusion_pytorch_model-00002-of-00004.safetensors").unlink()
    text = only_error("mmdit", tiny_model, mmdit=shards)
    assert f"{shards} lacks diffusion_pytorch_model-00002-of-00004.safetensors" in text
    assert "diffusion_pytorch_model.safetensors.index.json lists" in text


def test_index_with_a_tensor_that_its_shard_lacks_is_refused(tiny_model: Path, shards: Path) -> None:
    path = shards / "diffusion_pytorch_model.safetensors.index.json"
    index = json.loads(path.read_text())
    index["weight_map"]["proj_out.gate"] = "diffusion_pytorch_model-00001-of-00004.safetensors"
    path.write_text(json.dumps(index))
    text = only_error("mmdit", tiny_model, mmdit=shards)
    assert f"{shards / 'diffusion_pytorch_model-00001-of-00004.safetensors'} has no tensor proj_out.gate" in text


@pytest.mark.parametrize("content", ["{ half", "[]", "{}", '{"weight_map": []}', '{"weight_map": {"a": 1}}'])
def test_invalid_index_is_named(tiny_model: Path, shards: Path, content: str) -> None:
    (shards / "diffusion_pytorch_model.safetensors.index.json").write_text(content)
    assert "diffusion_pytorch_model.safetensors.index.json" in only_error("mmdit", tiny_model, mmdit=shards)


# --- dtypes and scales -------------------------------------------------------------------------------------------------

LINEAR = "joint_blocks.1.x_block.attn.proj.weight"


@pytest.mark.parametrize("part", ["mmdit", "t5xxl"])
def test_unsupported_dtype_is_refused_by_name(tiny_model: Path, tmp_path: Path, part: str) -> None:
    """bitsandbytes' NF4 and eight-bit integers are stored in this dtype."""
    tensors = original_part(tiny_model, part)
    name = LINEAR if part == "mmdit" else "encoder.block.0.layer.0.SelfAttention.q.weight"
    tensors[name] = tensors[name].to(torch.uint8)
    path = public_files.write_file(tmp_path / "changed.safetensors", tensors)
    (tmp_path / "tokenizer_3").symlink_to(tiny_model / "tokenizer_3")
    text = only_error(part, tiny_model, **{part: path})
    assert str(path) in text
    assert f"stores {name} as U8; readable are BF16, F16, F32, F64, F8_E4M3, F8_E5M2" in text


@pytest.mark.parametrize("shape", [(4, 4), (2,), (1, 128), (64, 2), (8, 16)])
def test_scales_per_block_are_refused_by_name(
    tiny_model: Path, tmp_path: Path, native: Tensors, shape: tuple[int, ...]
) -> None:
    """(1, 128), (64, 2) and (8, 16) have as many elements as the weight has rows."""
    tensors = {**native, LINEAR: native[LINEAR].to(public_files.FP8)}
    tensors[LINEAR.removesuffix(".weight") + ".weight_scale"] = torch.ones(shape)
    path = public_files.write_file(tmp_path / "changed.safetensors", tensors)
    text = only_error("mmdit", tiny_model, mmdit=path)
    assert f"scales {LINEAR} in blocks of {shape}; readable are one scale per tensor or one per row" in text
