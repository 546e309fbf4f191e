"""Encoded captions against diffusers' own pipeline and against known token ids."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from models.family import LENGTH, EncodedItem
from models.sd3 import text_encoder_files
from models.sd3.family import SD3Family
from models.sd3.settings import SD3Settings
from models.sd3.sources import Component
from models.sd3.text_conditioning import join_text
from models.sd3.text_encoders import SD3TextEncoder
from models.tensor_files import TensorFiles, TensorLocation
from tests.model_copies import linked_copy, settings_for
from tests.public_files import load_encoder
from tests.tiny_model import CLIP_G_WIDTH, CLIP_L_WIDTH, CONTEXT_DIM, POOLED_DIM

CPU = torch.device("cpu")
CAPTIONS = (
    "a photo of a red fox",
    "",
    "A  Caption with CAPITALS, punctuation!, and\nseveral   spaces",
    "Füchse & 狐狸 🦊",
    "word " * 120,
)
FOX_CLIP = [49406, 320, 1125, 539, 320, 736, 3240, 49407]
FOX_T5 = [3, 9, 1202, 13, 3, 9, 1131, 3, 20400]


def encoders_of(settings: SD3Settings) -> tuple[SD3TextEncoder, ...]:
    return SD3Family.from_files(settings).text_encoders


def join(text: dict[str, Tensor], settings: SD3Settings) -> tuple[Tensor, Tensor]:
    return join_text(text, settings.text_tokens, SD3Family.from_files(settings).config)


@pytest.fixture(scope="module")
def full_length(tiny_model: Path) -> SD3Settings:
    return settings_for(tiny_model, clip_max_token_length=77, t5xxl_max_token_length=64)


def encode_all(settings: SD3Settings, captions: tuple[str, ...] = CAPTIONS) -> list[dict[str, Tensor]]:
    """Returns for each caption "encoder.tensor" -> tensor with a batch axis of one."""
    joined: list[dict[str, Tensor]] = [{} for _ in captions]
    for encoder in encoders_of(settings):
        items: list[EncodedItem] = encoder.load(CPU)(captions)
        for row, item in zip(joined, items, strict=True):
            row.update({f"{encoder.name}.{key}": value[None] for key, value in item.items()})
    return joined


def token_ids(settings: SD3Settings, caption: str) -> dict[str, list[int]]:
    encoders = encoders_of(settings)
    return {encoder.name: encoder._token_ids(encoder._load_tokenizer(), caption) for encoder in encoders}


@pytest.fixture(scope="module")
def pipeline(tiny_model: Path) -> Any:
    """diffusers' pipeline with text encoders and no other component."""
    from diffusers import FlowMatchEulerDiscreteScheduler, StableDiffusion3Pipeline
    from transformers import CLIPTokenizer, T5TokenizerFast

    return StableDiffusion3Pipeline(
        transformer=None,
        vae=None,
        scheduler=FlowMatchEulerDiscreteScheduler(),
        text_encoder=load_encoder(tiny_model, "clip_l"),
        text_encoder_2=load_encoder(tiny_model, "clip_g"),
        text_encoder_3=load_encoder(tiny_model, "t5xxl"),
        tokenizer=CLIPTokenizer.from_pretrained(tiny_model / "tokenizer"),
        tokenizer_2=CLIPTokenizer.from_pretrained(tiny_model / "tokenizer_2"),
        tokenizer_3=T5TokenizerFast.from_pretrained(tiny_model / "tokenizer_3"),
    )


@pytest.mark.parametrize("caption", CAPTIONS)
def test_context_and_pooled_equal_diffusers(pipeline: Any, full_length: SD3Settings, caption: str) -> None:
    with torch.no_grad():
        context, _, pooled, _ = pipeline.encode_prompt(
            caption, None, None, device=CPU, do_classifier_free_guidance=False, max_sequence_length=64
        )
    (text,) = encode_all(full_length, (caption,))
    ours, our_pooled = join(text, full_length)
    assert ours.shape == (1, 77 + 64, CONTEXT_DIM)
    assert our_pooled.shape == (1, POOLED_DIM)
    assert torch.equal(ours, context)
    assert torch.equal(our_pooled, pooled)


