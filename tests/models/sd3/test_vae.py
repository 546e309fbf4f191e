"""Pixels to latents and back, against diffusers' autoencoder."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from models.sd3 import vae, vae_files
from models.sd3.sources import Component
from models.tensor_files import open_folder
from tests import public_files
from tests.model_copies import linked_copy, rewrite

CPU = torch.device("cpu")
SHIFT, SCALE = 0.0609, 1.5305
NUM_CHANNELS = 16


@pytest.fixture(scope="module")
def autoencoder(tiny_model: Path) -> Any:
    from diffusers import AutoencoderKL

    return AutoencoderKL.from_pretrained(tiny_model / "vae").eval()


def folder_part(folder: Path) -> Component:
    return Component("vae", open_folder(folder), json.loads((folder / "config.json").read_text()), folder)


def image(height: int, width: int, seed: int = 0) -> Tensor:
    return torch.randint(256, (3, height, width), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(("height", "width"), [(32, 32), (16, 48)])
def test_latents_are_the_shifted_and_scaled_mean(tiny_model: Path, autoencoder: Any, height: int, width: int) -> None:
    pixels = image(height, width)
    (item,) = vae.SD3ImageEncoder(folder_part(tiny_model / "vae")).load(CPU)([pixels])
    with torch.no_grad():
        mean = autoencoder.encode(pixels[None].float() / 127.5 - 1).latent_dist.mean[0]
    assert item["latents"].shape == (16, height // 8, width // 8)
    assert item["latents"].dtype == torch.float32
    assert torch.equal(item["latents"], (mean - SHIFT) * SCALE)


@pytest.mark.parametrize(("height", "width"), [(32, 32), (16, 48)])
def test_the_std_is_the_posterior_s_in_the_scale_of_the_latents(
    tiny_model: Path, autoencoder: Any, height: int, width: int
) -> None:
    pixels = image(height, width)
    (item,) = vae.SD3ImageEncoder(folder_part(tiny_model / "vae")).load(CPU)([pixels])
    with torch.no_grad():
        posterior = autoencoder.encode(pixels[None].float() / 127.5 - 1).latent_dist
    assert set(item) == {"latents", "std"}
    assert item["std"].shape == item["latents"].shape
    assert item["std"].dtype == torch.float32
    assert torch.equal(item["std"], posterior.std[0] * SCALE)
    assert item["std"].min() > 0


def test_a_sample_of_mean_and_std_is_diffusers_sample(tiny_model: Path, autoencoder: Any) -> None:
    """Of the same normal numbers."""
    pixels = image(32, 32)
    (item,) = vae.SD3ImageEncoder(folder_part(tiny_model / "vae")).load(CPU)([pixels])
    with torch.no_grad():
        posterior = autoencoder.encode(pixels[None].float() / 127.5 - 1).latent_dist
    expected = (posterior.sample(torch.Generator().manual_seed(3))[0] - SHIFT) * SCALE
    noise = torch.randn((1, NUM_CHANNELS, 4, 4), generator=torch.Generator().manual_seed(3))[0]
    torch.testing.assert_close(item["latents"] + item["std"] * noise, expected)


def test_shift_and_scale_come_from_the_folder_s_config(tiny_model: Path, tmp_path: Path) -> None:
    config = (tiny_model / "vae" / "config.json").read_text()
    folder = linked_copy(tiny_model / "vae", tmp_path / "vae")
    rewrite(folder / "config.json", config.replace("1.5305", "0.75").replace("0.0609", "-0.25"))
    pixels = image(16, 16)
    (ours,), (released,) = (
        vae.SD3ImageEncoder(folder_part(path)).load(CPU)([pixels]) for path in (folder, tiny_model / "vae")
    )
    mean = released["latents"] / SCALE + SHIFT
    torch.testing.assert_close(ours["latents"], (mean + 0.25) * 0.75)
    torch.testing.assert_close(ours["std"], released["std"] / SCALE * 0.75)


def test_a_image_s_latents_do_not_depend_on_its_company(tiny_model: Path) -> None:
    encode = vae.SD3ImageEncoder(folder_part(tiny_model / "vae")).load(CPU)
    images = [image(16, 32, seed) for seed in range(3)]
    together = encode(images)
    for ours, single in zip(together, (encode([one])[0] for one in images), strict=True):
        assert all(torch.equal(ours[name], single[name]) for name in ("latents", "std"))


def test_decoded_pixels_are_the_inverse_chain(tiny_model: Path, autoencoder: Any) -> None:
    latents = torch.randn(2, 16, 2, 4, generator=torch.Generator().manual_seed(1))
    pixels = vae.load_decoder(folder_part(tiny_model / "vae"), CPU, 1024)(latents)
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
    pixels = vae.load_decoder(folder_part(folder), CPU, 1024)(torch.zeros(1, 16, 2, 2))
    assert pixels[0, 0].unique().tolist() == [255]
    assert pixels[0, 1].unique().tolist() == [0]


def random_latents(height: int, width: int) -> Tensor:
    return torch.randn(1, NUM_CHANNELS, height, width, generator=torch.Generator().manual_seed(2))


@pytest.mark.parametrize(("height", "width"), [(48, 48), (40, 64), (64, 24)])
def test_a_image_decoded_in_tiles_is_near_to_the_whole_one(tiny_model: Path, height: int, width: int) -> None:
    """Norms and attention see a tile only, and random weights make the most of it: 5 to 6 of 255 on average measured.

    The larger the tiles, the less: 12 with tiles of half the side.
    """
    latents = random_latents(height, width)
    decoders = (vae.load_decoder(folder_part(tiny_model / "vae"), CPU, side) for side in (1024, 256, 128))
    whole, tiled, small = (decode(latents).float() for decode in decoders)
    assert tiled.shape == whole.shape == (1, 3, 8 * height, 8 * width)
    difference, more = (float((other - whole).abs().mean()) for other in (tiled, small))
    assert 0 < difference < 7
    assert difference < 0.6 * more
    misplaced = float((whole[..., 8:] - whole[..., :-8]).abs().mean())
    assert difference < misplaced / 5, "one latent pixel off would be far worse"


def test_tiles_do_not_show_where_they_meet(tiny_model: Path) -> None:
    """Pixels differ from their neighbours no more where a tile begins or the blending ends than elsewhere."""
    tiled = vae.load_decoder(folder_part(tiny_model / "vae"), CPU, 256)(random_latents(48, 48))[0].float()
    for axis in (1, 2):
        steps = tiled.diff(dim=axis).abs().mean(dim=(0, 3 - axis))
        edges = steps[[191, 255]]  # tiles begin at 0 and 192, the first ends at 256
        assert float(edges.max()) < float(steps.mean()) + 3 * float(steps.std())


@pytest.mark.parametrize(("height", "width"), [(8, 8), (2, 8), (4, 6)])
def test_a_image_no_larger_than_a_tile_is_decoded_whole(tiny_model: Path, autoencoder: Any, height: int, width: int) -> None:
    latents = random_latents(height, width)
    with torch.no_grad():
        expected = autoencoder.decode(latents / SCALE + SHIFT).sample
    pixels = vae.load_decoder(folder_part(tiny_model / "vae"), CPU, 64)(latents)
    assert torch.equal(pixels, ((expected + 1) * 127.5).round().clamp(0, 255).to(torch.uint8))


def test_a_fitting_folder_has_no_errors(tiny_model: Path) -> None:
    assert vae_files.vae_errors(folder_part(tiny_model / "vae"), NUM_CHANNELS) == []


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (('"latent_channels": 16', '"latent_channels": 4'), "has 4 latent channels, the network has 16"),
        (("[\n    32,\n    32,\n    32,\n    64\n  ]", "[32, 32, 64]"), "downscales images by 4"),
    ],
)
def test_an_autoencoder_of_another_model_is_refused(
    tiny_model: Path, tmp_path: Path, change: tuple[str, str], message: str
) -> None:
    folder = linked_copy(tiny_model / "vae", tmp_path / "vae")
    config = (folder / "config.json").read_text()
    assert change[0] in config
    rewrite(folder / "config.json", config.replace(*change))
    ((key, text),) = vae_files.vae_errors(folder_part(folder), NUM_CHANNELS)
    assert key == "vae"
    assert message in text


def test_without_a_network_to_fit_only_the_folder_itself_is_judged(tiny_model: Path) -> None:
    assert vae_files.vae_errors(folder_part(tiny_model / "vae"), None) == []


def test_identity_names_weights_and_config(tiny_model: Path) -> None:
    names = {path.name for path in vae.SD3ImageEncoder(folder_part(tiny_model / "vae")).files}
    assert names == {"config.json", "diffusion_pytorch_model.safetensors"}


# --- the native file ---------------------------------------------------------------------------------------------------

RELEASED = {
    "in_channels": 3,
    "out_channels": 3,
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
    "block_out_channels": [128, 256, 512, 512],
    "layers_per_block": 2,
    "latent_channels": 16,
    "norm_num_groups": 32,
    "mid_block_add_attention": True,
    "use_quant_conv": False,
    "use_post_quant_conv": False,
    "scaling_factor": 1.5305,
    "shift_factor": 0.0609,
}
"""config.json of SD3's autoencoder."""
CONFIGS = {
    "released": RELEASED,
    "with quant convolutions": {**RELEASED, "use_quant_conv": True, "use_post_quant_conv": True, "latent_channels": 4},
    "without attention": {**RELEASED, "mid_block_add_attention": False},
    "three levels, one block": {
        **RELEASED,
        "block_out_channels": [32, 32, 64],
        "layers_per_block": 1,
        "down_block_types": ["DownEncoderBlock2D"] * 3,
        "up_block_types": ["UpDecoderBlock2D"] * 3,
    },
}


