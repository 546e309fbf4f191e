"""The run folder: creating it, finding it again, and what a run must share with it to resume.

A run folder holds the resolved configuration. Its `config.toml` is written last, so a folder that has one is complete.
"""

from __future__ import annotations

import hashlib
import time
import tomllib
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from models.family import ModelFamily
from utils.checkpoint.manifest import (
    BUCKET_GROUP,
    GLOBAL_BATCH,
    MASTER_KIND,
    NETWORK_FILES,
    CheckpointError,
    SavedState,
    find_checkpoints,
    identity_errors,
)
from utils.config.load import Config, ConfigError, ErrorDetail, dump_toml
from utils.config.schema.optimizer import MasterKind
from utils.files.atomic import write_text
from utils.optim.registry import canonical_name
from utils.trainable.base import Trainable

CHECKPOINTS = "checkpoints"
WEIGHTS = "weights"
BEST_WEIGHTS = "best"
SAMPLES = "samples"
_SAMPLE_BYTES = 4 * 2**20


# --- creating ----------------------------------------------------------------------------------------------------------


def create_run_folder(config: Config, resume_run: Path | None) -> Path:
    """Creates the folder of a new run, named after the time, or takes `resume_run`; writes the configuration into it.

    Called by rank 0 alone.
    """
    folder = resume_run
    if folder is None:
        folder = config.experiment.output_dir / time.strftime("%Y-%m-%d_%H-%M-%S")
        while folder.exists():
            folder = folder.with_name(folder.name + "_")
    folder.mkdir(parents=True, exist_ok=True)
    for name, table in reversed(run_files(config).items()):
        write_text(folder / name, dump_toml(table))
    return folder


def run_files(config: Config) -> dict[str, BaseModel]:
    """The configuration files of a run folder: file name -> table; config.toml comes first."""
    sets = {f"eval_{name}.toml": table for name, table in config.eval_sets.items()}
    return {"config.toml": config.experiment, "dataset.toml": config.dataset, **sets}


# --- finding -----------------------------------------------------------------------------------------------------------


def newest_run(output_dir: Path) -> Path | None:
    """The run folder with the last name, and so the last start time; None when there is none."""
    runs = sorted(path.parent for path in output_dir.glob("*/config.toml"))
    return runs[-1] if runs else None


def find_run(config: Config, resume: str | None, errors: list[ErrorDetail]) -> Path | None:
    """The run folder to resume in; None for a new run. `resume`: None, "" (the newest run) or a run folder."""
    if resume is None:
        return None
    run = Path(resume) if resume else newest_run(config.experiment.output_dir)
    if run is not None and not (run / "config.toml").is_file():
        errors.append(ErrorDetail(run, "", "is not a run folder: it has no config.toml"))
    return run


def find_checkpoint(config: Config, run: Path | None) -> SavedState | None:
    """The newest checkpoint of the run, if it has one. Raises ConfigError for one that cannot be read."""
    try:
        saved = find_checkpoints(run / CHECKPOINTS) if run is not None else []
    except CheckpointError as error:
        raise ConfigError([ErrorDetail(config.path, "", str(error))]) from error
    return saved[-1] if saved else None


def check_identity(config: Config, saved: SavedState | None, identity: dict[str, Any]) -> None:
    """Raises ConfigError when a run of `identity` cannot resume from the checkpoint."""
    errors = identity_errors(saved, identity) if saved is not None else []
    if errors:
        raise ConfigError([ErrorDetail(config.path, "", text) for text in errors])


# --- comparing ---------------------------------------------------------------------------------------------------------


def run_identity(
    config: Config, family: ModelFamily, trainable: Trainable, global_batch: int, bucket_group: int, master: MasterKind
) -> dict[str, Any]:
    """What a run must share with a checkpoint to resume from it; stored in every checkpoint."""
    experiment = config.experiment
    return {
        "seed": experiment.seed,
        GLOBAL_BATCH: global_batch,
        BUCKET_GROUP: bucket_group,
        "layer list": family.layer_list_version,
        NETWORK_FILES: [sample_hash(path) for path in family.network_files],
        "network settings": family.network_settings,
        **trainable.identity(),
        "optimizer.type": canonical_name(experiment.optimizer.type),
        MASTER_KIND: master,
        "ema": experiment.ema.model_dump(mode="json") if experiment.ema else "none",
    }


def sample_hash(path: Path) -> str:
    """A hash of a file's size, first and last 4 MiB: distinguishes weights files without reading them whole."""
    size = path.stat().st_size
    digest = hashlib.blake2b(str(size).encode(), digest_size=8)
    with path.open("rb") as file:
        digest.update(file.read(_SAMPLE_BYTES))
        file.seek(max(0, size - _SAMPLE_BYTES))
        digest.update(file.read())
    return digest.hexdigest()


def changed_keys(run: Path, config: Config) -> list[str]:
    """One line for each key of the configuration files that differs from the run folder's copy."""
    lines = []
    for name, table in run_files(config).items():
        try:
            before = flatten(tomllib.loads((run / name).read_text(encoding="utf-8")))
        except (OSError, tomllib.TOMLDecodeError):
            continue  # the file is about to be written again
        now = flatten(tomllib.loads(dump_toml(table)))
        for key in sorted(before.keys() | now.keys()):
            if before.get(key) != now.get(key):
                lines.append(f"{key} was {before.get(key, 'unset')!r}, is now {now.get(key, 'unset')!r}")
    return lines


def flatten(table: dict[str, Any], path: str = "") -> dict[str, Any]:
    """{"a": {"b": 1}} -> {"a.b": 1}."""
    flat: dict[str, Any] = {}
    for key, value in table.items():
        flat.update(flatten(value, f"{path}{key}.") if isinstance(value, dict) else {f"{path}{key}": value})
    return flat
