"""Saves training checkpoints: everything needed to resume exactly. manifest.py describes the files."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from utils.checkpoint.manifest import STATE_FILE, find_checkpoints, layer_file, state_text, step_folder
from utils.distributed import group
from utils.distributed.world import world
from utils.files.atomic import remove_folder, replace_file, sync_folder, write_text
from utils.pipeline.engine import Pipeline
from utils.pipeline.optimizer_step import MASTER
from utils.pipeline.stage import LocalLayer

SEPARATOR = "//"
"""Between the name of a parameter and the name of a state tensor."""


def save(
    pipeline: Pipeline,
    parent: Path,
    step: int,
    identity: dict[str, Any],
    keep_last: int,
    events: Mapping[str, dict[str, Any]] | None = None,
) -> None:
    """Saves the state after `step` optimizer steps, then deletes all but the last `keep_last`. All ranks together.

    `events`: name -> state of the run's events. Raises FloatingPointError on non-finite weights; nothing is saved then.
    """
    final = step_folder(parent, step)
    temporary = parent / f".{final.name}.tmp"
    is_main = world().is_main
    if is_main:
        for leftover in parent.glob(".step_*"):
            shutil.rmtree(leftover)
        temporary.mkdir(parents=True)
    group.wait_for_all(f"checkpoint {step} starts")
    for layer in pipeline.local_layers():
        tensors = _layer_tensors(pipeline, layer)
        if tensors and pipeline.replica == 0:
            path = temporary / layer_file(layer.index)
            partial = path.with_suffix(".partial")
            save_file(tensors, partial)
            replace_file(partial, path)
    group.wait_for_all(f"checkpoint {step} written")
    if is_main:
        write_text(temporary / STATE_FILE, state_text(step, identity, events or {}))
        if final.exists():
            remove_folder(final)
        temporary.replace(final)
        sync_folder(parent)
        for old in find_checkpoints(parent)[:-keep_last]:
            remove_folder(old.folder)
    group.wait_for_all(f"checkpoint {step} renamed")


def _layer_tensors(pipeline: Pipeline, layer: LocalLayer) -> dict[str, Tensor]:
    tensors = {}
    for name, parameter in layer.trainable().items():
        state = pipeline.read_state(parameter)
        if not state[MASTER].isfinite().all():
            raise FloatingPointError(f"{layer.layer.prefix}{name} has non-finite weights; no checkpoint was saved")
        for state_name, value in state.items():
            tensors[f"{name}{SEPARATOR}{state_name}"] = value.contiguous()
    return tensors
