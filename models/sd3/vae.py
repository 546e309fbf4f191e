"""The 16-channel autoencoder, over diffusers' AutoencoderKL: pixels to normalised latents and back.

The only place where the latents' shift and scale are applied: z = (mean - shift) * scale. Read are diffusers' folder and the
native file, whose shape is told from its tensors and whose names are translated; a native file has no settings beside its
tensors, so those are SD3's.
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
    """Images -> {"latents", "deviation"}, (C, height/8, width/8) float32 each: the posterior, normalised.

    It runs in float32: the released autoencoder loses visible detail below it. Images are encoded one by one, so that
    what is cached does not depend on which others happened to be encoded with it.
    """

    name = "vae"

    def __init__(self, part: Component) -> None:
        self.part = part
        self.files = part.files
        self.settings = {"class": "AutoencoderKL", "dtype": "float32"}

    def load(self, device: torch.device) -> EncodeFunction:
        autoencoder = _load_autoencoder(self.part, device)
        shift, scale = autoencoder.config.shift_factor or 0.0, autoencoder.config.scaling_factor

        @torch.no_grad()
        def encode(images: Sequence[Tensor]) -> list[EncodedItem]:
            encoded = []
            for image in images:
                pixels = image[None].to(device, torch.float32) / 127.5 - 1.0
                posterior = autoencoder.encode(pixels).latent_dist
                encoded.append({"latents": ((posterior.mean - shift) * scale)[0], "deviation": (posterior.std * scale)[0]})
            return encoded

        return encode


def load_decoder(part: Component, device: torch.device, tile_pixels: int) -> DecodeFunction:
    """Read the decoder; the function returned maps latents (B, C, H, W) to uint8 pixels (B, 3, 8H, 8W) on the CPU.

    Images with a side longer than `tile_pixels`, a multiple of 32, are decoded in overlapping tiles of it, as diffusers
    does it: each tile has a norm and an attention of its own, and they are blended over a quarter of their side.
    """
    autoencoder = _load_autoencoder(part, device)
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


def _load_autoencoder(part: Component, device: torch.device) -> Any:
    from diffusers import AutoencoderKL  # here: it takes seconds to import, and a run with a full cache never needs it

    config = part.config if part.config is not None else native_config(part.tensors.shapes)
    with torch.device("meta"):
        autoencoder: Any = AutoencoderKL.from_config({k: v for k, v in config.items() if not k.startswith("_")})
    own_names = names_in_files(part)
    state = {}
    for name, parameter in autoencoder.state_dict().items():
        own_name = own_names[name]
        state[name] = part.tensors.read_one(own_name, torch.float32).reshape(parameter.shape)
    autoencoder.load_state_dict(state, assign=True)
    return autoencoder.eval().requires_grad_(False).to(device)
