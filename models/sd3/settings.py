"""The `[model]` table of an experiment when `type = "sd3"`."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import torch
from pydantic import BaseModel, ConfigDict, Field

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


class SD3Settings(BaseModel):
    """Which Stable Diffusion 3 or 3.5 to train, and how its captions are encoded."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    type: Literal["sd3"] = Field(description="Model family.")
    mmdit: Path = Field(
        description="The network: a safetensors file with native keys, with or without the prefix "
        "`model.diffusion_model.`. SD3-medium, SD3.5-medium or SD3.5-large is told from the shapes."
    )
    vae: Path = Field(description="The autoencoder: a diffusers folder (config.json and safetensors).")
    clip_l: Path = Field(
        description="CLIP-L: a transformers folder. Its tokenizer is looked for there, then in `tokenizer` beside it."
    )
    clip_g: Path = Field(
        description="CLIP-G: a transformers folder. Its tokenizer is looked for there, then in `tokenizer_2` beside it."
    )
    t5xxl: Path = Field(
        description="T5-XXL encoder: a transformers folder. Its tokenizer is looked for there, then in `tokenizer_3` "
        "beside it."
    )
    dtype: Literal["float32", "bfloat16"] = Field(
        "bfloat16",
        description="Precision of the network and the text encoders. The optimizer keeps float32 weights of its own; "
        "the autoencoder always runs in float32.",
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

    @property
    def torch_dtype(self) -> torch.dtype:
        return DTYPES[self.dtype]

    @property
    def context_length(self) -> int:
        """Text tokens the network reads: CLIP's, then T5's."""
        return self.clip_max_token_length + self.t5xxl_max_token_length
