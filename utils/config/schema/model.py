"""The `[model]` table, whose fields each model family defines."""

from __future__ import annotations

from pydantic import Field, create_model

import models
from utils.config.schema.experiment import ExperimentConfig


def experiment_class(family: str) -> type[ExperimentConfig]:
    """Returns ExperimentConfig with the `[model]` table of a model family. Raises KeyError for an unknown family."""
    field = (models.settings_class(family), Field(description="The network and its encoders."))
    return create_model("ExperimentConfig", __base__=ExperimentConfig, model=field)
