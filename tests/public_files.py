"""The tiny model in every form in which SD3's weights are published.

Independent of the program's own converters: diffusers and transformers write their folders themselves, the native names of
the autoencoder are found by running diffusers' converter on marked tensors, and the eight-bit forms are copied from the
public files.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

Tensors = dict[str, Tensor]
FP8 = torch.float8_e4m3fn
FP8_MAX = 448.0

NETWORK_PREFIX = "model.diffusion_model."
PART_PREFIXES = {
    "vae": "first_stage_model.",
    "clip_l": "text_encoders.clip_l.transformer.",
    "clip_g": "text_encoders.clip_g.transformer.",
    "t5xxl": "text_encoders.t5xxl.transformer.",
}
ENCODER_FOLDERS = {"clip_l": "text_encoder", "clip_g": "text_encoder_2", "t5xxl": "text_encoder_3"}
TOKENIZERS = ("tokenizer", "tokenizer_2", "tokenizer_3")


# --- the original ------------------------------------------------------------------------------------------------------


def original_part(model: Path, part: str) -> Tensors:
    """Returns the tensors of one component of the tiny model under the names of the public files, float32."""
    if part == "mmdit":
        return load_file(model / "mmdit.safetensors")
    if part == "vae":
        return ldm_autoencoder(load_file(model / "vae" / "diffusion_pytorch_model.safetensors"), model / "vae")
    return load_file(model / ENCODER_FOLDERS[part] / "model.safetensors")


def ldm_names(config: Mapping[str, Any]) -> dict[str, str]:
    """Returns diffusers' name of each tensor of an AutoencoderKL -> its name in the native file.

    diffusers converts in the other direction only: candidate names are converted with tensors that contain their number.
    """
    from diffusers.loaders.single_file_utils import convert_ldm_vae_checkpoint

    modules = ["encoder.conv_in", "encoder.conv_out", "encoder.norm_out", "decoder.conv_in", "decoder.conv_out"]
    modules += ["decoder.norm_out", "quant_conv", "post_quant_conv"]
    resnet = ("norm1", "conv1", "norm2", "conv2", "nin_shortcut")
    for half, step in (("encoder", "downsample"), ("decoder", "upsample")):
        way = step.removesuffix("sample")
        for level in range(len(config["block_out_channels"])):
            modules += [f"{half}.{way}.{level}.block.{block}.{name}" for block in range(4) for name in resnet]
            modules.append(f"{half}.{way}.{level}.{step}.conv")
        modules += [f"{half}.mid.block_{block}.{name}" for block in (1, 2) for name in resnet]
        modules += [f"{half}.mid.attn_1.{name}" for name in ("norm", "q", "k", "v", "proj_out")]
    names = [f"{module}.{leaf}" for module in modules for leaf in ("weight", "bias")]
    marked = {name: torch.full((1, 1, 1, 1), float(number)) for number, name in enumerate(names)}
    converted = convert_ldm_vae_checkpoint(marked, config)
    return {diffusers: names[int(tensor.flatten()[0])] for diffusers, tensor in converted.items()}


def ldm_autoencoder(tensors: Mapping[str, Tensor], folder: Path) -> Tensors:
    """Converts an autoencoder's tensors to native names and shapes, where linear layers are 1 x 1 convolutions."""
    names = ldm_names(json.loads((folder / "config.json").read_text()))
    return {names[name]: tensor[..., None, None] if tensor.dim() == 2 else tensor for name, tensor in tensors.items()}


# --- dtypes and scales -------------------------------------------------------------------------------------------------

Storage = Callable[[Tensors], tuple[Tensors, Tensors]]
"""Tensors -> (tensors in the file, float32 values they represent)."""


def cast_to(dtype: torch.dtype) -> Storage:
    """Casts every tensor, including biases and tables."""

    def store(tensors: Tensors) -> tuple[Tensors, Tensors]:
        stored = {name: tensor.to(dtype) for name, tensor in tensors.items()}
        return stored, {name: tensor.float() for name, tensor in stored.items()}

    return store