def test_encoders_are_joined_in_the_order_of_the_released_models(full_length: SD3Settings) -> None:
    (text,) = encode_all(full_length, CAPTIONS[:1])
    context, pooled = join(text, full_length)
    both = CLIP_L_WIDTH + CLIP_G_WIDTH
    assert torch.equal(context[:, :77, :CLIP_L_WIDTH], text["clip_l.sequence"])
    assert torch.equal(context[:, :77, CLIP_L_WIDTH:both], text["clip_g.sequence"])
    assert not context[:, :77, both:].any()
    assert torch.equal(context[:, 77:], text["t5xxl.sequence"])
    assert torch.equal(pooled, torch.cat([text["clip_l.pooled"], text["clip_g.pooled"]], dim=-1))
    assert "t5xxl.pooled" not in text


def test_token_ids_and_padding_of_each_encoder(full_length: SD3Settings) -> None:
    ids = token_ids(full_length, "a photo of a red fox")
    assert ids["clip_l"] == FOX_CLIP + [49407] * (77 - len(FOX_CLIP))
    assert ids["clip_g"] == FOX_CLIP + [0] * (77 - len(FOX_CLIP))
    num_tokens = len(ids["t5xxl"]) - ids["t5xxl"].count(0)
    assert ids["t5xxl"][: len(FOX_T5)] == FOX_T5
    assert ids["t5xxl"][num_tokens - 1] == 1
    assert ids["t5xxl"][num_tokens:] == [0] * (64 - num_tokens)


@pytest.mark.parametrize("caption", CAPTIONS[:4])
def test_t5_tokens_equal_sentencepiece(tiny_model: Path, full_length: SD3Settings, caption: str) -> None:
    import sentencepiece

    reference = sentencepiece.SentencePieceProcessor(model_file=str(tiny_model / "tokenizer_3" / "spiece.model"))
    expected = [*reference.encode(caption), 1]
    assert token_ids(full_length, caption)["t5xxl"] == expected + [0] * (64 - len(expected))


def test_empty_caption_has_only_special_tokens_and_padding(full_length: SD3Settings) -> None:
    ids = token_ids(full_length, "")
    assert ids["clip_l"] == [49406] + [49407] * 76
    assert ids["clip_g"] == [49406, 49407] + [0] * 75
    assert ids["t5xxl"] == [1] + [0] * 63


@pytest.mark.parametrize(("clip_length", "t5_length"), [(8, 8), (77, 64), (3, 1)])
def test_truncated_caption_keeps_its_end_token(tiny_model: Path, clip_length: int, t5_length: int) -> None:
    settings = settings_for(tiny_model, clip_max_token_length=clip_length, t5xxl_max_token_length=t5_length)
    ids = token_ids(settings, "word " * 120)
    assert ids["clip_l"] == ids["clip_g"] == [49406, *[2653] * (clip_length - 2), 49407]
    assert len(ids["t5xxl"]) == t5_length
    assert ids["t5xxl"][-1] == 1
    assert len(set(ids["t5xxl"][:-1])) <= 1


def test_encoding_of_a_caption_does_not_depend_on_its_batch(full_length: SD3Settings) -> None:
    together, alone = encode_all(full_length), [encode_all(full_length, (caption,))[0] for caption in CAPTIONS]
    for ours, single in zip(together, alone, strict=True):
        assert all(torch.equal(ours[key], single[key]) for key in ours)


