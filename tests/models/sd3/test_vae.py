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


def folder_component(folder: Path) -> Component:
    return Component("vae", open_folder(folder), json.loads((folder / "config.json").read_text()), folder)


def image(height: int, width: int, seed: int = 0) -> Tensor:
    return torch.randint(256, (3, height, width), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(("height", "width"), [(32, 32), (16, 48)])
def test_latents_are_the_shifted_and_scaled_mean(tiny_model: Path, autoencoder: Any, height: int, width: int) -> None:
    pixels = image(height, width)
    (item,) = vae.SD3ImageEncoder(folder_component(tiny_model / "vae")).load(CPU)([pixels])
    with torch.no_grad():
        mean = autoencoder.encode(pixels[None].float() / 127.5 - 1).latent_dist.mean[0]
    assert item["latents"].shape == (16, height // 8, width // 8)
    assert item["latents"].dtype == torch.float32
    assert torch.equal(item["latents"], (mean - SHIFT) * SCALE)


@pytest.mark.parametrize(("height", "width"), [(32, 32), (16, 48)])
def test_std_of_the_posterior_is_in_the_scale_of_the_latents(
    tiny_model: Path, autoencoder: Any, height: int, width: int
) -> None:
    pixels = image(height, width)
    (item,) = vae.SD3ImageEncoder(folder_component(tiny_model / "vae")).load(CPU)([pixels])
    with torch.no_grad():
        posterior = autoencoder.encode(pixels[None].float() / 127.5 - 1).latent_dist
    assert set(item) == {"latents", "std"}
    assert item["std"].shape == item["latents"].shape
    assert item["std"].dtype == torch.float32
    assert torch.equal(item["std"], posterior.std[0] * SCALE)
    assert item["std"].min() > 0


def test_sample_from_mean_and_std_equals_that_of_diffusers(tiny_model: Path, autoencoder: Any) -> None:
    """With the same normal random numbers."""
    pixels = image(32, 32)
    (item,) = vae.SD3ImageEncoder(folder_component(tiny_model / "vae")).load(CPU)([pixels])
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
        vae.SD3ImageEncoder(folder_component(path)).load(CPU)([pixels]) for path in (folder, tiny_model / "vae")
    )
    mean = released["latents"] / SCALE + SHIFT
    torch.testing.assert_close(ours["latents"], (mean + 0.25) * 0.75)
    torch.testing.assert_close(ours["std"], released["std"] / SCALE * 0.75)


def test_latents_of_an_image_do_not_depend_on_its_batch(tiny_model: Path) -> None:
    encode = vae.SD3ImageEncoder(folder_component(tiny_model / "vae")).load(CPU)
    images = [image(16, 32, seed) for seed in range(3)]
    together = encode(images)
    for ours, single in zip(together, (encode([one])[0] for one in images), strict=True):
        assert all(torch.equal(ours[name], single[name]) for name in ("latents", "std"))


def test_decoder_inverts_shift_and_scale(tiny_model: Path, autoencoder: Any) -> None:
    latents = torch.randn(2, 16, 2, 4, generator=torch.Generator().manual_seed(1))
    pixels = vae.load_decoder(folder_component(tiny_model / "vae"), CPU, 1024)(latents)
    with torch.no_grad():
        expected = torch.cat([autoencoder.decode(sample[None] / SCALE + SHIFT).sample for sample in latents])
    assert pixels.dtype == torch.uint8
    assert pixels.shape == (2, 3, 16, 32)
    assert torch.equal(pixels, ((expected + 1) * 127.5).round().clamp(0, 255).to(torch.uint8))
    assert len(pixels.unique()) > 10


def test_decoder_clamps_pixels_instead_of_wrapping(tiny_model: Path, tmp_path: Path) -> None:
    folder = linked_copy(tiny_model / "vae", tmp_path / "vae")
    weights = load_file(folder / "diffusion_pytorch_model.safetensors")
    weights["decoder.conv_out.bias"] = torch.tensor([9.0, -9.0, 9.0])
    (folder / "diffusion_pytorch_model.safetensors").unlink()
    save_file(weights, folder / "diffusion_pytorch_model.safetensors", {"format": "pt"})
    pixels = vae.load_decoder(folder_component(folder), CPU, 1024)(torch.zeros(1, 16, 2, 2))
    assert pixels[0, 0].unique().tolist() == [255]
    assert pixels[0, 1].unique().tolist() == [0]


def random_latents(height: int, width: int) -> Tensor:
    return torch.randn(1, NUM_CHANNELS, height, width, generator=torch.Generator().manual_seed(2))


@pytest.mark.parametrize(("height", "width"), [(48, 48), (40, 64), (64, 24)])
def test_image_decoded_in_tiles_is_close_to_the_one_decoded_whole(tiny_model: Path, height: int, width: int) -> None:
    """Norms and attention are computed per tile, and random weights amplify the effect: 5 to 6 of 255 on average.

    The difference falls with the size of the tiles: it is 12 with tiles of half the side.
    """
    latents = random_latents(height, width)
    decoders = (vae.load_decoder(folder_component(tiny_model / "vae"), CPU, side) for side in (1024, 256, 128))
    whole, tiled, small = (decode(latents).float() for decode in decoders)
    assert tiled.shape == whole.shape == (1, 3, 8 * height, 8 * width)
    difference, difference_small = (float((other - whole).abs().mean()) for other in (tiled, small))
    assert 0 < difference < 7
    assert difference < 0.6 * difference_small
    misplaced = float((whole[..., 8:] - whole[..., :-8]).abs().mean())
    assert difference < misplaced / 5, "a shift by one latent pixel would give a far larger difference"


def test_edges_of_tiles_are_not_visible(tiny_model: Path) -> None:
    """Neighbouring pixels differ no more at the edges of tiles and of their blending than elsewhere."""
    tiled = vae.load_decoder(folder_component(tiny_model / "vae"), CPU, 256)(random_latents(48, 48))[0].float()
    for axis in (1, 2):
        steps = tiled.diff(dim=axis).abs().mean(dim=(0, 3 - axis))
        edges = steps[[191, 255]]  # tiles start at 0 and 192; the first ends at 256
        assert float(edges.max()) < float(steps.mean()) + 3 * float(steps.std())


@pytest.mark.parametrize(("height", "width"), [(8, 8), (2, 8), (4, 6)])
def test_image_no_larger_than_a_tile_is_decoded_whole(tiny_model: Path, autoencoder: Any, height: int, width: int) -> None:
    latents = random_latents(height, width)
    with torch.no_grad():
        expected = autoencoder.decode(latents / SCALE + SHIFT).sample
    pixels = vae.load_decoder(folder_component(tiny_model / "vae"), CPU, 64)(latents)
    assert torch.equal(pixels, ((expected + 1) * 127.5).round().clamp(0, 255).to(torch.uint8))


def test_valid_folder_has_no_errors(tiny_model: Path) -> None:
    assert vae_files.vae_errors(folder_component(tiny_model / "vae"), NUM_CHANNELS) == []


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (('"latent_channels": 16', '"latent_channels": 4'), "has 4 latent channels, the network has 16"),
        (("[\n    32,\n    32,\n    32,\n    64\n  ]", "[32, 32, 64]"), "downscales images by 4"),
    ],
)
def test_autoencoder_of_another_model_is_refused(
    tiny_model: Path, tmp_path: Path, change: tuple[str, str], message: str
) -> None:
    folder = linked_copy(tiny_model / "vae", tmp_path / "vae")
    config = (folder / "config.json").read_text()
    assert change[0] in config
    rewrite(folder / "config.json", config.replace(*change))
    ((key, text),) = vae_files.vae_errors(folder_component(folder), NUM_CHANNELS)
    assert key == "vae"
    assert message in text


