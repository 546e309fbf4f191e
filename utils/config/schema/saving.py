"""The `[save]` table."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, field_validator

from utils.config.schema.base import Int, Table

ExportDtype = Literal["float32", "bfloat16", "float16"]
ExportFormat = Literal["native", "complete", "diffusers"]


class SaveConfig(Table):
    """Training checkpoints, from which a run resumes, and exported weights, for use in other programs."""

    checkpoint_every_n_steps: Int = Field(500, ge=1, description="Steps between checkpoints. The last step always has one.")
    keep_last: Int = Field(2, ge=1, description="Number of newest checkpoints to keep; older ones are deleted.")
    export_every_n_steps: Int | None = Field(
        None, ge=1, description="Steps between exports of weights. The last step always has one. Unset: only the last step."
    )
    formats: list[ExportFormat] | None = Field(
        None,
        min_length=1,
        description="Files of each export. `native`: one file with the original keys (ComfyUI; for adapters sd-scripts "
        "too). `diffusers`: a folder for `from_pretrained`; for an adapter, a file for `load_lora_weights`. `complete`: one "
        "native file that includes the autoencoder and the text encoders; for full training only. Default: `native`, for a "
        "LoRA also `diffusers`.",
    )
    dtype: ExportDtype = Field("bfloat16", description="Precision of exported weights.")

    @field_validator("formats")
    @classmethod
    def _each_once(cls, value: list[ExportFormat] | None) -> list[ExportFormat] | None:
        if value is not None and len(set(value)) < len(value):
            raise ValueError("must not name a format twice")
        return value
