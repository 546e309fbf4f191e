"""Trains the quickstart's small autoencoder: 64-pixel images to 16 x 8 x 8 latents and back, like SD3's VAE.

Its weights are shipped in `vae/` because this training is slow (about eleven minutes on two cores); the script documents
how they were made. It trains on drawn shapes (all captions, and pink) and on random crops of the photographs. These choices
make the training fast:

    32-pixel crops first (a quarter of the work per image), then whole 64-pixel images
    Adam with learning rate 1e-3; with 2e-3 the training stalls
    the encoder's log-variance starts at -6, so that noise does not dominate the first latents; KL weight 1e-5
    32 channels everywhere: with 16 the group normalisation removes flat colours, which are then never learned

At the end it measures the latents of drawn images and stores `shift_factor` and `scaling_factor` such that
(z - shift) * scale has mean 0 and standard deviation 1 over them, as a diffusion model requires.

    python -m examples.quickstart.train_vae --out examples/quickstart/vae
"""

import argparse
import math
import os
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from PIL import Image
from torch import Tensor

from examples.quickstart import images
from examples.quickstart.make_dataset import photographs

KL_WEIGHT = 1e-5
LEARNING_RATE = 1e-3
INITIAL_LOGVAR = -6.0
NUM_DRAWINGS = 4032  # 37 of each combination; drawn once and held in memory as bytes
MAX_OFFSET = 4.0  # in pixels; more than in the dataset, so that the decoder learns edges wherever a model may place them
PHOTO_FRACTION = 0.25  # of every batch
CONFIG = {
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "block_out_channels": (32, 32, 32, 32),
    "layers_per_block": 1,
    "norm_num_groups": 8,
    "latent_channels": 16,
    "sample_size": 64,
    "use_quant_conv": False,
    "use_post_quant_conv": False,
    "mid_block_add_attention": False,
    "force_upcast": False,  # float16 gives the same images here
}


@dataclass(frozen=True)
class Stage:
    """One phase of the training: a number of steps on crops of one size."""

    crop_pixels: int
    batch_size: int
    num_steps: int


def drawings(count: int, seed: int) -> Tensor:
    """Returns generated images of all combinations in turn, pink included: (count, 3, 64, 64) bytes."""
    todo = images.combinations(tuple(images.COLOURS))
    order = np.random.default_rng([seed, 0]).permutation(len(todo))
    chosen = [todo[int(order[i % len(todo)])] for i in range(count)]
    rngs = [np.random.default_rng([seed, 1, i]) for i in range(count)]
    drawn = [images.draw(*c, rng, max_offset=MAX_OFFSET) for c, rng in zip(chosen, rngs, strict=True)]
    return torch.stack([to_bytes(image) for image in drawn])


def photograph_sizes() -> list[Tensor]:
    """Returns each photograph at its shorter side 96, 160 and 256 pixels, as bytes (3, h, w)."""
    result = []
    for path, _ in photographs():
        with Image.open(path) as opened:
            image = opened.convert("RGB")
        for side in (96, 160, 256):
            factor = side / min(image.size)
            size = (math.ceil(image.width * factor), math.ceil(image.height * factor))
            result.append(to_bytes(image.resize(size, Image.Resampling.LANCZOS)))
    return result


def to_bytes(image: Image.Image) -> Tensor:
    return torch.from_numpy(np.array(image)).movedim(-1, 0).contiguous()  # (3, h, w)


def to_float(pixels: Tensor) -> Tensor:
    """Converts bytes 0..255 to the autoencoder's range [-1, 1]."""
    return pixels.float() / 127.5 - 1


def to_image(pixels: Tensor) -> Image.Image:
    """Returns (3, h, w) in [-1, 1] as an image."""
    array = ((pixels.clamp(-1, 1) + 1) * 127.5).round().byte().movedim(0, -1).numpy()
    return Image.fromarray(array)


def crop(pixels: Tensor, size: int, generator: torch.Generator) -> Tensor:
    """Returns a random size x size part of (3, h, w), flipped half the time."""
    top = int(torch.randint(pixels.shape[1] - size + 1, (), generator=generator))
    left = int(torch.randint(pixels.shape[2] - size + 1, (), generator=generator))
    part = pixels[:, top : top + size, left : left + size]
    return part.flip(2) if int(torch.randint(2, (), generator=generator)) else part


def batch(drawn: Tensor, photos: list[Tensor], stage: Stage, generator: torch.Generator) -> Tensor:
    """Returns (B, 3, crop, crop) in [-1, 1], the photographs last."""
    num_photos = round(stage.batch_size * PHOTO_FRACTION)
    which_drawn = torch.randint(len(drawn), (stage.batch_size - num_photos,), generator=generator)
    which_photo = torch.randint(len(photos), (num_photos,), generator=generator)
    chosen = [drawn[i] for i in which_drawn] + [photos[i] for i in which_photo]
    return to_float(torch.stack([crop(pixels, stage.crop_pixels, generator) for pixels in chosen]))


def new_autoencoder() -> AutoencoderKL:
    vae = AutoencoderKL(**CONFIG)
    with torch.no_grad():
        vae.encoder.conv_out.bias[CONFIG["latent_channels"] :].fill_(INITIAL_LOGVAR)
    return vae