def test_without_a_network_only_the_folder_itself_is_checked(tiny_model: Path) -> None:
    assert vae_files.vae_errors(folder_component(tiny_model / "vae"), None) == []


def test_cache_identity_includes_weights_and_config(tiny_model: Path) -> None:
    names = {path.name for path in vae.SD3ImageEncoder(folder_component(tiny_model / "vae")).files}
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
    """The expected names come from diffusers' own converter: see tests/public_files.py."""
    config, expected = CONFIGS[name], diffusers_shapes(CONFIGS[name])
    ldm = public_files.ldm_names(config)
    native = vae_files.native_shapes(config)
    assert set(native) == {ldm[diffusers] for diffusers in expected}
    for diffusers, shape in expected.items():
        num_levels = len(config["block_out_channels"])
        assert vae_files.native_names(config)[diffusers] == ldm[diffusers]
        assert vae_files.diffusers_name(ldm[diffusers], num_levels) == diffusers
        assert native[ldm[diffusers]] == (shape if len(shape) != 2 else (*shape, 1, 1))


def test_released_autoencoder_has_its_published_size() -> None:
    native = vae_files.native_shapes(RELEASED)
    assert len(native) == 244
    assert sum(math.prod(shape) for shape in native.values()) == 83_819_683
    assert native["encoder.conv_out.weight"] == (32, 512, 3, 3)


@pytest.mark.parametrize("name", CONFIGS)
def test_config_is_inferred_from_the_shapes_of_a_native_file(name: str) -> None:
    assert vae_files.native_config(vae_files.native_shapes(CONFIGS[name])) == CONFIGS[name]


def test_older_names_of_attention_tensors_are_read(tiny_model: Path, tmp_path: Path, autoencoder: Any) -> None:
    """diffusers wrote these names before 0.18 and still reads them."""
    folder = linked_copy(tiny_model / "vae", tmp_path / "vae")
    path = folder / "diffusion_pytorch_model.safetensors"
    tensors = load_file(path)
    for new, old in (("to_q", "query"), ("to_k", "key"), ("to_v", "value"), ("to_out.0", "proj_attn")):
        tensors = {name.replace(f"attentions.0.{new}.", f"attentions.0.{old}."): value for name, value in tensors.items()}
    assert any(".proj_attn." in name for name in tensors)
    path.unlink()
    save_file(tensors, path, {"format": "pt"})
    assert vae_files.vae_errors(folder_component(folder), NUM_CHANNELS) == []
    latents = torch.randn(1, 16, 2, 2, generator=torch.Generator().manual_seed(0))
    ours, original = (vae.load_decoder(folder_component(one), CPU, 1024)(latents) for one in (folder, tiny_model / "vae"))
    assert torch.equal(ours, original)


def test_folder_whose_tensors_contradict_its_config_is_refused(tiny_model: Path, tmp_path: Path) -> None:
    folder = linked_copy(tiny_model / "vae", tmp_path / "vae")
    path = folder / "diffusion_pytorch_model.safetensors"
    tensors = load_file(path)
    del tensors["decoder.up_blocks.1.upsamplers.0.conv.bias"]
    tensors["encoder.conv_in.weight"] = torch.zeros(32, 4, 3, 3)
    path.unlink()
    save_file(tensors, path, {"format": "pt"})
    found = [text for _, text in vae_files.vae_errors(folder_component(folder), NUM_CHANNELS)]
    assert found == [
        f"{folder} misses tensor decoder.up_blocks.1.upsamplers.0.conv.bias (32,)",
        f"{folder} tensor encoder.conv_in.weight has shape (32, 4, 3, 3), expected (32, 3, 3, 3)",
    ]
