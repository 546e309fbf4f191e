"""Text encoders that are off: replacement of their tokens and pooled vectors."""

from __future__ import annotations

from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from models.family import ModelFilesError
from models.sd3.family import SD3Family
from tests.model_copies import settings_for
from tests.public_files import diffusers_network, load_encoder, original_part
from tests.tiny_model import CLIP_G_WIDTH, CLIP_L_WIDTH, CONTEXT_DIM, POOLED_DIM

CPU = torch.device("cpu")
CLIP_TOKENS, T5_TOKENS = 5, 7
WIDTHS = {"clip_l": CLIP_L_WIDTH, "clip_g": CLIP_G_WIDTH, "t5xxl": CONTEXT_DIM}
SOME_OFF = [
    off
    for number in product((False, True), repeat=3)
    if 0 < len(off := tuple(name for name, is_off in zip(WIDTHS, number, strict=True) if is_off)) < 3
]


def family_without(model: Path, off: tuple[str, ...], missing: str, **changes: Any) -> SD3Family:
    lengths = {"clip_max_token_length": CLIP_TOKENS, "t5xxl_max_token_length": T5_TOKENS}
    return SD3Family.from_files(
        settings_for(model, **{**lengths, **dict.fromkeys(off, False), "missing_encoders": missing, **changes})
    )


def random_text(off: tuple[str, ...]) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    text = {}
    for name, width in WIDTHS.items():
        if name not in off:
            num_tokens = T5_TOKENS if name == "t5xxl" else CLIP_TOKENS
            text[f"{name}.sequence"] = torch.randn(2, num_tokens, width, generator=generator)
            if name != "t5xxl":
                text[f"{name}.pooled"] = torch.randn(2, width, generator=generator)
    return text


def expected_inputs(text: dict[str, Tensor], missing: str) -> tuple[Tensor, Tensor]:
    """Returns context and pooled: features of CLIP-L, then CLIP-G, each in its place; then T5's tokens."""
    clip, t5 = torch.zeros(2, CLIP_TOKENS, CONTEXT_DIM), torch.zeros(2, T5_TOKENS, CONTEXT_DIM)
    pooled = torch.zeros(2, POOLED_DIM)
    places = {"clip_l": slice(0, CLIP_L_WIDTH), "clip_g": slice(CLIP_L_WIDTH, CLIP_L_WIDTH + CLIP_G_WIDTH)}
    for name, place in places.items():
        if f"{name}.sequence" in text:
            clip[..., place] = text[f"{name}.sequence"]
            pooled[..., place] = text[f"{name}.pooled"]
    t5 = text.get("t5xxl.sequence", t5)
    has_clip, has_t5 = any("clip" in name for name in text), "t5xxl.sequence" in text
    parts = [clip] if has_clip or missing == "zeros" else []
    parts += [t5] if has_t5 or missing == "zeros" else []
    return torch.cat(parts, dim=1), pooled


@pytest.mark.parametrize("missing", ["zeros", "absent"])
@pytest.mark.parametrize("off", SOME_OFF, ids="+".join)
def test_context_and_pooled_are_those_of_other_programs(tiny_model: Path, off: tuple[str, ...], missing: str) -> None:
    family = family_without(tiny_model, off, missing)
    assert tuple(encoder.name for encoder in family.text_encoders) == tuple(name for name in WIDTHS if name not in off)
    text = random_text(off)
    latents = torch.randn(2, 16, 4, 4)
    sample = family.sample(latents, torch.tensor([0.9, 0.1]), text)
    context, pooled = expected_inputs(text, missing)
    assert torch.equal(sample.tensors["context"], context)
    assert torch.equal(sample.tensors["pooled"], pooled)
    assert sample.shape == family.sample_shape(2, 4, 4)
    assert sample.shape.num_text_tokens == context.shape[1]
    value: Any = sample.tensors
    with torch.no_grad():
        for layer in family.layers:
            value = layer.build()(value)
    assert family.velocity(value, sample.shape).shape == latents.shape


