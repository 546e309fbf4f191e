"""Stable Diffusion 3 and 3.5 as a ModelFamily: joins the files of this folder."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from models.family import (
    DecodeFunction,
    ExportNames,
    FileTensor,
    LatentSpec,
    LoraFile,
    ModelFamily,
    ModelFilesError,
    ModuleAdapter,
    PipelineLayer,
)
from models.sd3 import diffusers_names, text_encoders, vae, weights
from models.sd3 import lora_files as adapter_files
from models.sd3.layers import INPUT_NAMES, LAYER_LIST_VERSION, layer_cost, layer_outputs, layer_prefix, num_layers
from models.sd3.mmdit import unpatchify
from models.sd3.settings import SD3Settings
from models.sd3.sources import TEXT_ENCODERS, Part, find_parts
from models.sd3.tokenizers import find_tokenizers
from models.streams import Sample, SampleShape
from models.tensor_files import TensorFiles

TIMESTEP_SCALE = 1000.0


class SD3Family(ModelFamily):
    """Checks every file's header and shapes; reads no weights until a layer or an encoder is asked for.

    Raises ModelFilesError with every error of every file.
    """

    export_names = ExportNames(
        network_file="mmdit.safetensors",
        complete_file="complete.safetensors",
        diffusers_folder="transformer",
        diffusers_stem="diffusion_pytorch_model",
    )
    layer_list_version = LAYER_LIST_VERSION
    input_names = INPUT_NAMES
    native_prefix = weights.CHECKPOINT_PREFIX
    lora_target_groups = {
        "attn": r"joint_blocks\.\d+\.(x_block|context_block)\.attn\.(qkv|proj)",
        "attn2": r"joint_blocks\.\d+\.x_block\.attn2\.(qkv|proj)",
        "mlp": r"joint_blocks\.\d+\.(x_block|context_block)\.mlp\.(fc1|fc2)",
        "adaLN_modulation": r"joint_blocks\.\d+\.(x_block|context_block)\.adaLN_modulation\.1",
        "final_layer": r"final_layer\..*",
        "embedders": r"(x_embedder\.proj|context_embedder|[ty]_embedder\.mlp\.[02])",
    }
    default_lora_targets = ("attn", "mlp", "final_layer")

    def __init__(self, settings: SD3Settings) -> None:
        tensors, parts, errors = find_parts(settings)
        encoders = {name: parts[name] for name in TEXT_ENCODERS if name in parts}
        network, unfit = _check(tensors, parts.get("vae"), encoders, settings)
        tokenizers, missing = find_tokenizers(settings, encoders)
        merges, unmergeable = _open_merges(settings, network)
        errors += unfit + missing + unmergeable
        if errors or network is None:
            raise ModelFilesError(errors)
        for file, strength in merges:
            network.merge(file, strength)
        config = network.config
        self.latent = LatentSpec(
            channels=config.in_channels,
            downscale=vae.SPATIAL_DOWNSCALE,
            patch=config.patch_size,
            max_side_pixels=config.pos_embed_max_size * config.patch_size * vae.SPATIAL_DOWNSCALE,
        )
        self.settings = settings
        self.config = config
        self.vae_part = parts["vae"]
        self.encoder_parts = encoders
        self.num_blocks = config.depth
        self.network_files = (*network.paths, *(file.path for file, _ in merges))
        self.network_settings = {"merge strengths": [strength for _, strength in merges]}
        self.image_encoder = vae.SD3ImageEncoder(self.vae_part)
        self.text_encoders = text_encoders.make_text_encoders(encoders, tokenizers, settings)
        self.adaptable_modules = weights.adaptable_modules(config)
        self.layers = tuple(self._layer(network, index) for index in range(num_layers(config)))
        self.sources = {
            "mmdit": network.source,
            "vae": self.vae_part.tensors.source,
            **{name: part.tensors.source for name, part in self.encoder_parts.items()},
            **{f"{name}_tokenizer": folder for name, folder in tokenizers.items()},
        }
        self.notes = tuple(_notes(settings, self.vae_part, merges))

    def _layer(self, network: weights.NetworkFiles, index: int) -> PipelineLayer:
        prefix = layer_prefix(self.config, index)
        return PipelineLayer(
            name=prefix.rstrip(".") or "embedders",
            prefix=prefix,
            cost=layer_cost(self.config, index),
            shapes=network.layer_shapes(index),
            build=partial(network.load_layer, index, self.settings.torch_dtype),
            outputs=layer_outputs(self.config, index),
            block=self.block_of(prefix),
        )

    def describe(self) -> str:
        off = [name for name in TEXT_ENCODERS if name not in self.encoder_parts]
        return ", ".join([weights.variant_name(self.config), self.settings.dtype, *(f"without {name}" for name in off)])

    def block_of(self, module: str) -> int | None:
        match = re.match(r"joint_blocks\.(\d+)\.", module)
        return int(match.group(1)) if match else None

    # --- what the network takes and gives ----------------------------------------------------------------------------

    def sample_shape(self, batch: int, height: int, width: int) -> SampleShape:
        return SampleShape(batch, height, width, num_text_tokens=self.settings.context_length)

    def sample(self, noisy_latents: Tensor, sigma: Tensor, text: Mapping[str, Tensor]) -> Sample:
        context, pooled = text_encoders.join_text(text, self.settings, self.config)
        batch, _, height, width = noisy_latents.shape
        dtype = noisy_latents.dtype
        tensors = {
            "noisy_latents": noisy_latents,
            "timestep": TIMESTEP_SCALE * sigma.float(),
            "context": context.to(dtype),
            "pooled": pooled.to(dtype),
        }
        return Sample(tensors, SampleShape(batch, height, width, num_text_tokens=context.shape[1]))

    @staticmethod
    def shift_at(shift: float, base_pixels: int, num_pixels: int) -> float:
        """sqrt(num_pixels / base_pixels) times the shift at base_pixels (SD3 paper, eq. 23)."""
        return shift * math.sqrt(num_pixels / base_pixels)

    def velocity(self, output: Tensor, shape: SampleShape) -> Tensor:
        return unpatchify(output, shape.height, shape.width, self.config.patch_size)

    def load_decoder(self, device: torch.device, tile_pixels: int) -> DecodeFunction:
        return vae.load_decoder(self.vae_part, device, tile_pixels)

    # --- public files ------------------------------------------------------------------------------------------------

    def open_lora_file(self, path: Path) -> LoraFile:
        return adapter_files.open_lora_file(path, self.adaptable_modules, self.config.depth)

    def native_adapter(self, modules: Mapping[str, ModuleAdapter]) -> dict[str, Tensor]:
        return adapter_files.native_adapter(modules)

    def diffusers_adapter(self, modules: Mapping[str, ModuleAdapter]) -> dict[str, Tensor]:
        return adapter_files.diffusers_adapter(modules, self.config.depth)

    def diffusers_weights(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        renamed: dict[str, Tensor] = {}
        for name, tensor in tensors.items():
            renamed.update(diffusers_names.to_diffusers(name, tensor, self.config.depth))
        return renamed

    def diffusers_config(self) -> dict[str, Any]:
        return diffusers_names.transformer_config(self.config)

    def frozen_tensors(self) -> list[FileTensor]:
        parts = self.encoder_parts.values()
        errors = [("vae", text) for text in vae.file_errors(self.vae_part)]
        errors += [(part.key, text) for part in parts for text in text_encoders.file_errors(part)]
        if errors:
            raise ModelFilesError(errors)
        tensors = vae.file_tensors(self.vae_part)
        return tensors + [tensor for part in parts for tensor in text_encoders.file_tensors(part)]

    def export_metadata(self) -> dict[str, str]:
        return {"modelspec.architecture": weights.architecture_id(self.config)}

    def adapter_metadata(self, is_plain_lora: bool) -> dict[str, str]:
        """sd-scripts' LoRA module for SD3, or LyCORIS, which reads DoRA and LoKr."""
        return {"ss_network_module": "networks.lora_sd3" if is_plain_lora else "lycoris.kohya"}


