"""Validates a run completely before any process group is created.

Each rank checks for itself and comes to the same result; nothing here communicates. The only files written are rank 0's:
the file index of the dataset's folders, and the list of bad files of a run that is refused.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from models import family_class
from models.family import ModelFamily, ModelFilesError
from utils.checkpoint.manifest import MASTER_KIND, SavedState
from utils.config.load import Config, ConfigError, ErrorDetail, load_config, located
from utils.config.schema.optimizer import MasterKind
from utils.data.dataset import directory_errors
from utils.distributed.world import World
from utils.export.weights import export_formats
from utils.objective.validation import objective_errors
from utils.optim.group_checks import group_key_errors
from utils.optim.registry import find, is_separable, optimizer_errors
from utils.previews.prompt_list import Prompt, prompt_errors, read_prompts
from utils.run.batch import bucket_group_error, bucket_group_of, count_replicas
from utils.run.datasets import MAX_BAD_FILES_SHOWN, Datasets, open_datasets
from utils.run.experiment import Experiment
from utils.run.folder import changed_keys, check_identity, find_checkpoint, find_run, run_identity
from utils.run.partition import choose_partition, partition_errors
from utils.trainable.base import Trainable
from utils.trainable.choose import make_trainable


def prepare(
    config_path: Path, overrides: Sequence[str], resume: str | None, world: World, *, check_only: bool = False
) -> Experiment:
    """Reads and checks the whole configuration. Raises ConfigError with every error found.

    `resume`: None, "" (the newest run) or a run folder. `check_only`: one process checks a run of any number of processes
    and writes nothing. Only rank 0 opens the datasets.
    """
    config = load_config(config_path, overrides)
    errors: list[ErrorDetail] = []
    errors += [ErrorDetail(config_path, key, text) for key, text in objective_errors(config.experiment.objective)]
    _check_optimizer(config, world, errors)
    _check_folders(config, errors)
    num_stages = _check_stages(config, world, errors, check_only)
    num_replicas = count_replicas(config.experiment.pipeline, world, num_stages, check_only=check_only)
    _check_bucket_group(config, num_replicas, errors)
    _check_directories(config, errors)
    _check_averages(config, errors)
    prompts = _read_prompts(config, errors)
    family = _open_model(config, errors)
    datasets = Datasets()
    trainable = None
    if family is not None:
        divided = partition_errors(config.experiment.pipeline, family, num_stages)
        errors += [ErrorDetail(config.path, key, text) for key, text in divided]
        trainable = _check_trainable(config, family, errors)
        found = prompt_errors(prompts, config.experiment.sampling, family.latent, family.num_blocks)
        errors += [ErrorDetail(config.path, key, text) for key, text in found]
        _check_encoder_names(config, family, errors)
        if world.is_main:
            datasets = open_datasets(config, family, errors, world, may_write=not check_only and not errors)
    run = find_run(config, resume, errors)
    if errors or family is None or trainable is None:
        raise ConfigError(located(errors, overrides))
    pipeline = config.experiment.pipeline
    global_batch = pipeline.micro_batch_size_per_gpu * pipeline.gradient_accumulation_steps * num_replicas
    saved = find_checkpoint(config, run)
    bucket_group = bucket_group_of(pipeline, num_replicas, saved)
    master = _master_of(config, trainable, saved)
    identity = run_identity(config, family, trainable, global_batch, bucket_group, master)
    check_identity(config, saved, identity)
    return Experiment(
        config=config,
        family=family,
        dataset=datasets.training,
        eval_sets=datasets.eval_sets,
        stored_hashes=datasets.stored_hashes,
        prompts=prompts,
        num_stages=num_stages,
        num_replicas=num_replicas,
        global_batch=global_batch,
        bucket_group=bucket_group,
        partition=choose_partition(pipeline, family, trainable, num_stages, datasets.training.examples),
        trainable=trainable,
        master=master,
        resume_run=run,
        resume_from=saved,
        changed_keys=changed_keys(run, config) if run is not None else [],
        identity=identity,
    )


def _check_folders(config: Config, errors: list[ErrorDetail]) -> None:
    """Checks that the folders a run writes to exist or can be created, and are writable."""
    for key, folder in (("output_dir", config.experiment.output_dir), ("cache_dir", config.experiment.cache_dir)):
        if folder is None:
            continue
        existing = next(path for path in (folder, *folder.absolute().parents) if path.exists())
        if not existing.is_dir():
            errors.append(ErrorDetail(config.path, key, f"= {str(folder)!r}: {existing} is a file, not a folder"))
        elif not os.access(existing, os.W_OK | os.X_OK):
            errors.append(ErrorDetail(config.path, key, f"= {str(folder)!r}: {existing} cannot be written to"))


def _check_directories(config: Config, errors: list[ErrorDetail]) -> None:
    for path, table in config.dataset_files().items():
        errors += [ErrorDetail(path, key, text) for key, text in directory_errors(table)]


def _check_averages(config: Config, errors: list[ErrorDetail]) -> None:
    """Checks that averaged weights are only used where an [ema] table keeps them."""
    experiment = config.experiment
    for key, table in (("sampling", experiment.sampling), ("eval", experiment.eval)):
        if table is not None and table.weights == "ema" and experiment.ema is None:
            errors.append(ErrorDetail(config.path, f"{key}.weights", "= 'ema': there is no average without an [ema] table"))
    kind = find(experiment.optimizer.type)
    if experiment.ema is not None and kind is not None and kind.is_schedule_free:
        text = f"{experiment.optimizer.type} keeps an average of the weights itself; remove this table"
        errors.append(ErrorDetail(config.path, "ema", text))


def _check_optimizer(config: Config, world: World, errors: list[ErrorDetail]) -> None:
    """Checks the optimizer's name and arguments, and the keys that depend on other tables and on the number of processes."""
    experiment, optimizer = config.experiment, config.experiment.optimizer
    found = optimizer_errors(optimizer) or group_key_errors(optimizer)
    errors += [ErrorDetail(config.path, key, text) for key, text in found]
    if optimizer.master not in (None, "float32") and experiment.model.dtype == "float32":
        text = f"= {optimizer.master!r}: only for model.dtype = \"bfloat16\"; float32 weights need nothing beside them"
        errors.append(ErrorDetail(config.path, "optimizer.master", text))
    if not optimizer.step_in_backward:
        return
    reasons = []
    if world.size > 1:
        reasons.append(f"one process, not {world.size}")
    if (count := experiment.pipeline.gradient_accumulation_steps) > 1:
        reasons.append(f"pipeline.gradient_accumulation_steps = 1, not {count}: gradients are complete after the last one")
    if optimizer.gradient_clipping:
        reasons.append(
            f"gradient_clipping = 0, not {optimizer.gradient_clipping:g}: the norm is known after the backward pass"
        )
    kind = find(optimizer.type)
    if kind is not None and kind.refusal is None and not is_separable(optimizer):
        reasons.append(f"an optimizer that updates each parameter by itself, such as AdamW, not {optimizer.type}")
    if reasons:
        errors.append(ErrorDetail(config.path, "optimizer.step_in_backward", f"= true: needs {'; and '.join(reasons)}"))


