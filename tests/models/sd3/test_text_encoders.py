"""Encoded captions against diffusers' own pipeline and against known token ids."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from models.base import EncodedItem
from models.sd3.settings import SD3Settings
from models.sd3.text_encoders import SD3TextEncoder, join_text, make_text_encoders
from tests.model_copies import linked_copy, settings_for
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


@pytest.fixture(scope="module")
def full_length(tiny_model: Path) -> SD3Settings:
    return settings_for(tiny_model, clip_max_token_length=77, t5xxl_max_token_length=64)


def encode_all(settings: SD3Settings, captions: tuple[str, ...] = CAPTIONS) -> list[dict[str, Tensor]]:
    """For each caption, "encoder.tensor" -> tensor with a batch axis of one."""
    joined: list[dict[str, Tensor]] = [{} for _ in captions]
    for encoder in make_text_encoders(settings):
        items: list[EncodedItem] = encoder.load(CPU)(captions)
        for row, item in zip(joined, items, strict=True):
            row.update({f"{encoder.name}.{key}": value[None] for key, value in item.items()})
    return joined


def token_ids(settings: SD3Settings, caption: str) -> dict[str, list[int]]:
    encoders = make_text_encoders(settings)
    return {encoder.name: encoder._token_ids(encoder._load_tokenizer(), caption) for encoder in encoders}


@pytest.fixture(scope="module")
def pipeline(tiny_model: Path) -> Any:
    """diffusers' pipeline with text encoders and nothing else."""
    from diffusers import FlowMatchEulerDiscreteScheduler, StableDiffusion3Pipeline
    from transformers import CLIPTextModelWithProjection, CLIPTokenizer, T5EncoderModel, T5TokenizerFast

    return StableDiffusion3Pipeline(
        transformer=None,
        vae=None,
        scheduler=FlowMatchEulerDiscreteScheduler(),
        text_encoder=CLIPTextModelWithProjection.from_pretrained(tiny_model / "text_encoder"),
        text_encoder_2=CLIPTextModelWithProjection.from_pretrained(tiny_model / "text_encoder_2"),
        text_encoder_3=T5EncoderModel.from_pretrained(tiny_model / "text_encoder_3"),
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
    ours, our_pooled = join_text(text, CONTEXT_DIM)
    assert ours.shape == (1, 77 + 64, CONTEXT_DIM)
    assert our_pooled.shape == (1, POOLED_DIM)
    assert torch.equal(ours, context)
    assert torch.equal(our_pooled, pooled)


def test_parts_of_the_context_are_in_the_released_order(full_length: SD3Settings) -> None:
    (text,) = encode_all(full_length, CAPTIONS[:1])
    context, pooled = join_text(text, CONTEXT_DIM)
    both = CLIP_L_WIDTH + CLIP_G_WIDTH
    assert torch.equal(context[:, :77, :CLIP_L_WIDTH], text["clip_l.sequence"])
    assert torch.equal(context[:, :77, CLIP_L_WIDTH:both], text["clip_g.sequence"])
    assert not context[:, :77, both:].any()
    assert torch.equal(context[:, 77:], text["t5xxl.sequence"])
    assert torch.equal(pooled, torch.cat([text["clip_l.pooled"], text["clip_g.pooled"]], dim=-1))
    assert "t5xxl.pooled" not in text


def test_known_token_ids_and_each_encoder_s_padding(full_length: SD3Settings) -> None:
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


def test_an_empty_caption_is_only_end_and_padding(full_length: SD3Settings) -> None:
    ids = token_ids(full_length, "")
    assert ids["clip_l"] == [49406] + [49407] * 76
    assert ids["clip_g"] == [49406, 49407] + [0] * 75
    assert ids["t5xxl"] == [1] + [0] * 63


@pytest.mark.parametrize(("clip_length", "t5_length"), [(8, 8), (77, 64), (3, 1)])
def test_a_long_caption_is_cut_and_keeps_its_end_token(tiny_model: Path, clip_length: int, t5_length: int) -> None:
    settings = settings_for(tiny_model, clip_max_token_length=clip_length, t5xxl_max_token_length=t5_length)
    ids = token_ids(settings, "word " * 120)
    assert ids["clip_l"] == ids["clip_g"] == [49406, *[2653] * (clip_length - 2), 49407]
    assert len(ids["t5xxl"]) == t5_length
    assert ids["t5xxl"][-1] == 1
    assert len(set(ids["t5xxl"][:-1])) <= 1


def test_a_caption_s_encoding_does_not_depend_on_its_company(full_length: SD3Settings) -> None:
    together, alone = encode_all(full_length), [encode_all(full_length, (caption,))[0] for caption in CAPTIONS]
    for ours, single in zip(together, alone, strict=True):
        assert all(torch.equal(ours[key], single[key]) for key in ours)


def test_clip_l_is_not_projected_even_when_its_file_holds_a_projection(tiny_model: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    folder = linked_copy(tiny_model, tmp_path / "model")
    path = folder / "text_encoder" / "model.safetensors"
    tensors = load_file(path)
    tensors["text_projection.weight"] = torch.randn(CLIP_L_WIDTH, CLIP_L_WIDTH)
    path.unlink()
    save_file(tensors, path, {"format": "pt"})
    ours, expected = encode_all(settings_for(folder))[0], encode_all(settings_for(tiny_model))[0]
    assert torch.equal(ours["clip_l.pooled"], expected["clip_l.pooled"])


def test_padding_length_changes_what_is_encoded_so_it_is_part_of_the_identity(tiny_model: Path) -> None:
    short, long = (make_text_encoders(settings_for(tiny_model, t5xxl_max_token_length=length))[2] for length in (16, 32))
    first, second = (encoder.load(CPU)(["a red fox"])[0]["sequence"] for encoder in (short, long))
    assert not torch.allclose(first, second[:16], atol=1e-3)
    assert dict(short.settings) != dict(long.settings)


def test_encoded_tensors_have_the_training_precision(tiny_model: Path) -> None:
    for encoder in make_text_encoders(settings_for(tiny_model, dtype="bfloat16")):
        for tensor in encoder.load(CPU)(["a red fox"])[0].values():
            assert tensor.dtype == torch.bfloat16
            assert tensor.isfinite().all()
            assert tensor.device == CPU
            assert not tensor.requires_grad


def test_identity_names_weights_config_and_tokenizer(tiny_model: Path) -> None:
    clip_l, _, t5xxl = make_text_encoders(settings_for(tiny_model))
    names = {path.name for path in clip_l.files}
    assert {"config.json", "model.safetensors", "vocab.json", "merges.txt", "tokenizer_config.json"} <= names
    assert {"spiece.model", "tokenizer.json"} <= {path.name for path in t5xxl.files}
    assert len({json.dumps(dict(encoder.settings)) for encoder in make_text_encoders(settings_for(tiny_model))}) == 3


def test_a_tokenizer_in_the_encoder_s_own_folder_comes_first(tiny_model: Path, tmp_path: Path) -> None:
    folder = linked_copy(tiny_model, tmp_path / "model")
    for file in ("vocab.json", "merges.txt", "tokenizer_config.json", "special_tokens_map.json"):
        (folder / "text_encoder" / file).symlink_to(tiny_model / "tokenizer" / file)
    clip_l, clip_g, _ = make_text_encoders(settings_for(folder))
    assert clip_l.tokenizer_folder == folder / "text_encoder"
    assert clip_g.tokenizer_folder == folder / "tokenizer_2"
    assert_same_tokens(clip_l, make_text_encoders(settings_for(tiny_model))[0])


def assert_same_tokens(one: SD3TextEncoder, other: SD3TextEncoder) -> None:
    first, second = (encoder._token_ids(encoder._load_tokenizer(), "a photo of a red fox") for encoder in (one, other))
    assert first == second
