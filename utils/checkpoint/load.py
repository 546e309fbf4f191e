"""Loads training checkpoints into a pipeline with any number of stages and replicas."""

from __future__ import annotations

from pathlib import Path

from safetensors import safe_open
from torch import Tensor, nn

from utils.checkpoint.manifest import CheckpointError, SavedState, layer_file
from utils.checkpoint.save import SEPARATOR
from utils.pipeline.engine import Pipeline
from utils.pipeline.stage import LocalLayer


def load(pipeline: Pipeline, saved: SavedState) -> None:
    """Gives every layer of this rank its saved state; reads no other layer's files. All ranks together.

    Raises CheckpointError when the files do not hold what this run trains.
    """
    states: dict[nn.Parameter, dict[str, Tensor]] = {}
    for layer in pipeline.local_layers():
        states.update(_read_layer(saved.folder, layer))
    pipeline.write_states(states)


def _read_layer(folder: Path, layer: LocalLayer) -> dict[nn.Parameter, dict[str, Tensor]]:
    parameters = layer.trainable()
    if not parameters:
        return {}
    path = folder / layer_file(layer.index)
    if not path.is_file():
        raise CheckpointError(f"{path} is missing")
    states: dict[nn.Parameter, dict[str, Tensor]] = {parameter: {} for parameter in parameters.values()}
    with safe_open(path, "pt") as file:
        names = list(file.keys())
        saved_parameters = {name.split(SEPARATOR)[0] for name in names}
        if saved_parameters != set(parameters):
            different = sorted(saved_parameters ^ set(parameters))
            raise CheckpointError(
                f"{path} does not have the parameters that are trained now; one difference: {different[0]}"
            )
        for name in names:
            parameter_name, state_name = name.split(SEPARATOR)
            states[parameters[parameter_name]][state_name] = file.get_tensor(name)
    return states
