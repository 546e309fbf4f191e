"""The `[eval]` table."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from pydantic import Field, model_validator

from utils.config.schema.base import Bool, Int, Table, TrainedWeights

HOLDOUT = "holdout"
"""Name of the evaluation set taken from the dataset."""


class EvalSetConfig(Table):
    """Images that are not trained on."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9_-]+$")] = Field(description="For tables and curves.")
    dataset: Path = Field(description="A dataset file.")


class EvalConfig(Table):
    """Measure the velocity's error on held-out images: at the start, now and then, and at the end."""

    sets: list[EvalSetConfig] = Field(default_factory=list, description="Held-out images with captions, from elsewhere.")
    holdout_images: Int = Field(
        0, ge=0, description="Images kept out of training for this, chosen by `seed` from the dataset."
    )
    every_n_steps: Int | None = Field(
        None, ge=1, description="Steps between evaluations. Unset: only before the first and after the last."
    )
    num_t_bands: Int = Field(
        4, ge=1, description="Equal parts of t; each image is measured once in each, at a time and with noise of its own."
    )
    batch_size: Int = Field(4, ge=1, description="Images that go through a stage at once.")
    weights: TrainedWeights = Field("last", description="`last`: as they are in training. `ema`: their average, of `[ema]`.")
    keep_best: Bool = Field(False, description="Export the weights of the lowest mean loss so far, to `best` in the run.")

    @model_validator(mode="after")
    def _has_images(self) -> EvalConfig:
        if not self.sets and not self.holdout_images:
            raise ValueError("names no images: give holdout_images = 16, say, or sets of other images")
        names = [entry.name for entry in self.sets]
        if len(set(names)) < len(names) or HOLDOUT in names:
            raise ValueError(f"each set needs a name of its own, other than {HOLDOUT!r}")
        return self
