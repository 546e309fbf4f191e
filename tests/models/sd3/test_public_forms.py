"""Every public form of the files gives the weights, encoded captions, latents and images of the original.

The original is the tiny model. tests/public_files.py computes the values each form represents: rounded where it stores
fewer bits, and dequantised where it stores scales.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from models.family import LENGTH, EncodedItem
from models.sd3.family import SD3Family
from models.sd3.layers import layer_prefix
from models.tensor_files import open_file
from tests import public_files
from tests.model_copies import settings_for
from tests.public_files import NETWORK_PREFIX, PART_PREFIXES, STORAGES, Tensors, original_part

CPU = torch.device("cpu")
CAPTION = "a photo of a red fox"
ENCODERS = ("clip_l", "clip_g", "t5xxl")
EVERYTHING = ("mmdit", "vae", *ENCODERS)

Write = Callable[[Path, Path], dict[str, Any]]
"""(folder to write into, tiny model) -> changes of the settings."""


@dataclass(frozen=True)
class Form:
    """A form in which some components of the model are published."""

    write: Write
    parts: tuple[str, ...]
    storage: str = "float32"


def stored(model: Path, part: str, storage: str) -> Tensors:
    return STORAGES[storage](original_part(model, part))[0]


# --- the forms ---------------------------------------------------------------------------------------------------------


def network_file(storage: str, prefix: str) -> Form:
    def write(folder: Path, model: Path) -> dict[str, Any]:
        return {"mmdit": public_files.write_file(folder / "network.safetensors", stored(model, "mmdit", storage), prefix)}

    return Form(write, ("mmdit",), storage)


def network_folder(storage: str = "float32", **how: Any) -> Form:
    def write(folder: Path, model: Path) -> dict[str, Any]:
        network = public_files.diffusers_network(original_part(model, "mmdit"))
        network.to({"float32": torch.float32, "float16": torch.float16}[storage]).save_pretrained(folder, **how)
        return {"mmdit": folder}

    return Form(write, ("mmdit",), storage)


def network_file_of_diffusers() -> Form:
    def write(folder: Path, model: Path) -> dict[str, Any]:
        tensors = public_files.diffusers_tensors(original_part(model, "mmdit"))
        return {"mmdit": public_files.write_file(folder / "diffusion_pytorch_model.safetensors", tensors)}

    return Form(write, ("mmdit",))


def part_file(part: str, storage: str, prefix: str = "") -> Form:
    def write(folder: Path, model: Path) -> dict[str, Any]:
        public_files.link_tokenizers(model, folder)
        return {part: public_files.write_file(folder / f"{part}.safetensors", stored(model, part, storage), prefix)}

    return Form(write, (part,), storage)


def encoder_folder(part: str, storage: str = "float32", **how: Any) -> Form:
    def write(folder: Path, model: Path) -> dict[str, Any]:
        public_files.link_tokenizers(model, folder)
        encoder = public_files.load_encoder(model, part).to(torch.float16 if storage == "float16" else torch.float32)
        encoder.save_pretrained(folder / "encoder", **how)
        return {part: folder / "encoder"}

    return Form(write, (part,), storage)


def clip_l_folder(write_clip: Callable[[Path, Path], Path]) -> Form:
    def write(folder: Path, model: Path) -> dict[str, Any]:
        public_files.link_tokenizers(model, folder)
        return {"clip_l": write_clip(folder / "clip_l", model)}

    return Form(write, ("clip_l",))


def autoencoder_folder(**how: Any) -> Form:
    def write(folder: Path, model: Path) -> dict[str, Any]:
        from diffusers import AutoencoderKL

        AutoencoderKL.from_pretrained(model / "vae").to(torch.float16).save_pretrained(folder, **how)
        return {"vae": folder}

    return Form(write, ("vae",), "float16")


UNSET = {"vae": None, "clip_l": None, "clip_g": None, "t5xxl": None}


def complete_file(storage: str) -> Form:
    def write(folder: Path, model: Path) -> dict[str, Any]:
        public_files.link_tokenizers(model, folder)
        parts = {part: stored(model, part, storage) for part in EVERYTHING}
        return {"mmdit": public_files.write_complete_file(folder / "complete.safetensors", parts), **UNSET}

    return Form(write, EVERYTHING, storage)


def complete_file_for_its_encoders_only() -> Form:
    """The paths of the encoders name the complete file; the network is another file."""

    def write(folder: Path, model: Path) -> dict[str, Any]:
        path = complete_file("float32").write(folder, model)["mmdit"]
        return {"vae": path, "clip_l": path, "clip_g": path, "t5xxl": path}

    return Form(write, EVERYTHING)


def pipeline_folder() -> Form:
    def write(folder: Path, model: Path) -> dict[str, Any]:
        return {"mmdit": public_files.write_pipeline(folder, model), **UNSET}

    return Form(write, EVERYTHING)


FORMS = {
    "original": Form(lambda folder, model: {}, EVERYTHING),
    **{f"network_{storage}": network_file(storage, "") for storage in STORAGES},
    "network_float16_prefixed": network_file("float16", NETWORK_PREFIX),
    "network_fp8_scaled_older_prefixed": network_file("fp8_scaled_older", NETWORK_PREFIX),
    "network_diffusers_folder": network_folder(),
    "network_diffusers_file": network_file_of_diffusers(),
    "network_diffusers_shards": network_folder(max_shard_size="2MB"),
    "network_diffusers_fp16_variant": network_folder("float16", variant="fp16"),
    "network_diffusers_fp16_variant_shards": network_folder("float16", variant="fp16", max_shard_size="1MB"),
    **{f"{part}_float32": part_file(part, "float32") for part in ENCODERS},
    **{f"t5xxl_{storage}": part_file("t5xxl", storage) for storage in STORAGES},
    "clip_l_float16": part_file("clip_l", "float16"),
    "clip_l_prefixed": part_file("clip_l", "float32", PART_PREFIXES["clip_l"]),
    "clip_g_fp8_scaled_newer": part_file("clip_g", "fp8_scaled_newer"),
    "t5xxl_short_prefix": part_file("t5xxl", "float32", "text_encoders.t5xxl."),
    "t5xxl_shards": encoder_folder("t5xxl", max_shard_size="8MB"),
    "t5xxl_fp16_variant_shards": encoder_folder("t5xxl", "float16", variant="fp16", max_shard_size="8MB"),
    "clip_g_fp16_variant": encoder_folder("clip_g", "float16", variant="fp16"),
    "clip_l_without_projection": clip_l_folder(public_files.write_clip_text_model),
    "clip_l_with_image_half": clip_l_folder(public_files.write_whole_clip),
    "vae_float32": part_file("vae", "float32"),
    "vae_bfloat16": part_file("vae", "bfloat16"),
    "vae_prefixed": part_file("vae", "float16", PART_PREFIXES["vae"]),
    "vae_short_prefix": part_file("vae", "float32", "vae."),
    "vae_fp16_variant": autoencoder_folder(variant="fp16"),
    "complete_float32": complete_file("float32"),
    "complete_fp8_scaled_older": complete_file("fp8_scaled_older"),
    "complete_named_by_each_part": complete_file_for_its_encoders_only(),
    "pipeline_folder": pipeline_folder(),
}


def forms_of(part: str) -> list[str]:
    return [name for name, form in FORMS.items() if part in form.parts]


@pytest.fixture(scope="module")
def written(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], dict[str, Any]]:
    """Form -> settings that name its files, which are written on first use."""
    known: dict[str, dict[str, Any]] = {}

    def settings_of(name: str) -> dict[str, Any]:
        if name not in known:
            known[name] = FORMS[name].write(tmp_path_factory.mktemp(name), tiny_model)
        return known[name]

    return settings_of


Written = Callable[[str], dict[str, Any]]


@cache  # there is one tiny model per session
def values_of(model: Path, part: str, storage: str) -> Tensors:
    """Returns the float32 values that a form represents."""
    return STORAGES[storage](original_part(model, part))[1]


# --- the network -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def original(tiny_model: Path) -> SD3Family:
    return SD3Family.from_files(settings_for(tiny_model))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("form", forms_of("mmdit"))
def test_layers_have_the_values_and_the_config_of_the_original(
    tiny_model: Path, written: Written, original: SD3Family, form: str, dtype: str
) -> None:
    family = SD3Family.from_files(settings_for(tiny_model, **written(form), dtype=dtype))
    assert family.config == original.config
    assert [(one.name, one.shapes) for one in family.layers] == [(one.name, one.shapes) for one in original.layers]
    expected = values_of(tiny_model, "mmdit", FORMS[form].storage)
    found = {
        layer_prefix(family.config, index) + name: value
        for index, layer in enumerate(family.layers)
        for name, value in layer.build().state_dict().items()
    }
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        wanted = torch.float32 if name == "pos_embed" else getattr(torch, dtype)
        assert found[name].dtype == wanted
        assert torch.equal(found[name], value.to(wanted)), name


# --- captions ----------------------------------------------------------------------------------------------------------


@cache
def reference_items(model: Path, part: str, storage: str, ids: tuple[int, ...]) -> EncodedItem:
    """Returns what an encoder with the values of a form must return according to the SD3 paper, using transformers."""
    encoder = public_files.load_encoder(model, part)
    lacking, extra = encoder.load_state_dict(values_of(model, part, storage), strict=False)
    assert not extra
    assert set(lacking) <= {"encoder.embed_tokens.weight"}  # the same tensor as shared.weight
    tokens = torch.tensor([ids])
    with torch.no_grad():
        if part == "t5xxl":
            return {"sequence": encoder(input_ids=tokens).last_hidden_state[0]}
        output = encoder.text_model(input_ids=tokens, output_hidden_states=True)
        pooled = encoder(input_ids=tokens).text_embeds if part == "clip_g" else output.pooler_output
        return {"sequence": output.hidden_states[-2][0], "pooled": pooled[0]}


CAPTION_FORMS = [
    (part, form) for part in ENCODERS for form in forms_of(part) if part == "t5xxl" or form != "complete_named_by_each_part"
]


@pytest.mark.parametrize(("part", "form"), CAPTION_FORMS)
def test_encoded_captions_equal_those_of_the_original(tiny_model: Path, written: Written, part: str, form: str) -> None:
    settings = settings_for(tiny_model, **written(form))
    encoder = next(encoder for encoder in SD3Family.from_files(settings).text_encoders if encoder.name == part)
    (item,) = encoder.load(CPU)([CAPTION])
    ids = encoder._token_ids(encoder._load_tokenizer(), CAPTION)
    expected = reference_items(tiny_model, part, FORMS[form].storage, tuple(ids))
    assert item.keys() - {LENGTH} == expected.keys()
    for key in expected:
        assert torch.equal(item[key], expected[key]), key


def test_tokenizers_saved_by_current_transformers_give_the_original_tokens(
    tiny_model: Path, written: Written, original: SD3Family
) -> None:
    ours = SD3Family.from_files(settings_for(tiny_model, **written("pipeline_folder"))).text_encoders
    assert len(ours) == 3
    for encoder, reference in zip(ours, original.text_encoders, strict=True):
        assert encoder.tokenizer_folder != reference.tokenizer_folder
        first, second = (one._token_ids(one._load_tokenizer(), CAPTION) for one in (encoder, reference))
        assert first == second


# --- images ------------------------------------------------------------------------------------------------------------


@cache
def reference_autoencoder(model: Path, storage: str) -> Any:
    from diffusers import AutoencoderKL

    values = values_of(model, "vae", storage)
    autoencoder = AutoencoderKL.from_pretrained(model / "vae").eval()
    names = public_files.ldm_names(autoencoder.config)
    state = autoencoder.state_dict()
    autoencoder.load_state_dict({name: values[names[name]].reshape(state[name].shape) for name in state})
    return autoencoder


@pytest.mark.parametrize("form", forms_of("vae"))
def test_latents_and_decoded_images_equal_those_of_the_original(tiny_model: Path, written: Written, form: str) -> None:
    family = SD3Family.from_files(settings_for(tiny_model, **written(form)))
    reference = reference_autoencoder(tiny_model, FORMS[form].storage)
    generator = torch.Generator().manual_seed(0)
    image = torch.randint(256, (3, 32, 16), dtype=torch.uint8, generator=generator)
    latents = torch.randn(1, 16, 2, 3, generator=generator)
    with torch.no_grad():
        mean = reference.encode(image[None].float() / 127.5 - 1).latent_dist.mean[0]
        pixels = reference.decode(latents / 1.5305 + 0.0609).sample
    (item,) = family.image_encoder.load(CPU)([image])
    assert torch.equal(item["latents"], (mean - 0.0609) * 1.5305)
    expected = ((pixels + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)
    assert torch.equal(family.load_decoder(CPU, 1024)(latents), expected)
    assert len(expected.unique()) > 10


# --- identity, scales and memory ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["complete_float32", "pipeline_folder", "t5xxl_shards", "network_diffusers_shards"])
def test_every_file_that_is_read_is_in_the_identity(tiny_model: Path, written: Written, form: str) -> None:
    changes = written(form)
    family = SD3Family.from_files(settings_for(tiny_model, **changes))
    t5xxl = {path.name for path in family.text_encoders[2].files if path.suffix == ".safetensors"}
    expected = {
        "complete_float32": ({"complete.safetensors"}, {"complete.safetensors"}),
        "pipeline_folder": ({"diffusion_pytorch_model.safetensors"}, {"model.safetensors"}),
        "t5xxl_shards": ({"mmdit.safetensors"}, {f"model-0000{part}-of-00002.safetensors" for part in (1, 2)}),
        "network_diffusers_shards": (
            {f"diffusion_pytorch_model-0000{part}-of-00004.safetensors" for part in (1, 2, 3, 4)},
            {"model.safetensors"},
        ),
    }[form]
    assert ({path.name for path in family.network_files}, t5xxl) == expected


def one_scaled_tensor(folder: Path, scale: Tensor, suffix: str) -> tuple[Tensor, Tensor]:
    """Returns a weight read from a file with this scale, and its stored value."""
    weight = (16 * torch.randn(6, 4, generator=torch.Generator().manual_seed(0))).to(public_files.FP8)
    path = public_files.write_file(folder / "one.safetensors", {"module.weight": weight, f"module.{suffix}": scale})
    files = open_file(path)
    assert set(files.shapes) == {"module.weight"}
    assert files.storage_errors() == []
    return files.read_one("module.weight", torch.float32), weight.float()


@pytest.mark.parametrize("suffix", ["scale_weight", "weight_scale"])
@pytest.mark.parametrize("shape", [(), (1,), (1, 1)])
def test_single_scale_of_any_shape_multiplies_the_whole_weight(tmp_path: Path, shape: tuple[int, ...], suffix: str) -> None:
    read, weight = one_scaled_tensor(tmp_path, torch.full(shape, 0.375), suffix)
    assert torch.equal(read, weight * 0.375)


@pytest.mark.parametrize("shape", [(6,), (6, 1)])
def test_one_scale_per_row_multiplies_the_rows(tmp_path: Path, shape: tuple[int, ...]) -> None:
    scale = torch.arange(1.0, 7.0).reshape(shape)
    read, weight = one_scaled_tensor(tmp_path, scale, "weight_scale")
    assert torch.equal(read, weight * scale.reshape(6, 1))


def test_tensors_do_not_share_memory_with_the_file(tiny_model: Path, tmp_path: Path) -> None:
    path = public_files.write_file(tmp_path / "one.safetensors", {"weight": torch.ones(4)})
    before = open_file(path).read_one("weight", torch.float32)
    content = bytearray(path.read_bytes())
    content[-16:] = bytes(16)
    with path.open("r+b") as file:  # the same inode, not a new file of that name
        file.write(content)
    assert torch.equal(before, torch.ones(4))
