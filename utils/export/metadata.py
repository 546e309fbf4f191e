"""What the header of a public file says: what the weights are, what they were trained from, and as what.

Nothing of where files lie or for whom they were made: of a path its last part, and no table that could hold a secret.
"""

from __future__ import annotations

import functools
import hashlib
import json
import math
from datetime import UTC, datetime
from pathlib import Path

from models.family import ModelFamily
from utils.config.schema.adapter import AdapterConfig
from utils.config.schema.experiment import ExperimentConfig

TRAINING_TABLES = ("seed", "model", "objective", "adapter", "ema", "optimizer", "pipeline")
"""Of the configuration, what made the weights."""


def run_metadata(config: ExperimentConfig, family: ModelFamily, step: int) -> dict[str, str]:
    """Header entries every file carries: what it was trained from and as, and so how to use it."""
    base = [(path.name, file_sha256(path)) for path in family.network_files]
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
    """The settings that made the weights; of a path only its last part, because where files lie is nobody's business."""
    tables = config.model_dump(include=set(TRAINING_TABLES), exclude_none=True)
    return {key: _without_folders(value) for key, value in tables.items()}


def _without_folders(value: object) -> object:
    if isinstance(value, dict):
        return {key: _without_folders(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_without_folders(inner) for inner in value]
    if isinstance(value, str) and (Path(value).is_absolute() or "/" in value or "\\" in value):  # a tokenizer's folder
        return Path(value).name
    return value.name if isinstance(value, Path) else value


def file_sha256(path: Path) -> str:
    """As model sites and sd-scripts name a file; read once as long as it does not change."""
    status = path.stat()
    return _sha256(path, status.st_size, status.st_mtime_ns)


@functools.cache
def _sha256(path: Path, _num_bytes: int, _changed_at: int) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def kohya_metadata(settings: AdapterConfig) -> dict[str, str]:
    """sd-scripts' entries of a native adapter file; programs that sort such files by them read these."""
    has_one_rank = all(target.rank is None for target in settings.targets or [])
    plain = settings.type == "lora" and not settings.dora
    return {
        "ss_network_module": "networks.lora_sd3" if plain else "lycoris.kohya",
        "ss_network_dim": str(settings.rank) if has_one_rank else "Dynamic",
        "ss_network_alpha": str(_native_alpha(settings)),
    }


def _native_alpha(settings: AdapterConfig) -> float:
    """Alpha as native files mean it, where the scale is alpha / rank always."""
    alpha = float(settings.alpha if settings.alpha is not None else settings.rank)
    return alpha * math.sqrt(settings.rank) if settings.rank_stabilized else alpha