def test_clip_l_is_not_projected_even_if_its_file_has_a_projection(tiny_model: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    folder = linked_copy(tiny_model, tmp_path / "model")
    path = folder / "text_encoder" / "model.safetensors"
    tensors = load_file(path)
    tensors["text_projection.weight"] = torch.randn(CLIP_L_WIDTH, CLIP_L_WIDTH)
    path.unlink()
    save_file(tensors, path, {"format": "pt"})
    ours, expected = encode_all(settings_for(folder))[0], encode_all(settings_for(tiny_model))[0]
    assert torch.equal(ours["clip_l.pooled"], expected["clip_l.pooled"])


def test_token_length_changes_the_encoding_and_is_part_of_the_cache_identity(tiny_model: Path) -> None:
    short, long = (encoders_of(settings_for(tiny_model, t5xxl_max_token_length=length))[2] for length in (16, 32))
    first, second = (encoder.load(CPU)(["a red fox"])[0]["sequence"] for encoder in (short, long))
    assert not torch.allclose(first, second[:16], atol=1e-3)
    assert dict(short.settings) != dict(long.settings)


def test_encoded_tensors_have_the_training_precision(tiny_model: Path) -> None:
    for encoder in encoders_of(settings_for(tiny_model, dtype="bfloat16")):
        item = encoder.load(CPU)(["a red fox"])[0]
        assert encoder.dtype == torch.bfloat16
        for tensor in (value for name, value in item.items() if name != LENGTH):
            assert tensor.dtype == torch.bfloat16
            assert tensor.isfinite().all()
            assert tensor.device == CPU
            assert not tensor.requires_grad


@pytest.mark.parametrize(("clip_length", "t5_length"), [(77, 64), (8, 16)])
def test_declared_shapes_are_those_of_the_encoded_items(tiny_model: Path, clip_length: int, t5_length: int) -> None:
    settings = settings_for(tiny_model, clip_max_token_length=clip_length, t5xxl_max_token_length=t5_length)
    for encoder in encoders_of(settings):
        assert encoder.num_tokens == (t5_length if encoder.name == "t5xxl" else clip_length)
        for item in encoder.load(CPU)(CAPTIONS):
            assert {name: tuple(value.shape) for name, value in item.items() if name != LENGTH} == encoder.shapes
            assert (item[LENGTH].dtype, item[LENGTH].shape) == (torch.int32, (2,))


def lengths(encoder: SD3TextEncoder, *captions: str) -> list[list[int]]:
    """Returns [tokens, characters that are read] of each caption."""
    return [item[LENGTH].tolist() for item in encoder.load(CPU)(captions)]


@pytest.mark.parametrize("index", range(3))
def test_length_of_a_caption_counts_all_its_tokens_with_special_ones(tiny_model: Path, index: int) -> None:
    """Whether or not the caption is truncated."""
    for num_tokens in (77, 5):
        settings = settings_for(tiny_model, clip_max_token_length=num_tokens, t5xxl_max_token_length=num_tokens)
        encoder = encoders_of(settings)[index]
        tokenizer = encoder._load_tokenizer()
        for caption, (tokens, characters) in zip(CAPTIONS, lengths(encoder, *CAPTIONS), strict=True):
            assert tokens == len(tokenizer(caption)["input_ids"])
            assert 0 <= characters <= len(caption)
            assert (characters == len(caption)) == (tokens <= num_tokens)


@pytest.mark.parametrize("num_tokens", [4, 6, 7, 10, 15, 17])
def test_characters_read_of_a_truncated_caption_are_those_of_its_tokens(tiny_model: Path, num_tokens: int) -> None:
    """The decoded tokens equal the beginning of the caption, also if truncated within a word."""
    caption = "a photograph of an extraordinarily fluffy fox, sitting on a mossy boulder in the rain; quite alone, at noon"
    settings = settings_for(tiny_model, clip_max_token_length=num_tokens, t5xxl_max_token_length=num_tokens)
    for encoder in encoders_of(settings):
        tokenizer = encoder._load_tokenizer()
        tokens, characters = encoder._length(tokenizer, caption)
        assert tokens > num_tokens
        read = encoder._token_ids(tokenizer, caption)[: num_tokens - 1]
        decoded = tokenizer.decode(read, skip_special_tokens=True)
        assert "".join(decoded.split()) == "".join(caption[:characters].split())


def test_with_length_for_the_end_token_only_no_character_is_read(tiny_model: Path) -> None:
    settings = settings_for(tiny_model, clip_max_token_length=3, t5xxl_max_token_length=1)
    *_, t5xxl = encoders_of(settings)
    assert lengths(t5xxl, "a fox", "") == [[len(t5xxl._load_tokenizer()("a fox")["input_ids"]), 0], [1, 0]]


def test_cache_identity_includes_weights_config_and_tokenizer(tiny_model: Path) -> None:
    clip_l, _, t5xxl = encoders_of(settings_for(tiny_model))
    names = {path.name for path in clip_l.files}
    assert {"config.json", "model.safetensors", "vocab.json", "merges.txt", "tokenizer_config.json"} <= names
    assert {"spiece.model", "tokenizer.json"} <= {path.name for path in t5xxl.files}
    assert len({json.dumps(dict(encoder.settings)) for encoder in encoders_of(settings_for(tiny_model))}) == 3


# --- the released encoders ---------------------------------------------------------------------------------------------

CLIP = {"vocab_size": 49408, "max_position_embeddings": 77}
RELEASED = {
    "clip_l": (
        {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12},
        {"hidden_act": "quick_gelu", "projection_dim": 768, **CLIP},
        123.65,
    ),
    "clip_g": (
        {"hidden_size": 1280, "intermediate_size": 5120, "num_hidden_layers": 32, "num_attention_heads": 20},
        {"hidden_act": "gelu", "projection_dim": 1280, **CLIP},
        694.66,
    ),
    "t5xxl": (
        {"d_model": 4096, "d_kv": 64, "d_ff": 10240, "num_layers": 24, "num_heads": 64, "vocab_size": 32128},
        {"feed_forward_proj": "gated-gelu", "is_encoder_decoder": False},
        4762.3,
    ),
}
"""Config of the released encoders (sizes, other settings) and their parameters in millions."""


def released_shapes(name: str) -> dict[str, tuple[int, ...]]:
    """Returns tensor name -> shape of transformers' own class, from the meta device."""
    from transformers import CLIPTextConfig, CLIPTextModelWithProjection, T5Config, T5EncoderModel

    shape, rest, _ = RELEASED[name]
    with torch.device("meta"):
        if name == "t5xxl":
            model: Any = T5EncoderModel(T5Config(**shape, **rest))
        else:
            model = CLIPTextModelWithProjection(CLIPTextConfig(**shape, **rest))
    return {key: tuple(value.shape) for key, value in model.state_dict().items() if key != "encoder.embed_tokens.weight"}


def bare_component(name: str, shapes: dict[str, tuple[int, ...]]) -> Component:
    locations = {key: TensorLocation(Path("file"), key, shape, "F16") for key, shape in shapes.items()}
    return Component(name, TensorFiles(locations, Path("file")), None, Path("."))


@pytest.mark.parametrize("name", RELEASED)
def test_expected_tensors_are_those_of_the_released_encoder(name: str) -> None:
    shape, rest, millions = RELEASED[name]
    published = released_shapes(name)
    ours = text_encoder_files.encoder_shapes(name, {**shape, **rest})
    # The program does not require the projection of CLIP-L, which is an identity; the published number includes it.
    projection = {"text_projection.weight": (768, 768)} if name == "clip_l" else {}
    assert {**ours, **projection} == published
    total = sum(math.prod(shape) for shape in published.values())
    assert total / 1e6 == pytest.approx(millions, abs=0.05 if name == "t5xxl" else 0.005)


@pytest.mark.parametrize("name", RELEASED)
def test_config_is_inferred_from_a_bare_file_of_a_released_encoder(name: str) -> None:
    shape, rest, _ = RELEASED[name]
    inferred = text_encoder_files.encoder_config(bare_component(name, released_shapes(name)))
    assert {key: inferred[key] for key in (*shape, *rest)} == {**shape, **rest}


def test_embedding_table_under_either_or_both_of_its_t5_names_is_one_tensor() -> None:
    shapes = released_shapes("t5xxl")
    table = shapes.pop("shared.weight")
    for names in (("shared.weight",), ("encoder.embed_tokens.weight",), ("shared.weight", "encoder.embed_tokens.weight")):
        part = bare_component("t5xxl", {**shapes, **dict.fromkeys(names, table)})
        assert text_encoder_files.encoder_tensors(part).shapes == {**shapes, "shared.weight": table}
