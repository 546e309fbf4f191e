"""Header entries of exported files: step, base weights, objective and settings of the training.

No location and no name of a user is written: paths are reduced to their last part, and only the tables that define the
training are included, none of which can hold a secret.
"""

from __future__ import annotations

import json
from datetime import UTC, datetime
from pathlib import Path

from models.family import ModelFamily
from utils.config.schema.experiment import ExperimentConfig
from utils.files.file_index import FileIndex

TRAINING_TABLES = ("seed", "model", "objective", "adapter", "ema", "optimizer", "pipeline")
"""Keys and tables of the configuration that define the training."""


def run_metadata(config: ExperimentConfig, family: ModelFamily, step: int, files: FileIndex) -> dict[str, str]:
    """The header entries of every exported file; model sites and sd-scripts identify the base weights by their SHA-256."""
    base = [(path.name, files.hash_of(path, "sha256")) for path in family.network_files]
    first_name, first_hash = base[0]
    token_lengths = {key: value for key, value in config.model.model_dump().items() if key.endswith("token_length")}
    return {
        "modelspec.sai_model_spec": "1.0.1",
        "modelspec.title": config.output_dir.name,
        "modelspec.date": datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
        "ss_sd_model_name": first_name,
        "ss_new_sd_model_hash": first_hash,
        "mmdit_pipe.base_sha256": json.dumps(base),
        "mmdit_pipe.step": str(step),
        "mmdit_pipe.seed": str(config.seed),
        "mmdit_pipe.objective": config.objective.model_dump_json(),
        "mmdit_pipe.discrete_flow_shift": str(config.objective.discrete_flow_shift),
        "mmdit_pipe.text_tokens": json.dumps(token_lengths),
        "mmdit_pipe.training_config": json.dumps(training_config(config)),
    }


def training_config(config: ExperimentConfig) -> dict[str, object]:
    """The settings that define the training, with paths reduced to their last part."""
    tables = config.model_dump(include=set(TRAINING_TABLES), exclude_none=True)
    return {key: _without_folders(value) for key, value in tables.items()}


def _without_folders(value: object) -> object:
    if isinstance(value, dict):
        return {key: _without_folders(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_without_folders(inner) for inner in value]
    if isinstance(value, str) and (Path(value).is_absolute() or "/" in value or "\\" in value):  # the folder of a tokenizer
        return Path(value).name
    return value.name if isinstance(value, Path) else value
