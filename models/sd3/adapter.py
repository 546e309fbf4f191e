"""Stable Diffusion 3 and 3.5 as a ModelAdapter: joins the files of this folder."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

import torch
from torch import Tensor

from models.base import DecodeFunction, LatentSpec, LoraWeights, ModelAdapter, ModelFilesError, PipelineLayer
from models.sd3 import text_encoders, vae, weights
from models.sd3.layers import LAYER_LIST_VERSION, layer_cost, layer_prefix, num_layers
from models.sd3.mmdit import unpatchify
from models.sd3.settings import SD3Settings

TIMESTEP_SCALE = 1000.0


class SD3Adapter(ModelAdapter):
    """Checks every file's header and shapes; reads no weights until a layer or an encoder is asked for.

    Raises ModelFilesError with every problem of every file.
    """

    layer_list_version = LAYER_LIST_VERSION
    default_lora_targets = (
        r"joint_blocks\.\d+\.(x_block|context_block)\.(attn\.qkv|attn\.proj|mlp\.fc1|mlp\.fc2)",
        r"final_layer\..*",
    )

    def __init__(self, settings: SD3Settings) -> None:
        problems: list[tuple[str, str]] = []
        file = None
        try:
            file = weights.MMDiTFile(settings.mmdit)
        except ModelFilesError as error:
            problems += error.problems
        problems += vae.check_files(settings.vae, file.config.in_channels if file else None)
        problems += text_encoders.check_files(settings, file.config if file else None)
        if problems or file is None:
            raise ModelFilesError(problems)
        config = file.config
        self.latent = LatentSpec(
            channels=config.in_channels,
            downscale=vae.SPATIAL_DOWNSCALE,
            patch=config.patch_size,
            max_side_pixels=config.pos_embed_max_size * config.patch_size * vae.SPATIAL_DOWNSCALE,
        )
        self.settings = settings
        self.config = config
        self.network_files = (settings.mmdit,)
        self.image_encoder = vae.SD3ImageEncoder(settings.vae)
        self.text_encoders = text_encoders.make_text_encoders(settings)
        self.linear_modules = weights.linear_module_names(config)
        self.layers = tuple(self._layer(file, index) for index in range(num_layers(config)))

    def _layer(self, file: weights.MMDiTFile, index: int) -> PipelineLayer:
        prefix = layer_prefix(self.config, index)
        return PipelineLayer(
            name=prefix.rstrip(".") or "embedders",
            prefix=prefix,
            cost=layer_cost(self.config, index),
            shapes=file.layer_shapes(index, self.settings.context_length),
            build=partial(file.load_layer, index, self.settings.context_length, self.settings.torch_dtype),
        )

    def describe(self) -> str:
        return f"{weights.variant_name(self.config)}, {self.settings.dtype}"

    def network_inputs(self, noisy_latents: Tensor, sigma: Tensor, text: Mapping[str, Tensor]) -> tuple[Tensor, ...]:
        context, pooled = text_encoders.join_text(text, self.config.context_dim)
        dtype = noisy_latents.dtype
        return noisy_latents, TIMESTEP_SCALE * sigma.float(), context.to(dtype), pooled.to(dtype)

    def velocity(self, output: Tensor, height: int, width: int) -> Tensor:
        return unpatchify(output, height, width, self.config.patch_size)

    def load_decoder(self, device: torch.device) -> DecodeFunction:
        return vae.load_decoder(self.settings.vae, device)

    def native_lora(self, lora: LoraWeights) -> dict[str, Tensor]:
        return weights.native_lora_tensors(lora)

    def diffusers_lora(self, lora: LoraWeights) -> dict[str, Tensor]:
        return weights.diffusers_lora_tensors(lora, self.config)

    def export_metadata(self) -> dict[str, str]:
        return {"modelspec.architecture": weights.architecture_id(self.config)}