def diffusers_shapes(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    from diffusers import AutoencoderKL

    with torch.device("meta"):
        return {name: tuple(tensor.shape) for name, tensor in AutoencoderKL.from_config(config).state_dict().items()}


@pytest.mark.parametrize("name", CONFIGS)
def test_native_names_and_shapes_are_those_diffusers_converts(name: str) -> None:
    """By diffusers' own converter, from markers: see tests/public_files.py."""
    config, expected = CONFIGS[name], diffusers_shapes(CONFIGS[name])
    ldm = public_files.ldm_names(config)
    native = vae_files.native_shapes(config)
    assert set(native) == {ldm[diffusers] for diffusers in expected}
    for diffusers, shape in expected.items():
        num_levels = len(config["block_out_channels"])
        assert vae_files.native_names(config)[diffusers] == ldm[diffusers]
        assert vae_files.diffusers_name(ldm[diffusers], num_levels) == diffusers
        assert native[ldm[diffusers]] == (shape if len(shape) != 2 else (*shape, 1, 1))


def test_the_released_autoencoder_has_its_published_size() -> None:
    native = vae_files.native_shapes(RELEASED)
    assert len(native) == 244
    assert sum(math.prod(shape) for shape in native.values()) == 83_819_683
    assert native["encoder.conv_out.weight"] == (32, 512, 3, 3)


@pytest.mark.parametrize("name", CONFIGS)
def test_settings_are_told_from_a_native_file_s_shapes(name: str) -> None:
    assert vae_files.native_config(vae_files.native_shapes(CONFIGS[name])) == CONFIGS[name]


def test_an_old_folder_s_attention_names_are_read(tiny_model: Path, tmp_path: Path, autoencoder: Any) -> None:
    """diffusers before 0.18 wrote these; it still reads them."""
    folder = linked_copy(tiny_model / "vae", tmp_path / "vae")
    path = folder / "diffusion_pytorch_model.safetensors"
    tensors = load_file(path)
    for new, old in (("to_q", "query"), ("to_k", "key"), ("to_v", "value"), ("to_out.0", "proj_attn")):
        tensors = {name.replace(f"attentions.0.{new}.", f"attentions.0.{old}."): value for name, value in tensors.items()}
    assert any(".proj_attn." in name for name in tensors)
    path.unlink()
    save_file(tensors, path, {"format": "pt"})
    assert vae_files.vae_errors(folder_part(folder), NUM_CHANNELS) == []
    latents = torch.randn(1, 16, 2, 2, generator=torch.Generator().manual_seed(0))
    ours, original = (vae.load_decoder(folder_part(one), CPU, 1024)(latents) for one in (folder, tiny_model / "vae"))
    assert torch.equal(ours, original)


def test_a_folder_whose_tensors_do_not_fit_its_config_is_refused(tiny_model: Path, tmp_path: Path) -> None:
    folder = linked_copy(tiny_model / "vae", tmp_path / "vae")
    path = folder / "diffusion_pytorch_model.safetensors"
    tensors = load_file(path)
    del tensors["decoder.up_blocks.1.upsamplers.0.conv.bias"]
    tensors["encoder.conv_in.weight"] = torch.zeros(32, 4, 3, 3)
    path.unlink()
    save_file(tensors, path, {"format": "pt"})
    found = [text for _, text in vae_files.vae_errors(folder_part(folder), NUM_CHANNELS)]
    assert found == [
        f"{folder} misses tensor decoder.up_blocks.1.upsamplers.0.conv.bias (32,)",
        f"{folder} tensor encoder.conv_in.weight has shape (32, 4, 3, 3), expected (32, 3, 3, 3)",
    ]
