"""The tiny model in every form in which SD3's weights are published.

Nothing here uses the program's own converters: diffusers and transformers write their folders themselves, the native names
of the autoencoder are found by running diffusers' converter over marked tensors, and the eight-bit forms are written down
from the public files.
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


# --- what the original holds -------------------------------------------------------------------------------------------


def original_part(model: Path, part: str) -> Tensors:
    """One part of the tiny model under the names of the public files, float32."""
    if part == "mmdit":
        return load_file(model / "mmdit.safetensors")
    if part == "vae":
        return ldm_autoencoder(load_file(model / "vae" / "diffusion_pytorch_model.safetensors"), model / "vae")
    return load_file(model / ENCODER_FOLDERS[part] / "model.safetensors")


def ldm_names(config: Mapping[str, Any]) -> dict[str, str]:
    """diffusers' name of each tensor of an AutoencoderKL -> its name in the native file.

    diffusers only converts the other way, so names that might be are marked with their number and sent through.
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
    """An autoencoder's tensors from diffusers' names and shapes to the native file's: its linears are convolutions."""
    names = ldm_names(json.loads((folder / "config.json").read_text()))
    return {names[name]: tensor[..., None, None] if tensor.dim() == 2 else tensor for name, tensor in tensors.items()}


# --- ways of storing ---------------------------------------------------------------------------------------------------

Storage = Callable[[Tensors], tuple[Tensors, Tensors]]
"""Tensors -> what the file has, and the float32 values that it stands for."""


def cast_to(dtype: torch.dtype) -> Storage:
    """Every tensor cast, biases and tables too."""

    def store(tensors: Tensors) -> tuple[Tensors, Tensors]:
        stored = {name: tensor.to(dtype) for name, tensor in tensors.items()}
        return stored, {name: tensor.float() for name, tensor in stored.items()}

    return store


def _scaled_modules(tensors: Tensors) -> list[str]:
    """The linear layers: embeddings and norms stay in sixteen bits."""
    return [
        name.removesuffix(".weight")
        for name, tensor in tensors.items()
        if name.endswith(".weight") and tensor.dim() == 2 and "embedding" not in name and "bias" not in name
        if not name.startswith("shared")
    ]


def _scaled(tensors: Tensors) -> tuple[Tensors, Tensors, dict[str, Tensor]]:
    """Linears in eight bits beside one scale each, the rest in bfloat16; values; module -> scale."""
    scales = {module: tensors[f"{module}.weight"].abs().max() / FP8_MAX for module in _scaled_modules(tensors)}
    stored, values = {}, {}
    for name, tensor in tensors.items():
        scale = scales.get(name.removesuffix(".weight"))
        stored[name] = tensor.to(torch.bfloat16) if scale is None else (tensor / scale).to(FP8)
        values[name] = stored[name].float() if scale is None else (stored[name].double() * scale.double()).float()
    return stored, values, scales


def fp8_scaled_older(tensors: Tensors) -> tuple[Tensors, Tensors]:
    """ComfyUI's scaled files of 2024 and 2025: a marker tensor, `scale_weight`, for some modules `scale_input`."""
    stored, values, scales = _scaled(tensors)
    stored["scaled_fp8"] = torch.empty(2, dtype=FP8)
    for number, (module, scale) in enumerate(scales.items()):
        stored[f"{module}.scale_weight"] = scale.clone()
        if number % 2:
            stored[f"{module}.scale_input"] = torch.tensor(0.5)
    return stored, values


def fp8_scaled_newer(tensors: Tensors) -> tuple[Tensors, Tensors]:
    """ComfyUI's later ones: `weight_scale`, `input_scale`, and what each module is in JSON."""
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
    """One safetensors file with a prefix before every name."""
    save_file({prefix + name: tensor.contiguous() for name, tensor in tensors.items()}, path)
    return path


def write_complete_file(path: Path, parts: Mapping[str, Tensors]) -> Path:
    """Network, autoencoder and encoders in one file, as the published `..._incl_clips_t5xxl` have them."""
    prefixes = {"mmdit": NETWORK_PREFIX, **PART_PREFIXES}
    together = {prefixes[part] + name: tensor for part, tensors in parts.items() for name, tensor in tensors.items()}
    if "clip_l" in parts:
        together["text_encoders.clip_l.logit_scale"] = torch.tensor(4.6055)
    return write_file(path, together)


# --- folders -----------------------------------------------------------------------------------------------------------


def diffusers_tensors(native: Tensors) -> Tensors:
    """A native network under diffusers' names, by diffusers."""
    from diffusers.loaders.single_file_utils import convert_sd3_transformer_checkpoint_to_diffusers

    return convert_sd3_transformer_checkpoint_to_diffusers(dict(native))


def diffusers_network(native: Tensors) -> Any:
    """diffusers' network with a tiny one's native tensors."""
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
    """A whole pipeline as diffusers saves it: also its tokenizers are in the form transformers writes today."""
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
    """transformers' own class with the tiny model's weights."""
    from transformers import CLIPTextModelWithProjection, T5EncoderModel

    model_type: Any = T5EncoderModel if part == "t5xxl" else CLIPTextModelWithProjection
    encoder = model_type.from_pretrained(model / ENCODER_FOLDERS[part]).eval()
    for parameter in encoder.parameters():  # out of the mapped file, whose odd addresses change the last bit of a product
        parameter.data = parameter.data.clone()
    return encoder


def write_clip_text_model(folder: Path, model: Path) -> Path:
    """CLIP-L as transformers' class without a projection saves it."""
    from transformers import CLIPTextConfig, CLIPTextModel

    encoder = CLIPTextModel(CLIPTextConfig.from_pretrained(model / "text_encoder"))
    encoder.load_state_dict(load_encoder(model, "clip_l").text_model.state_dict())
    encoder.save_pretrained(folder)
    return folder


def write_whole_clip(folder: Path, model: Path) -> Path:
    """CLIP-L with its other half, the image encoder, as on OpenAI's page of the hub."""
    from transformers import CLIPConfig, CLIPModel, CLIPTextConfig

    text = CLIPTextConfig.from_pretrained(model / "text_encoder").to_dict()
    vision = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 1}
    size = {"image_size": 32, "patch_size": 16}
    clip = CLIPModel(CLIPConfig(text_config=text, vision_config={**vision, **size}, projection_dim=text["projection_dim"]))
    clip.text_model.load_state_dict(load_encoder(model, "clip_l").text_model.state_dict())
    clip.save_pretrained(folder)
    return folder


# --- a place for single files ------------------------------------------------------------------------------------------


def link_tokenizers(model: Path, folder: Path, names: Iterable[str] = TOKENIZERS) -> Path:
    """The tokenizers' folders beside whatever is in the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        os.symlink(model / name, folder / name)
    return folder
