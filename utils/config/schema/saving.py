"""The `[save]` table."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, field_validator

from utils.config.schema.base import Int, Table

ExportDtype = Literal["float32", "bfloat16", "float16"]
ExportFormat = Literal["native", "complete", "diffusers"]


class SaveConfig(Table):
    """Training checkpoints, to go on from, and weights, to use."""

    checkpoint_every_n_steps: Int = Field(500, ge=1, description="Steps between checkpoints; the last step has one too.")
    keep_last: Int = Field(2, ge=1, description="Checkpoints kept; older ones are deleted.")
    export_every_n_steps: Int | None = Field(
        None, ge=1, description="Steps between exports of weights. Unset: only the last."
    )
    formats: list[ExportFormat] | None = Field(
        None,
        min_length=1,
        description="Files an export writes: `native` (keys of the original model; ComfyUI, sd-scripts), `diffusers` (a "
        "folder for from_pretrained; of an adapter, a file for load_lora_weights), `complete` (one native file with the "
        "autoencoder and the text encoders; full training only). Default: `native`, and for a LoRA `diffusers` too.",
    )
    dtype: ExportDtype = Field("bfloat16", description="Precision of exported weights.")

    @field_validator("formats")
    @classmethod
    def _each_once(cls, value: list[ExportFormat] | None) -> list[ExportFormat] | None:
        if value is not None and len(set(value)) < len(value):
            raise ValueError("each format once")
        return value
