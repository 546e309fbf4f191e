"""The 16-channel autoencoder, as diffusers' AutoencoderKL: pixels to normalised latents and back.

Latents are shifted and scaled here only: z = (mean - shift) * scale.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from models.family import DecodeFunction, EncodedItem, EncodeFunction, ImageEncoder
from models.sd3.sources import Component
from models.sd3.vae_files import SPATIAL_DOWNSCALE, names_in_files, native_config

TILE_OVERLAP = 0.25


class SD3ImageEncoder(ImageEncoder):
    """Images -> {"latents", "std"}, (C, height/8, width/8) float32 each: mean and std of the posterior, normalised.

    The autoencoder runs in float32, because the released one loses visible detail at lower precision. Images are encoded one
    by one, so that a cached item does not depend on the rest of its batch.
    """

    name = "vae"

    def __init__(self, component: Component) -> None:
        self.component = component
        self.files = component.files
        self.settings = {"class": "AutoencoderKL", "dtype": "float32"}

    def load(self, device: torch.device) -> EncodeFunction:
        autoencoder = _load_autoencoder(self.component, device)
        shift, scale = autoencoder.config.shift_factor or 0.0, autoencoder.config.scaling_factor

        @torch.no_grad()
        def encode(images: Sequence[Tensor]) -> list[EncodedItem]:
            encoded = []
            for image in images:
                pixels = image[None].to(device, torch.float32) / 127.5 - 1.0
                posterior = autoencoder.encode(pixels).latent_dist
                encoded.append({"latents": ((posterior.mean - shift) * scale)[0], "std": (posterior.std * scale)[0]})
            return encoded

        return encode


def load_decoder(component: Component, device: torch.device, tile_pixels: int) -> DecodeFunction:
    """Reads the decoder; the returned function maps latents (B, C, H, W) to uint8 pixels (B, 3, 8H, 8W) on the CPU.

    Images with a side above `tile_pixels`, a multiple of 32, are decoded in overlapping tiles of that size, as in diffusers:
    norms and attention are computed per tile, and tiles are blended over a quarter of their side.
    """
    autoencoder = _load_autoencoder(component, device)
    autoencoder.enable_tiling()
    autoencoder.tile_overlap_factor = TILE_OVERLAP
    autoencoder.tile_sample_min_size = tile_pixels
    autoencoder.tile_latent_min_size = tile_pixels // SPATIAL_DOWNSCALE
    shift, scale = autoencoder.config.shift_factor or 0.0, autoencoder.config.scaling_factor

    @torch.no_grad()
    def decode(latents: Tensor) -> Tensor:
        images = []
        for sample in latents.to(device, torch.float32):
            pixels = autoencoder.decode(sample[None] / scale + shift).sample[0]
            images.append(((pixels + 1.0) * 127.5).round().clamp(0, 255).to(torch.uint8).cpu())
        return torch.stack(images)

    return decode


def _load_autoencoder(component: Component, device: torch.device) -> Any:
    from diffusers import AutoencoderKL  # imported here: it takes seconds, and a run with a full cache does not need it

    config = component.config if component.config is not None else native_config(component.tensors.shapes)
    with torch.device("meta"):
        autoencoder: Any = AutoencoderKL.from_config({k: v for k, v in config.items() if not k.startswith("_")})
    file_names = names_in_files(component)
    state = {}
    for name, parameter in autoencoder.state_dict().items():
        state[name] = component.tensors.read_one(file_names[name], torch.float32).reshape(parameter.shape)
    autoencoder.load_state_dict(state, assign=True)
    return autoencoder.eval().requires_grad_(False).to(device)