def _master_of(config: Config, trainable: Trainable, saved: SavedState | None) -> MasterKind:
    """How float32 weights are kept: as configured, or else as in the checkpoint, or else as what is trained needs it."""
    before: MasterKind = trainable.default_master if saved is None else saved.identity[MASTER_KIND]
    return config.experiment.optimizer.master or before


def _read_prompts(config: Config, errors: list[ErrorDetail]) -> list[Prompt]:
    prompts, found = read_prompts(config.experiment.sampling)
    errors += [ErrorDetail(file or config.path, place, text) for file, place, text in found[:MAX_BAD_FILES_SHOWN]]
    if len(found) > MAX_BAD_FILES_SHOWN:
        rest = f"{len(found) - MAX_BAD_FILES_SHOWN} more lines are wrong"
        errors.append(ErrorDetail(config.path, "sampling.prompts_file", rest))
    return prompts


def _check_encoder_names(config: Config, family: ModelFamily, errors: list[ErrorDetail]) -> None:
    rates = config.experiment.objective.encoder_dropout_rate
    names = [encoder.name for encoder in family.text_encoders]
    for name in rates if isinstance(rates, dict) else []:
        if name not in names:
            message = f"there is no such text encoder; there are {', '.join(names)}"
            errors.append(ErrorDetail(config.path, f"objective.encoder_dropout_rate.{name}", message))


def _check_stages(config: Config, world: World, errors: list[ErrorDetail], check_only: bool) -> int:
    stages = config.experiment.pipeline.pipeline_stages
    if stages == "auto":
        return world.size
    if world.size % stages and not (check_only and world.size == 1):
        message = f"= {stages}: must divide the number of processes, {world.size}; start a multiple of {stages} processes"
        errors.append(ErrorDetail(config.path, "pipeline.pipeline_stages", message))
    return stages


def _check_bucket_group(config: Config, num_replicas: int, errors: list[ErrorDetail]) -> None:
    if any(error.key == "pipeline.pipeline_stages" for error in errors):
        return  # the number of replicas is not known
    text = bucket_group_error(config.experiment.pipeline, num_replicas)
    if text is not None:
        errors.append(ErrorDetail(config.path, "pipeline.bucket_group", text))


def _open_model(config: Config, errors: list[ErrorDetail]) -> ModelFamily | None:
    model = config.experiment.model
    try:
        family: ModelFamily = family_class(model.type).from_files(model)
    except ModelFilesError as error:
        errors += [ErrorDetail(config.path, f"model.{key}", text) for key, text in error.errors]
        return None
    return family


def _check_trainable(config: Config, family: ModelFamily, errors: list[ErrorDetail]) -> Trainable:
    """What is trained, with the errors of `[adapter]`, of parameter groups and of export formats."""
    trainable, found = make_trainable(config.experiment, family)
    formats = export_formats(config.experiment, trainable)
    found = found + [("save.formats", text) for text in trainable.format_errors(formats)]
    errors += [ErrorDetail(config.path, key, text) for key, text in found]
    return trainable
