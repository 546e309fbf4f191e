"""The `[eval]` table."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from pydantic import Field, model_validator

from utils.config.schema.base import Bool, Int, Table, TrainedWeights

HOLDOUT = "holdout"
"""Name of the evaluation set that `holdout_images` takes from the training set."""


class EvalSetConfig(Table):
    """An evaluation set: images that are not trained on."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9_-]+$")] = Field(
        description="Name of the set in tables and curves: letters, digits, `_` and `-`. Unique, and not `holdout`."
    )
    dataset: Path = Field(description="Dataset file of the set.")


class EvalConfig(Table):
    """Measures the mean squared error of the velocity on images that are not trained on. At least one of `sets` and
    `holdout_images` is required."""

    sets: list[EvalSetConfig] = Field(
        default_factory=list, description="Evaluation sets with their own dataset files: captioned images not in `dataset`."
    )
    holdout_images: Int = Field(
        0,
        ge=0,
        description="Number of images that are excluded from training and evaluated instead, chosen from `dataset` by "
        "`seed`.",
    )
    every_n_steps: Int | None = Field(
        None,
        ge=1,
        description="Steps between evaluations. There is always one before the first step and one after the last. Unset: "
        "only these two.",
    )
    num_t_bands: Int = Field(
        4,
        ge=1,
        description="Number of equal timestep bins in t from 0 to 1. Each image is evaluated once in each bin, with its own "
        "t and noise.",
    )
    batch_size: Int = Field(4, ge=1, description="Number of images that pass through a stage at once.")
    weights: TrainedWeights = Field(
        "last", description="Weights to evaluate. `last`: the current ones. `ema`: their moving average; requires `[ema]`."
    )
    keep_best: Bool = Field(
        False,
        description="Export the weights with the lowest mean loss of all evaluations so far, to the folder `best` of the "
        "run.",
    )

    @model_validator(mode="after")
    def _has_images(self) -> EvalConfig:
        if not self.sets and not self.holdout_images:
            raise ValueError("has no images; set holdout_images, such as holdout_images = 16, or add sets")
        names = [entry.name for entry in self.sets]
        if len(set(names)) < len(names) or HOLDOUT in names:
            raise ValueError(f"each set needs a unique name other than {HOLDOUT!r}")
        return self