def _scaled_modules(tensors: Tensors) -> list[str]:
    """Returns the linear layers; embeddings and norms are stored in sixteen bits."""
    return [
        name.removesuffix(".weight")
        for name, tensor in tensors.items()
        if name.endswith(".weight") and tensor.dim() == 2 and "embedding" not in name and "bias" not in name
        if not name.startswith("shared")
    ]


def _scaled(tensors: Tensors) -> tuple[Tensors, Tensors, dict[str, Tensor]]:
    """Stores linear layers in eight bits with one scale each, the rest in bfloat16. Returns (stored, values, scales)."""
    scales = {module: tensors[f"{module}.weight"].abs().max() / FP8_MAX for module in _scaled_modules(tensors)}
    stored, values = {}, {}
    for name, tensor in tensors.items():
        scale = scales.get(name.removesuffix(".weight"))
        stored[name] = tensor.to(torch.bfloat16) if scale is None else (tensor / scale).to(FP8)
        values[name] = stored[name].float() if scale is None else (stored[name].double() * scale.double()).float()
    return stored, values, scales


def fp8_scaled_older(tensors: Tensors) -> tuple[Tensors, Tensors]:
    """ComfyUI's scaled files of 2024 and 2025: a marker tensor, `scale_weight`, and `scale_input` for some modules."""
    stored, values, scales = _scaled(tensors)
    stored["scaled_fp8"] = torch.empty(2, dtype=FP8)
    for number, (module, scale) in enumerate(scales.items()):
        stored[f"{module}.scale_weight"] = scale.clone()
        if number % 2:
            stored[f"{module}.scale_input"] = torch.tensor(0.5)
    return stored, values


def fp8_scaled_newer(tensors: Tensors) -> tuple[Tensors, Tensors]:
    """ComfyUI's newer scaled files: `weight_scale`, `input_scale`, and a JSON description per module."""
    stored, values, scales = _scaled(tensors)
    kind = torch.tensor(list(json.dumps({"format": "float8_e4m3fn"}).encode()), dtype=torch.uint8)
    for module, scale in scales.items():
        stored[f"{module}.weight_scale"] = scale.clone()
        stored[f"{module}.input_scale"] = torch.tensor(0.25)
        stored[f"{module}.comfy_quant"] = kind.clone()
    return stored, values


STORAGES: dict[str, Storage] = {
    "float32": cast_to(torch.float32),
    "float16": cast_to(torch.float16),
    "bfloat16": cast_to(torch.bfloat16),
    "fp8": cast_to(FP8),
    "fp8_e5m2": cast_to(torch.float8_e5m2),
    "fp8_scaled_older": fp8_scaled_older,
    "fp8_scaled_newer": fp8_scaled_newer,
}


# --- single files ------------------------------------------------------------------------------------------------------


def write_file(path: Path, tensors: Tensors, prefix: str = "") -> Path:
    """Writes one safetensors file with a prefix before every name."""
    save_file({prefix + name: tensor.contiguous() for name, tensor in tensors.items()}, path)
    return path


def write_complete_file(path: Path, parts: Mapping[str, Tensors]) -> Path:
    """Writes network, autoencoder and encoders into one file like the published `..._incl_clips_t5xxl`."""
    prefixes = {"mmdit": NETWORK_PREFIX, **PART_PREFIXES}
    together = {prefixes[part] + name: tensor for part, tensors in parts.items() for name, tensor in tensors.items()}
    if "clip_l" in parts:
        together["text_encoders.clip_l.logit_scale"] = torch.tensor(4.6055)
    return write_file(path, together)


# --- folders -----------------------------------------------------------------------------------------------------------


def diffusers_tensors(native: Tensors) -> Tensors:
    """Converts a native network to diffusers' names with diffusers' own converter."""
    from diffusers.loaders.single_file_utils import convert_sd3_transformer_checkpoint_to_diffusers

    return convert_sd3_transformer_checkpoint_to_diffusers(dict(native))


