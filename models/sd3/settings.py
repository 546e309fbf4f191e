"""The `[model]` table of an experiment when `type = "sd3"`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import torch
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, Strict

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def _path_or_off(value: object) -> object:
    if value is None or value is False or (isinstance(value, str | Path) and value != ""):
        return value
    raise ValueError("must be a path, or false to train without it")


EncoderPath = Annotated[Path | Literal[False] | None, BeforeValidator(_path_or_off)]
_IN_MMDIT = "Unset: the one inside `mmdit`. false: trained without it."
_TOKENIZER = "a folder, or `owner/name` of a model hub. Unset: the encoder's folder, then {folder} beside it, then {hub}."


@dataclass(frozen=True)
class TextTokens:
    """The number of text tokens in the network's context: those of the two CLIPs, then those of T5."""

    clip: int
    t5xxl: int

    @property
    def total(self) -> int:
        return self.clip + self.t5xxl


class MergedAdapter(BaseModel):
    """An adapter added to the network's weights before training."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    path: Path = Field(description="LoRA, DoRA or LoKr file with native or diffusers keys.")
    strength: Annotated[float, Strict()] = Field(1.0, description="1 is the adapter as trained, 0 none of it.")


class SD3Settings(BaseModel):
    """Which Stable Diffusion 3 or 3.5 to train, and how its captions are encoded."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    type: Literal["sd3"] = Field(description="Model family.")
    mmdit: Path = Field(
        description="The network: a safetensors file with native keys, or a folder as diffusers has it (`transformer`, or "
        "that of the whole pipeline). SD3-medium, SD3.5-medium or SD3.5-large is told from the shapes."
    )
    vae: Path | None = Field(
        None,
        description="The autoencoder: a diffusers folder, or a safetensors file with native keys. "
        "Unset: the one inside `mmdit`.",
    )
    clip_l: EncoderPath = Field(None, description=f"CLIP-L: a transformers folder or a safetensors file. {_IN_MMDIT}")
    clip_g: EncoderPath = Field(None, description=f"CLIP-G: a transformers folder or a safetensors file. {_IN_MMDIT}")
    t5xxl: EncoderPath = Field(None, description=f"T5-XXL encoder: a transformers folder or a safetensors file. {_IN_MMDIT}")
    clip_l_tokenizer: str | None = Field(
        None,
        min_length=1,
        description="CLIP-L's tokenizer: " + _TOKENIZER.format(folder="`tokenizer`", hub="openai/clip-vit-large-patch14"),
    )
    clip_g_tokenizer: str | None = Field(
        None,
        min_length=1,
        description="CLIP-G's tokenizer: "
        + _TOKENIZER.format(folder="`tokenizer_2`", hub="laion/CLIP-ViT-bigG-14-laion2B-39B-b160k"),
    )
    t5xxl_tokenizer: str | None = Field(
        None,
        min_length=1,
        description="T5's tokenizer: " + _TOKENIZER.format(folder="`tokenizer_3`", hub="google/t5-v1_1-xxl"),
    )
    dtype: Literal["float32", "bfloat16"] = Field(
        "bfloat16",
        description="Precision of the network and the text encoders, whatever their files have. The optimizer keeps "
        "float32 weights of its own; the autoencoder always runs in float32.",
    )
    clip_max_token_length: int = Field(
        77, strict=True, ge=3, le=77, description="Tokens a caption takes in CLIP-L and CLIP-G."
    )
    t5xxl_max_token_length: int = Field(
        256,
        strict=True,
        ge=1,
        le=512,
        description="Tokens a caption takes in T5. Padding is not masked, so use at inference what you trained with.",
    )
    missing_encoders: Literal["zeros", "absent"] = Field(
        "zeros",
        description="What stands for T5, or for both CLIPs, when off: `zeros` for each of their tokens (diffusers; "
        "sd-scripts with 77 for T5's length) or nothing (`absent`, ComfyUI). One CLIP that is off is zeros beside the other "
        "in every program.",
    )
    merge_adapters: tuple[MergedAdapter, ...] = Field(
        (), description="Adapters that become part of the network before training starts, in this order."
    )

    @property
    def torch_dtype(self) -> torch.dtype:
        return DTYPES[self.dtype]

    @property
    def text_tokens(self) -> TextTokens:
        """The number of text tokens that the network reads."""
        clips_off = self.clip_l is False and self.clip_g is False
        is_absent = self.missing_encoders == "absent"
        return TextTokens(
            clip=0 if clips_off and is_absent else self.clip_max_token_length,
            t5xxl=0 if self.t5xxl is False and is_absent else self.t5xxl_max_token_length,
        )
