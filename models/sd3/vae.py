"""The 16-channel autoencoder, over diffusers' AutoencoderKL: pixels to normalised latents and back.

The only place where the latents' shift and scale are applied: z = (mean - shift) * scale.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from models.base import DecodeFunction, EncodedItem, EncodeFunction, FrozenEncoder, read_pretrained_config

SPATIAL_DOWNSCALE = 8


def _load_autoencoder(folder: Path, device: torch.device):  # type: ignore[no-untyped-def]
    from diffusers import AutoencoderKL  # here: it takes seconds to import, and a run with a full cache never needs it

    autoencoder = AutoencoderKL.from_pretrained(folder, local_files_only=True, torch_dtype=torch.float32)
    return autoencoder.eval().requires_grad_(False).to(device)


class SD3ImageEncoder(FrozenEncoder):
    """Pictures -> {"latents": (C, height/8, width/8) float32}, the mean of the posterior, normalised.

    It runs in float32: the released autoencoder loses visible detail below it. Pictures are encoded one by one, so that
    what is cached does not depend on which others happened to be encoded with it.
    """

    name = "vae"

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.files = (folder / "config.json", *sorted(folder.glob("*.safetensors")))
        self.settings = {"class": "AutoencoderKL", "posterior": "mean", "dtype": "float32"}

    def load(self, device: torch.device) -> EncodeFunction:
        autoencoder = _load_autoencoder(self.folder, device)
        shift, scale = autoencoder.config.shift_factor or 0.0, autoencoder.config.scaling_factor

        @torch.no_grad()
        def encode(pictures: Sequence[Tensor]) -> list[EncodedItem]:
            encoded = []
            for picture in pictures:
                pixels = picture[None].to(device, torch.float32) / 127.5 - 1.0
                mean = autoencoder.encode(pixels).latent_dist.mean[0]
                encoded.append({"latents": ((mean - shift) * scale).cpu()})
            return encoded

        return encode


def load_decoder(folder: Path, device: torch.device) -> DecodeFunction:
    """Read the decoder; the function returned maps latents (B, C, H, W) to uint8 pixels (B, 3, 8H, 8W) on the CPU."""
    autoencoder = _load_autoencoder(folder, device)
    shift, scale = autoencoder.config.shift_factor or 0.0, autoencoder.config.scaling_factor

    @torch.no_grad()
    def decode(latents: Tensor) -> Tensor:
        pictures = []
        for sample in latents.to(device, torch.float32):
            pixels = autoencoder.decode(sample[None] / scale + shift).sample[0]
            pictures.append(((pixels + 1.0) * 127.5).round().clamp(0, 255).to(torch.uint8).cpu())
        return torch.stack(pictures)

    return decode


def check_files(folder: Path, num_channels: int | None) -> list[tuple[str, str]]:
    """What is wrong with the autoencoder's folder, as (key, message); reads config.json only.

    num_channels: what the network takes; None when it is not known.
    """
    try:
        config = read_pretrained_config(folder, "a diffusers AutoencoderKL")
    except ValueError as error:
        return [("vae", str(error))]
    channels = config.get("latent_channels")
    if num_channels is not None and channels != num_channels:
        return [("vae", f"{folder} has {channels} latent channels, the network takes {num_channels}")]
    downscale = 2 ** (len(config.get("block_out_channels", ())) - 1)
    if downscale != SPATIAL_DOWNSCALE:
        return [("vae", f"{folder} shrinks pictures {downscale} times, SD3's shrinks them {SPATIAL_DOWNSCALE} times")]
    return []
