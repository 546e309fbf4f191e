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
_IN_MMDIT = "Unset: the one inside `mmdit`. false: train without it."
_TOKENIZER = "a folder, or `owner/name` of a model hub. Unset: the encoder's folder, then {folder} next to it, then {hub}."


@dataclass(frozen=True)
class TextTokens:
    """The number of text tokens in the network's context: those of the two CLIPs, then those of T5."""

    clip: int
    t5xxl: int

    @property
    def total(self) -> int:
        return self.clip + self.t5xxl


class MergedAdapter(BaseModel):
    """An adapter that is merged into the network's weights before training."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    path: Path = Field(description="LoRA, DoRA or LoKr file with native or diffusers keys.")
    strength: Annotated[float, Strict()] = Field(
        1.0, description="1 merges the adapter as trained, 0 does not change the weights."
    )


class SD3Settings(BaseModel):
    """The Stable Diffusion 3 or 3.5 network to train, and how its captions are encoded."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    type: Literal["sd3"] = Field(description="Model family.")
    mmdit: Path = Field(
        description="The network: a safetensors file with native keys, or a diffusers folder (`transformer`, or that "
        "of the whole pipeline). SD3-medium, SD3.5-medium and SD3.5-large are recognized by their tensor shapes."
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
        description="Precision of the network and the text encoders, independent of their files. The optimizer keeps "
        "float32 weights of its own; the autoencoder always runs in float32.",
    )
    clip_max_token_length: int = Field(77, strict=True, ge=3, le=77, description="Tokens per caption in CLIP-L and CLIP-G.")
    t5xxl_max_token_length: int = Field(
        256,
        strict=True,
        ge=1,
        le=512,
        description="Tokens per caption in T5. Padding is not masked, so use the same length at inference.",
    )
    missing_encoders: Literal["zeros", "absent"] = Field(
        "zeros",
        description="Replacement for the tokens of T5, or of both CLIPs, when they are off: `zeros` (diffusers; sd-scripts "
        "with 77 as T5's length) or no tokens (`absent`, ComfyUI). A single CLIP that is off is always replaced by zeros.",
    )
    merge_adapters: tuple[MergedAdapter, ...] = Field(
        (), description="Adapters that are merged into the network before training starts, in this order."
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
