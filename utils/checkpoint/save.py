"""Training state on disk: everything needed to go on as if the run had never stopped.

A checkpoint is a folder `step_000100` with one safetensors file for each layer (float32 weights and optimizer state of
what is trained, by parameter name) and `state.json`. Each stage writes its own layers beside the final place; rank 0 gives
the folder its name when all are on the disk. So a folder with that name is whole, and no layout is written into it.
No random state is saved: there is none (randomness.py).
"""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

from utils.distributed import group
from utils.distributed.world import world
from utils.files.atomic import remove_folder, replace_file, sync_folder, write_text
from utils.pipeline.engine import Pipeline
from utils.pipeline.optimizer_state import MASTER
from utils.pipeline.stage import LocalLayer

FORMAT_VERSION = 2
NETWORK_FILES = "network files"
"""The entry of a run's identity that is a hash, which would tell nobody anything."""
_SEPARATOR = "//"
"""Between a parameter's name and its state's."""
_FOLDER_NAME = re.compile(r"step_(\d+)")


class CheckpointError(ValueError):
    """A checkpoint that this run cannot go on from, and why."""


@dataclass(frozen=True)
class SavedState:
    """A complete checkpoint on disk."""

    folder: Path
    step: int
    """Optimizer steps done."""
    identity: dict[str, Any]
    """What must be the same in the run that goes on from it."""


def step_folder(parent: Path, step: int) -> Path:
    return parent / f"step_{step:06d}"


def find_checkpoints(parent: Path) -> list[SavedState]:
    """Every complete checkpoint of a run, oldest first. Raises CheckpointError for one that cannot be understood."""
    found = []
    for folder in parent.glob("step_*"):
        if _FOLDER_NAME.fullmatch(folder.name) and (folder / "state.json").is_file():
            found.append(_read_saved(folder))
    return sorted(found, key=lambda saved: saved.step)


def _read_saved(folder: Path) -> SavedState:
    try:
        state = json.loads((folder / "state.json").read_text(encoding="utf-8"))
        if state["format"] != FORMAT_VERSION:
            raise CheckpointError(f"{folder} has format {state['format']}, this program reads {FORMAT_VERSION}")
        return SavedState(folder, state["step"], state["identity"])
    except (ValueError, KeyError, TypeError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(f"{folder / 'state.json'} is damaged ({error!r}); delete {folder}") from error


def identity_errors(saved: SavedState, identity: dict[str, Any]) -> list[str]:
    """Why a run of `identity` cannot go on from a checkpoint, one line for each difference."""
    different = [key for key, value in identity.items() if saved.identity.get(key) != value]
    return [
        (
            f"the network's weights file is another than the one {saved.folder} was trained from"
            if key == NETWORK_FILES
            else f"{key} was {saved.identity.get(key)!r} in {saved.folder} and is {identity[key]!r} now"
        )
        + "; going on would be another training"
        for key in different
    ]


# --- saving ------------------------------------------------------------------------------------------------------------


def save(pipeline: Pipeline, parent: Path, step: int, identity: dict[str, Any], keep_last: int) -> None:
    """Write the state after `step` optimizer steps, then delete all but the last `keep_last`. All ranks together."""
    final = step_folder(parent, step)
    temporary = parent / f".{final.name}.tmp"
    here = world()
    if here.is_main:
        for left_over in parent.glob(".step_*"):
            shutil.rmtree(left_over)
        temporary.mkdir(parents=True)
    group.wait_for_all(f"checkpoint {step} begins")
    for layer in pipeline.local_layers():
        tensors = _layer_tensors(pipeline, layer)
        if tensors and pipeline.replica == 0:
            path = temporary / _layer_file(layer.index)
            partial = path.with_suffix(".partial")
            save_file(tensors, partial)
            replace_file(partial, path)
    group.wait_for_all(f"checkpoint {step} written")
    if here.is_main:
        state = {"format": FORMAT_VERSION, "step": step, "identity": identity}
        write_text(temporary / "state.json", json.dumps(state, indent=1))
        if final.exists():
            remove_folder(final)
        temporary.replace(final)
        sync_folder(parent)
        for old in find_checkpoints(parent)[:-keep_last]:
            remove_folder(old.folder)
    group.wait_for_all(f"checkpoint {step} named")


def _layer_file(index: int) -> str:
    return f"layer_{index:03d}.safetensors"


def _layer_tensors(pipeline: Pipeline, layer: LocalLayer) -> dict[str, torch.Tensor]:
    tensors = {}
    for name, parameter in layer.trainable().items():
        state = pipeline.read_state(parameter)
        if not state[MASTER].isfinite().all():
            raise FloatingPointError(f"{layer.layer.prefix}{name} has weights that are no numbers; nothing was saved")
        for state_name, value in state.items():
            tensors[f"{name}{_SEPARATOR}{state_name}"] = value.contiguous()
    return tensors


# --- loading -----------------------------------------------------------------------------------------------------------


def load(pipeline: Pipeline, saved: SavedState) -> None:
    """Give every layer of this rank its saved state, reading no other layer's. All ranks together.

    Raises CheckpointError when the files do not hold what this run trains.
    """
    states: dict[nn.Parameter, dict[str, torch.Tensor]] = {}
    for layer in pipeline.local_layers():
        states.update(_read_layer(saved.folder, layer))
    pipeline.write_states(states)


def _read_layer(folder: Path, layer: LocalLayer) -> dict[nn.Parameter, dict[str, torch.Tensor]]:
    parameters = layer.trainable()
    if not parameters:
        return {}
    path = folder / _layer_file(layer.index)
    if not path.is_file():
        raise CheckpointError(f"{path} is missing")
    states: dict[nn.Parameter, dict[str, torch.Tensor]] = {parameter: {} for parameter in parameters.values()}
    with safe_open(path, "pt") as file:
        names = list(file.keys())
        saved_parameters = {name.split(_SEPARATOR)[0] for name in names}
        if saved_parameters != set(parameters):
            different = sorted(saved_parameters ^ set(parameters))
            raise CheckpointError(f"{path} holds other parameters than are trained now, such as {different[0]}")
        for name in names:
            parameter_name, state_name = name.split(_SEPARATOR)
            states[parameters[parameter_name]][state_name] = file.get_tensor(name)
    return states