@pytest.mark.parametrize("off", SOME_OFF, ids="+".join)
def test_encoders_that_are_off_are_noted(tiny_model: Path, off: tuple[str, ...]) -> None:
    family = family_without(tiny_model, off, "zeros")
    assert all(f"without {name}" in family.describe() for name in off)
    noted = [name for name, is_off in (("CLIPs", {"clip_l", "clip_g"} <= set(off)), ("T5", "t5xxl" in off)) if is_off]
    notes = "\n".join(family.notes)
    assert [name for name in ("CLIPs", "T5") if name in notes] == noted
    assert not noted or "model.missing_encoders" in notes


def test_missing_encoders_has_no_effect_when_all_are_on(tiny_model: Path) -> None:
    text, latents, sigma = random_text(()), torch.randn(2, 16, 4, 4), torch.tensor([0.9, 0.1])
    zeros, absent = (family_without(tiny_model, (), missing) for missing in ("zeros", "absent"))
    one, other = zeros.sample(latents, sigma, text), absent.sample(latents, sigma, text)
    assert one.shape == other.shape
    assert all(torch.equal(one.tensors[name], other.tensors[name]) for name in zeros.input_names)
    assert torch.equal(one.tensors["context"], expected_inputs(text, "zeros")[0])
    assert zeros.notes == ()


def test_zeros_for_t5_are_those_of_diffusers(tiny_model: Path) -> None:
    from diffusers import FlowMatchEulerDiscreteScheduler, StableDiffusion3Pipeline
    from transformers import CLIPTokenizer

    pipeline = StableDiffusion3Pipeline(
        transformer=diffusers_network(original_part(tiny_model, "mmdit")),
        vae=None,
        scheduler=FlowMatchEulerDiscreteScheduler(),
        text_encoder=load_encoder(tiny_model, "clip_l"),
        text_encoder_2=load_encoder(tiny_model, "clip_g"),
        text_encoder_3=None,
        tokenizer=CLIPTokenizer.from_pretrained(tiny_model / "tokenizer"),
        tokenizer_2=CLIPTokenizer.from_pretrained(tiny_model / "tokenizer_2"),
        tokenizer_3=None,
    )
    caption = "a photo of a red fox"
    with torch.no_grad():
        context, _, pooled, _ = pipeline.encode_prompt(
            caption, None, None, device=CPU, do_classifier_free_guidance=False, max_sequence_length=T5_TOKENS
        )
    family = family_without(tiny_model, ("t5xxl",), "zeros", clip_max_token_length=77)
    text = {
        f"{encoder.name}.{key}": value[None]
        for encoder in family.text_encoders
        for key, value in encoder.load(CPU)([caption])[0].items()
    }
    inputs = family.sample(torch.zeros(1, 16, 4, 4), torch.tensor([0.5]), text).tensors
    assert context.shape == (1, 77 + T5_TOKENS, CONTEXT_DIM)
    assert torch.equal(inputs["context"], context)
    assert torch.equal(inputs["pooled"], pooled)


def test_encoder_that_is_off_needs_no_files(tiny_model: Path, tmp_path: Path) -> None:
    for name in ("mmdit.safetensors", "vae", "text_encoder_2", "tokenizer_2"):
        (tmp_path / name).symlink_to(tiny_model / name)
    assert len(SD3Family.from_files(settings_for(tmp_path, clip_l=False, t5xxl=False)).text_encoders) == 1


def test_all_encoders_off_is_refused(tiny_model: Path) -> None:
    with pytest.raises(ModelFilesError) as caught:
        SD3Family.from_files(settings_for(tiny_model, clip_l=False, clip_g=False, t5xxl=False))
    ((key, text),) = caught.value.errors
    assert key == "clip_l"
    assert "all three text encoders are off" in text
    assert "clip_l, clip_g, t5xxl" in text
