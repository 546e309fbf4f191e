"""Pixels to latents and back, against diffusers' autoencoder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from models.sd3 import vae
from tests.model_copies import linked_copy, rewrite

CPU = torch.device("cpu")
SHIFT, SCALE = 0.0609, 1.5305
NUM_CHANNELS = 16


@pytest.fixture(scope="module")
def autoencoder(tiny_model: Path) -> Any:
    from diffusers import AutoencoderKL

    return AutoencoderKL.from_pretrained(tiny_model / "vae").eval()


def picture(height: int, width: int, seed: int = 0) -> Tensor:
    return torch.randint(256, (3, height, width), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(("height", "width"), [(32, 32), (16, 48)])
def test_latents_are_the_shifted_and_scaled_mean(tiny_model: Path, autoencoder: Any, height: int, width: int) -> None:
    pixels = picture(height, width)
    (item,) = vae.SD3ImageEncoder(tiny_model / "vae").load(CPU)([pixels])
    with torch.no_grad():
        mean = autoencoder.encode(pixels[None].float() / 127.5 - 1).latent_dist.mean[0]
    assert item["latents"].shape == (16, height // 8, width // 8)
    assert item["latents"].dtype == torch.float32
    assert torch.equal(item["latents"], (mean - SHIFT) * SCALE)


def test_shift_and_scale_come_from_the_folder_s_config(tiny_model: Path, tmp_path: Path) -> None:
    config = (tiny_model / "vae" / "config.json").read_text()
    folder = linked_copy(tiny_model / "vae", tmp_path / "vae")
    rewrite(folder / "config.json", config.replace("1.5305", "0.75").replace("0.0609", "-0.25"))
    pixels = picture(16, 16)
    (ours,), (released,) = (vae.SD3ImageEncoder(path).load(CPU)([pixels]) for path in (folder, tiny_model / "vae"))
    mean = released["latents"] / SCALE + SHIFT
    torch.testing.assert_close(ours["latents"], (mean + 0.25) * 0.75)


def test_a_picture_s_latents_do_not_depend_on_its_company(tiny_model: Path) -> None:
    encode = vae.SD3ImageEncoder(tiny_model / "vae").load(CPU)
    pictures = [picture(16, 32, seed) for seed in range(3)]
    together = encode(pictures)
    for ours, single in zip(together, (encode([one])[0] for one in pictures), strict=True):
        assert torch.equal(ours["latents"], single["latents"])


def test_decoded_pixels_are_the_inverse_chain(tiny_model: Path, autoencoder: Any) -> None:
    latents = torch.randn(2, 16, 2, 4, generator=torch.Generator().manual_seed(1))
    pixels = vae.load_decoder(tiny_model / "vae", CPU)(latents)
    with torch.no_grad():
        expected = torch.cat([autoencoder.decode(sample[None] / SCALE + SHIFT).sample for sample in latents])
    assert pixels.dtype == torch.uint8
    assert pixels.shape == (2, 3, 16, 32)
    assert torch.equal(pixels, ((expected + 1) * 127.5).round().clamp(0, 255).to(torch.uint8))
    assert len(pixels.unique()) > 10


def test_decoder_saturates_instead_of_wrapping_round(tiny_model: Path, tmp_path: Path) -> None:
    folder = linked_copy(tiny_model / "vae", tmp_path / "vae")
    weights = load_file(folder / "diffusion_pytorch_model.safetensors")
    weights["decoder.conv_out.bias"] = torch.tensor([9.0, -9.0, 9.0])
    (folder / "diffusion_pytorch_model.safetensors").unlink()
    save_file(weights, folder / "diffusion_pytorch_model.safetensors", {"format": "pt"})
    pixels = vae.load_decoder(folder, CPU)(torch.zeros(1, 16, 2, 2))
    assert pixels[0, 0].unique().tolist() == [255]
    assert pixels[0, 1].unique().tolist() == [0]


def test_a_fitting_folder_has_no_problems(tiny_model: Path) -> None:
    assert vae.check_files(tiny_model / "vae", NUM_CHANNELS) == []


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (('"latent_channels": 16', '"latent_channels": 4'), "has 4 latent channels, the network takes 16"),
        (("[\n    8,\n    8,\n    16,\n    16\n  ]", "[8, 16, 16]"), "shrinks pictures 4 times"),
    ],
)
def test_an_autoencoder_of_another_model_is_refused(
    tiny_model: Path, tmp_path: Path, change: tuple[str, str], message: str
) -> None:
    folder = linked_copy(tiny_model / "vae", tmp_path / "vae")
    config = (folder / "config.json").read_text()
    assert change[0] in config
    rewrite(folder / "config.json", config.replace(*change))
    ((key, text),) = vae.check_files(folder, NUM_CHANNELS)
    assert key == "vae"
    assert message in text


def test_without_a_network_to_fit_only_the_folder_itself_is_judged(tiny_model: Path, tmp_path: Path) -> None:
    assert vae.check_files(tiny_model / "vae", None) == []
    ((key, text),) = vae.check_files(tmp_path, None)
    assert key == "vae"
    assert "has no config.json" in text


def test_pickled_weights_are_not_read(tiny_model: Path, tmp_path: Path) -> None:
    folder = linked_copy(tiny_model / "vae", tmp_path / "vae")
    (folder / "diffusion_pytorch_model.safetensors").rename(folder / "diffusion_pytorch_model.bin")
    ((key, text),) = vae.check_files(folder, NUM_CHANNELS)
    assert key == "vae"
    assert "no .safetensors file" in text


def test_identity_names_weights_and_config(tiny_model: Path) -> None:
    names = {path.name for path in vae.SD3ImageEncoder(tiny_model / "vae").files}
    assert names == {"config.json", "diffusion_pytorch_model.safetensors"}
