"""Which checkpoints a run has, and whether a run may resume from one.

A checkpoint is a folder such as `step_000100` with one safetensors file for each layer (float32 weights and optimizer state
of what is trained, by parameter name) and `state.json`. The folder is written under a temporary name and renamed once it is
complete. Nothing in it depends on the number of stages or replicas. It has no random state: every random draw is a function
of the seed and the step (utils/randomness.py).
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

FORMAT_VERSION = 2
STATE_FILE = "state.json"
NETWORK_FILES = "network files"
"""The entry of a run's identity that holds hashes, which no message should show."""
GLOBAL_BATCH, BUCKET_GROUP, MASTER_KIND = "global batch", "pipeline.bucket_group", "optimizer.master"
_FOLDER_NAME = re.compile(r"step_(\d+)")


class CheckpointError(ValueError):
    """A checkpoint that a run cannot resume from, and the reason."""


@dataclass(frozen=True)
class SavedState:
    """A complete checkpoint on disk."""

    folder: Path
    step: int
    """Optimizer steps done."""
    identity: dict[str, Any]
    """What a run must share with the checkpoint to resume from it."""
    events: Mapping[str, dict[str, Any]] = field(default_factory=dict)
    """Name -> state of the run's events; empty in checkpoints of versions that had none."""


def step_folder(parent: Path, step: int) -> Path:
    """The folder of a step in a folder of checkpoints or exports."""
    return parent / f"step_{step:06d}"


def layer_file(index: int) -> str:
    """The name of the file with the state of a layer."""
    return f"layer_{index:03d}.safetensors"


def find_checkpoints(parent: Path) -> list[SavedState]:
    """Every complete checkpoint of a run, oldest first. Raises CheckpointError for one that cannot be read."""
    found = []
    for folder in parent.glob("step_*"):
        if _FOLDER_NAME.fullmatch(folder.name) and (folder / STATE_FILE).is_file():
            found.append(_read_state(folder))
    return sorted(found, key=lambda saved: saved.step)


def _read_state(folder: Path) -> SavedState:
    path = folder / STATE_FILE
    try:
        state = json.loads(path.read_text(encoding="utf-8"))
        if state["format"] != FORMAT_VERSION:
            raise CheckpointError(f"{folder} has format {state['format']}; this version reads format {FORMAT_VERSION}")
        identity = state["identity"]
        # Earlier versions had one bucket per global batch, kept float32 weights, and had no entries for these.
        identity.setdefault(BUCKET_GROUP, identity[GLOBAL_BATCH])
        identity.setdefault(MASTER_KIND, "float32")
        return SavedState(folder, state["step"], identity, state.get("events", {}))
    except (ValueError, KeyError, TypeError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(f"{path} is damaged ({error!r}); delete {folder}") from error


def state_text(step: int, identity: Mapping[str, Any], events: Mapping[str, dict[str, Any]]) -> str:
    """The content of state.json."""
    return json.dumps({"format": FORMAT_VERSION, "step": step, "identity": identity, "events": events}, indent=1)


def identity_errors(saved: SavedState, identity: dict[str, Any]) -> list[str]:
    """Why a run of `identity` cannot resume from a checkpoint: one line for each difference."""
    # Some entries, such as parameter groups, are present only if they are configured: compare those of either side.
    different = [key for key in {**identity, **saved.identity} if saved.identity.get(key) != identity.get(key)]
    return [
        (
            f"the weights file of the network is not the one that {saved.folder} was trained from"
            if key == NETWORK_FILES
            else f"{key} was {_shown(saved.identity, key)} in {saved.folder} and is {_shown(identity, key)} now"
        )
        + "; resuming would be a different training"
        for key in different
    ]


def _shown(identity: Mapping[str, Any], key: str) -> str:
    return repr(identity[key]) if key in identity else "not set"