def loss_of(vae: AutoencoderKL, pixels: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Returns (training loss, mean squared error) of one batch."""
    with torch.autocast("cpu", torch.bfloat16):  # twice as fast; the weights remain float32
        posterior = vae.encode(pixels).latent_dist
        decoded = vae.decode(posterior.sample(generator)).sample
    squared_error = (decoded.float() - pixels).square().mean()
    kl = posterior.kl().float().mean() / pixels[0].numel()
    return squared_error + KL_WEIGHT * kl, squared_error


def decibels(squared_error: float) -> float:
    """Returns the peak signal-to-noise ratio of pixels in [-1, 1]."""
    return 10 * math.log10(4 / squared_error)


def learning_rate(step: int, num_steps: int) -> float:
    """Returns a constant rate with a short rise at the start and a cosine fall over the last 40%."""
    fall = max(0.0, (step / num_steps - 0.6) / 0.4)
    return LEARNING_RATE * min(1.0, (step + 1) / 30) * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * fall)))


def train(vae: AutoencoderKL, stages: list[Stage], seed: int) -> None:
    drawn, photos = drawings(NUM_DRAWINGS, seed), photograph_sizes()
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.Adam(vae.parameters(), lr=LEARNING_RATE)
    schedule = [stage for stage in stages for _ in range(stage.num_steps)]
    start, recent_errors = time.monotonic(), []
    for step, stage in enumerate(schedule):
        optimizer.param_groups[0]["lr"] = learning_rate(step, len(schedule))
        loss, squared_error = loss_of(vae, batch(drawn, photos, stage, generator), generator)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        recent_errors.append(squared_error.item())
        if (step + 1) % 50 == 0:
            psnr, seconds = decibels(float(np.mean(recent_errors))), time.monotonic() - start
            progress = f"step {step + 1}/{len(schedule)}  crop {stage.crop_pixels}"
            print(f"{progress}  {psnr:.1f} dB  {seconds:.0f} s", flush=True)
            recent_errors.clear()


def reconstruct(vae: AutoencoderKL, pixels: Tensor) -> Tensor:
    """Returns (N, 3, h, w) in [-1, 1] encoded and decoded, in parts that need little memory."""
    return torch.cat([vae.decode(vae.encode(part).latent_dist.mode()).sample for part in pixels.split(32)]).clamp(-1, 1)


@torch.no_grad()
def set_latent_statistics(vae: AutoencoderKL, seed: int) -> None:
    """Stores the shift and scale that bring the latents of drawn images to mean 0 and standard deviation 1."""
    parts = to_float(drawings(NUM_DRAWINGS // 4, seed)).split(32)
    latents = torch.cat([vae.encode(part).latent_dist.mode() for part in parts])  # (N, 16, 8, 8)
    mean, std = latents.mean().item(), latents.std().item()
    vae.register_to_config(shift_factor=round(mean, 6), scaling_factor=round(1 / std, 6))
    per_channel = latents.std((0, 2, 3))
    print(f"latents: mean {mean:.4f}, std {std:.4f}, by channel {per_channel.min():.2f} to {per_channel.max():.2f}")


@torch.no_grad()
def report(vae: AutoencoderKL, seed: int) -> None:
    """Prints the reconstruction error of images that were not trained on and of crops of the photographs."""
    unseen = drawings(NUM_DRAWINGS // 4, seed)
    decoded = reconstruct(vae, to_float(unseen))
    squared_error = (decoded - to_float(unseen)).square().mean().item()
    before = [images.read(to_image(pixels)) for pixels in to_float(unseen)]
    after = [images.read(to_image(pixels)) for pixels in decoded]
    same = np.mean([a == b for a, b in zip(before, after, strict=True)])
    print(f"drawings not trained on: {decibels(squared_error):.2f} dB, recognised as before: {100 * same:.1f}%")
    generator = torch.Generator().manual_seed(seed)
    crops = to_float(torch.stack([crop(p, 64, generator) for p in photograph_sizes() for _ in range(8)]))
    print(f"crops of photographs: {decibels((reconstruct(vae, crops) - crops).square().mean().item()):.2f} dB")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for config.json and the weights; overwritten")
    parser.add_argument("--crop-steps", type=int, default=1200, help="steps on 32-pixel crops (default: 1200)")
    parser.add_argument("--steps", type=int, default=1900, help="steps on 64-pixel images after that (default: 1900)")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    torch.manual_seed(options.seed)
    vae = new_autoencoder()
    print(f"{sum(p.numel() for p in vae.parameters()):,} parameters, {torch.get_num_threads()} threads")
    train(vae, [Stage(32, 32, options.crop_steps), Stage(64, 16, options.steps)], options.seed)
    vae.eval()
    set_latent_statistics(vae, options.seed + 1)
    vae.half().save_pretrained(options.out)
    print(f"saved {options.out} ({os.path.getsize(options.out / 'diffusion_pytorch_model.safetensors'):,} bytes)")
    report(vae.float(), options.seed + 2)  # the saved weights, which are rounded to float16


if __name__ == "__main__":
    main()
