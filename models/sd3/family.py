"""Stable Diffusion 3 and 3.5 as a ModelFamily: joins the files of this folder."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor

from models.family import (
    DecodeFunction,
    ExportNames,
    FileTensor,
    ImageEncoder,
    LatentSpec,
    LoraFile,
    ModelFamily,
    ModelFilesError,
    ModuleAdapter,
    NoFilesError,
    PipelineLayer,
    TextEncoder,
)
from models.sd3 import diffusers_names, lora_export, lora_files, text_encoder_files, vae, vae_files
from models.sd3.layers import INPUT_NAMES, LAYER_LIST_VERSION, layer_cost, layer_outputs, layer_prefix, num_layers
from models.sd3.model_files import ModelFiles, open_model_files
from models.sd3.network_shapes import adaptable_modules, empty_layer, layer_shapes
from models.sd3.settings import DTYPES, SD3Settings, TextTokens
from models.sd3.sources import TEXT_ENCODERS
from models.sd3.text_conditioning import join_text
from models.sd3.text_encoders import SD3TextEncoder
from models.sd3.variants import MMDiTConfig, architecture_id, variant_config, variant_name
from models.sd3.weights import CHECKPOINT_PREFIX
from models.shared.embedders import unpatchify
from models.streams import Sample, SampleShape

TIMESTEP_SCALE = 1000.0


class SD3Family(ModelFamily):
    """A network of Stable Diffusion 3 or 3.5, with its files (`from_files`) or without any (`from_variant`)."""

    export_names = ExportNames(
        network_file="mmdit.safetensors",
        complete_file="complete.safetensors",
        diffusers_folder="transformer",
        diffusers_stem="diffusion_pytorch_model",
    )
    layer_list_version = LAYER_LIST_VERSION
    input_names = INPUT_NAMES
    native_prefix = CHECKPOINT_PREFIX
    lora_target_groups = {
        "attn": r"joint_blocks\.\d+\.(x_block|context_block)\.attn\.(qkv|proj)",
        "attn2": r"joint_blocks\.\d+\.x_block\.attn2\.(qkv|proj)",
        "mlp": r"joint_blocks\.\d+\.(x_block|context_block)\.mlp\.(fc1|fc2)",
        "adaLN_modulation": r"joint_blocks\.\d+\.(x_block|context_block)\.adaLN_modulation\.1",
        "final_layer": r"final_layer\..*",
        "embedders": r"(x_embedder\.proj|context_embedder|[ty]_embedder\.mlp\.[02])",
    }
    default_lora_targets = ("attn", "mlp", "final_layer")

    def __init__(self, config: MMDiTConfig, dtype: str, text_tokens: TextTokens, files: ModelFiles | None) -> None:
        self.config = config
        self.text_tokens = text_tokens
        self._dtype = dtype
        self._files = files
        self.latent = LatentSpec(
            channels=config.in_channels,
            downscale=vae_files.SPATIAL_DOWNSCALE,
            patch=config.patch_size,
            max_side_pixels=config.pos_embed_max_size * config.patch_size * vae_files.SPATIAL_DOWNSCALE,
        )
        self.num_blocks, self.stream_width = config.depth, config.hidden_size
        self.adaptable_modules = adaptable_modules(config)
        self.layers = tuple(self._layer(index) for index in range(num_layers(config)))
        merges = () if files is None else files.merges
        self.network_files = () if files is None else (*files.network.paths, *(file.path for file, _ in merges))
        self.network_settings = {"merge strengths": [strength for _, strength in merges]}
        self.sources = {} if files is None else files.sources()
        self.notes = () if files is None else tuple(files.notes())
        self._image_encoder = None if files is None else vae.SD3ImageEncoder(files.vae)
        self._text_encoders = None if files is None else _make_text_encoders(files)

    @classmethod
    def from_files(cls, settings: SD3Settings) -> Self:
        files = open_model_files(settings)
        return cls(files.network.config, settings.dtype, settings.text_tokens, files)

    @classmethod
    def from_variant(cls, name: str) -> Self:
        """See ModelFamily. Names: "SD3-medium", "SD3.5-medium", "SD3.5-large", "SD3.5-large-turbo"."""
        defaults = {key: field.default for key, field in SD3Settings.model_fields.items()}
        tokens = TextTokens(defaults["clip_max_token_length"], defaults["t5xxl_max_token_length"])
        return cls(variant_config(name), defaults["dtype"], tokens, files=None)

    def _layer(self, index: int) -> PipelineLayer:
        prefix = layer_prefix(self.config, index)
        empty = partial(empty_layer, self.config, index, DTYPES[self._dtype])
        files = self._files
        return PipelineLayer(
            name=prefix.rstrip(".") or "embedders",
            prefix=prefix,
            cost=partial(layer_cost, self.config, index),
            shapes=layer_shapes(self.config, index),
            build=empty if files is None else partial(files.network.load_layer, index, DTYPES[self._dtype]),
            outputs=layer_outputs(self.config, index),
            block=self.block_of(prefix),
            build_empty=empty,
        )

    def _require_files(self, what: str) -> ModelFiles:
        if self._files is None:
            name = variant_name(self.config)
            raise NoFilesError(
                f"{what} requires the model's files; this {name} was created by name: use SD3Family.from_files"
            )
        return self._files

    @property
    def image_encoder(self) -> ImageEncoder:
        self._require_files("the image encoder")
        assert self._image_encoder is not None
        return self._image_encoder

    @property
    def text_encoders(self) -> tuple[TextEncoder, ...]:
        self._require_files("a text encoder")
        assert self._text_encoders is not None
        return self._text_encoders

    def describe(self) -> str:
        off = [] if self._files is None else [name for name in TEXT_ENCODERS if name not in self._files.text_encoders]
        return ", ".join([variant_name(self.config), self._dtype, *(f"without {name}" for name in off)])

    # --- the network ---------------------------------------------------------------------------------------------------

    def block_of(self, module: str) -> int | None:
        match = re.match(r"joint_blocks\.(\d+)\.", module)
        return int(match.group(1)) if match else None

    def sample_shape(self, batch: int, height: int, width: int) -> SampleShape:
        return SampleShape(batch, height, width, num_text_tokens=self.text_tokens.total)

    def sample(self, noisy_latents: Tensor, sigma: Tensor, text: Mapping[str, Tensor]) -> Sample:
        context, pooled = join_text(text, self.text_tokens, self.config)
        batch, _, height, width = noisy_latents.shape
        dtype = noisy_latents.dtype
        tensors = {
            "noisy_latents": noisy_latents,
            "timestep": TIMESTEP_SCALE * sigma.float(),
            "context": context.to(dtype),
            "pooled": pooled.to(dtype),
        }
        return Sample(tensors, SampleShape(batch, height, width, num_text_tokens=context.shape[1]))

    def velocity(self, output: Tensor, shape: SampleShape) -> Tensor:
        return unpatchify(output, shape.height, shape.width, self.config.patch_size)

    @staticmethod
    def shift_at(shift: float, base_pixels: int, num_pixels: int) -> float:
        """sqrt(num_pixels / base_pixels) times the shift at base_pixels (SD3 paper, arXiv 2403.03206, eq. 23)."""
        return shift * math.sqrt(num_pixels / base_pixels)

    def load_decoder(self, device: torch.device, tile_pixels: int) -> DecodeFunction:
        return vae.load_decoder(self._require_files("the image decoder").vae, device, tile_pixels)

    # --- public files --------------------------------------------------------------------------------------------------

    def open_lora_file(self, path: Path) -> LoraFile:
        return lora_files.open_lora_file(path, self.adaptable_modules, self.config.depth)

    def native_adapter(self, modules: Mapping[str, ModuleAdapter]) -> dict[str, Tensor]:
        return lora_export.native_adapter(modules)

    def diffusers_adapter(self, modules: Mapping[str, ModuleAdapter]) -> dict[str, Tensor]:
        return lora_export.diffusers_adapter(modules, self.config.depth)

    def diffusers_weights(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        renamed: dict[str, Tensor] = {}
        for name, tensor in tensors.items():
            renamed.update(diffusers_names.to_diffusers(name, tensor, self.config.depth))
        return renamed

    def diffusers_config(self) -> dict[str, Any]:
        return diffusers_names.transformer_config(self.config)

    def frozen_tensors(self) -> list[FileTensor]:
        files = self._require_files("a complete single file")
        encoders = files.text_encoders.values()
        errors = [("vae", text) for text in vae_files.single_file_errors(files.vae)]
        for component in encoders:
            errors += [(component.key, text) for text in text_encoder_files.single_file_errors(component)]
        if errors:
            raise ModelFilesError(errors)
        tensors = vae_files.file_tensors(files.vae)
        for component in encoders:
            tensors += text_encoder_files.file_tensors(component)
        return tensors

    def export_metadata(self) -> dict[str, str]:
        return {"modelspec.architecture": architecture_id(self.config)}

    def adapter_metadata(self, is_plain_lora: bool) -> dict[str, str]:
        """Names sd-scripts' LoRA module for SD3, or LyCORIS, which reads DoRA and LoKr."""
        return {"ss_network_module": "networks.lora_sd3" if is_plain_lora else "lycoris.kohya"}


def _make_text_encoders(files: ModelFiles) -> tuple[SD3TextEncoder, ...]:
    """Returns the text encoders that are on."""
    settings = files.settings
    lengths = {"t5xxl": settings.t5xxl_max_token_length}
    return tuple(
        SD3TextEncoder(component, files.tokenizers[name], lengths.get(name, settings.clip_max_token_length), settings.dtype)
        for name, component in files.text_encoders.items()
    )
