"""Chooses the Trainable of a run: every weight, or the adapters of the `[adapter]` table.

The only file that tests whether the configuration has that table.
"""

from __future__ import annotations

from models.family import LoraFile, ModelFamily, ModelFilesError
from utils.config.schema.adapter import AdapterConfig
from utils.config.schema.experiment import ExperimentConfig
from utils.trainable.base import ErrorList, Trainable
from utils.trainable.full import FullTraining
from utils.trainable.groups import group_errors
from utils.trainable.initial_weights import initial_file_errors
from utils.trainable.lora import LoraTraining
from utils.trainable.targets import choose_modules


def make_trainable(config: ExperimentConfig, family: ModelFamily) -> tuple[Trainable, ErrorList]:
    """Returns what the configuration trains, and its errors; it can be used only if there are none.

    Reads no weights, only the header of the file with an adapter's initial weights.
    """
    trainable: Trainable
    if config.adapter is None:
        trainable, errors = FullTraining(family, config.optimizer), ErrorList()
    else:
        trainable, errors = _make_lora(config.adapter, config, family)
    ratio = config.optimizer.loraplus_lr_ratio
    if ratio is not None and (config.adapter is None or config.adapter.type != "lora"):
        trained = "the whole network is trained" if config.adapter is None else f"a {config.adapter.type} has no up matrices"
        text = f'= {ratio}: is for adapter.type = "lora" only, and {trained}; remove the key'
        errors = [*errors, ("optimizer.loraplus_lr_ratio", text)]
    if not errors:
        names = [name for layer in family.layers for name in trainable.parameter_sizes(layer)]
        errors = group_errors(names, config.optimizer)
    return trainable, errors


def _make_lora(settings: AdapterConfig, config: ExperimentConfig, family: ModelFamily) -> tuple[LoraTraining, ErrorList]:
    targets, target_errors = choose_modules(settings, family)
    file, errors = _open_initial_file(settings, family)
    if file is not None and not target_errors:
        texts = initial_file_errors(file, targets, settings, family)
        errors += [("adapter.init_from", f"{file.path} {text}") for text in texts]
    trainable = LoraTraining(settings, targets, file, family, config.optimizer, config.seed)
    return trainable, target_errors + errors


def _open_initial_file(settings: AdapterConfig, family: ModelFamily) -> tuple[LoraFile | None, ErrorList]:
    """Returns the file with the initial weights; None if none is configured or it cannot be read."""
    if settings.init_from is None:
        return None, []
    try:
        return family.open_lora_file(settings.init_from), []
    except ModelFilesError as error:
        return None, [("adapter.init_from", text) for _, text in error.errors]