def _check(
    tensors: TensorFiles | None, vae_part: Part | None, encoders: Mapping[str, Part], settings: SD3Settings
) -> tuple[weights.NetworkFiles | None, list[tuple[str, str]]]:
    """The network, if its files are whole, and what is wrong with any part that is there, as (key, message)."""
    network, errors = None, []
    try:
        network = weights.NetworkFiles(tensors) if tensors is not None else None
    except ModelFilesError as error:
        errors += error.errors
    if vae_part is not None:
        errors += vae.check_part(vae_part, network.config.in_channels if network else None)
    errors += text_encoders.check_parts(encoders, settings, network.config if network else None)
    return network, errors


def _open_merges(
    settings: SD3Settings, network: weights.NetworkFiles | None
) -> tuple[list[tuple[LoraFile, float]], list[tuple[str, str]]]:
    """The adapters to merge, and what is wrong with them, as (key, message)."""
    merges: list[tuple[LoraFile, float]] = []
    errors: list[tuple[str, str]] = []
    if network is None:
        return merges, errors
    modules = weights.adaptable_modules(network.config) if settings.merge_adapters else {}
    for index, merge in enumerate(settings.merge_adapters):
        try:
            file = adapter_files.open_lora_file(merge.path, modules, network.config.depth)
            merges.append((file, merge.strength))
        except ModelFilesError as error:
            errors += [(f"merge_adapters[{index}].path", text) for _, text in error.errors]
    return merges, errors


def _notes(settings: SD3Settings, vae_part: Part, merges: list[tuple[LoraFile, float]]) -> list[str]:
    notes = vae.scale_notes(vae_part)
    notes += [f"{file.path} is merged into {len(file.shapes)} modules, strength {strength:g}" for file, strength in merges]
    notes += [
        f"{file.path} also has {len(file.left_out)} tensors for text encoders, which are left out"
        for file, _ in merges
        if file.left_out
    ]
    clips_off = settings.clip_l is False and settings.clip_g is False
    off = [name for name, is_off in (("CLIPs", clips_off), ("T5", settings.t5xxl is False)) if is_off]
    if off:
        what = "zeros stand" if settings.missing_encoders == "zeros" else "nothing stands"
        notes.append(f"{what} for the tokens of the missing {' and '.join(off)} (model.missing_encoders)")
    return notes