def diffusers_network(native: Tensors) -> Any:
    """Returns diffusers' network with native tensors of the tiny network."""
    from diffusers import SD3Transformer2DModel

    from tests import tiny_model as tiny

    network = SD3Transformer2DModel(
        sample_size=tiny.POS_EMBED_MAX_SIZE,
        num_layers=tiny.DEPTH,
        attention_head_dim=64,
        num_attention_heads=tiny.WIDTH // 64,
        caption_projection_dim=tiny.WIDTH,
        joint_attention_dim=tiny.CONTEXT_DIM,
        pooled_projection_dim=tiny.POOLED_DIM,
        pos_embed_max_size=tiny.POS_EMBED_MAX_SIZE,
        dual_attention_layers=tiny.DUAL_ATTENTION_LAYERS,
        qk_norm="rms_norm",
    )
    network.load_state_dict(diffusers_tensors(native))
    return network


def write_pipeline(folder: Path, model: Path) -> Path:
    """Writes a whole pipeline with diffusers; its tokenizers are in the current form of transformers."""
    from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, StableDiffusion3Pipeline
    from transformers import CLIPTextModelWithProjection, CLIPTokenizer, T5EncoderModel, T5Tokenizer

    StableDiffusion3Pipeline(
        transformer=diffusers_network(original_part(model, "mmdit")),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=AutoencoderKL.from_pretrained(model / "vae"),
        text_encoder=CLIPTextModelWithProjection.from_pretrained(model / "text_encoder"),
        text_encoder_2=CLIPTextModelWithProjection.from_pretrained(model / "text_encoder_2"),
        text_encoder_3=T5EncoderModel.from_pretrained(model / "text_encoder_3"),
        tokenizer=CLIPTokenizer.from_pretrained(model / "tokenizer"),
        tokenizer_2=CLIPTokenizer.from_pretrained(model / "tokenizer_2"),
        tokenizer_3=T5Tokenizer.from_pretrained(model / "tokenizer_3"),
    ).save_pretrained(folder)
    return folder


def load_encoder(model: Path, part: str) -> Any:
    """Returns transformers' own class with the tiny model's weights."""
    from transformers import CLIPTextModelWithProjection, T5EncoderModel

    model_type: Any = T5EncoderModel if part == "t5xxl" else CLIPTextModelWithProjection
    encoder = model_type.from_pretrained(model / ENCODER_FOLDERS[part]).eval()
    for (
        parameter
    ) in encoder.parameters():  # copied out of the memory map, whose unaligned addresses change the last bit of products
        parameter.data = parameter.data.clone()
    return encoder


def write_clip_text_model(folder: Path, model: Path) -> Path:
    """Writes CLIP-L with transformers' class without a projection."""
    from transformers import CLIPTextConfig, CLIPTextModel

    encoder = CLIPTextModel(CLIPTextConfig.from_pretrained(model / "text_encoder"))
    encoder.load_state_dict(load_encoder(model, "clip_l").text_model.state_dict())
    encoder.save_pretrained(folder)
    return folder


def write_whole_clip(folder: Path, model: Path) -> Path:
    """Writes CLIP-L with its image encoder, as in OpenAI's repository on the hub."""
    from transformers import CLIPConfig, CLIPModel, CLIPTextConfig

    text = CLIPTextConfig.from_pretrained(model / "text_encoder").to_dict()
    vision = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 1}
    size = {"image_size": 32, "patch_size": 16}
    clip = CLIPModel(CLIPConfig(text_config=text, vision_config={**vision, **size}, projection_dim=text["projection_dim"]))
    clip.text_model.load_state_dict(load_encoder(model, "clip_l").text_model.state_dict())
    clip.save_pretrained(folder)
    return folder


# --- tokenizers --------------------------------------------------------------------------------------------------------


def link_tokenizers(model: Path, folder: Path, names: Iterable[str] = TOKENIZERS) -> Path:
    """Links the tokenizers' folders into the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        os.symlink(model / name, folder / name)
    return folder
