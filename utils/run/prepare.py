"""Everything that can be wrong with a run, found before any process group starts.

Each rank checks for itself and comes to the same answer; nothing here talks to another rank, or changes a file but those in
which rank 0 remembers what it found in the dataset's folders, and its list of the files for which it refuses a run.
"""

from __future__ import annotations

import hashlib
import os
import tomllib
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import BaseModel

from models import family_class
from models.family import LoraFile, ModelFamily, ModelFilesError
from utils.checkpoint.save import NETWORK_FILES, CheckpointError, SavedState, find_checkpoints, identity_errors
from utils.config.load import TRAINING, Config, ConfigError, ErrorDetail, dump_toml, load_config, located
from utils.config.schema.tables import HOLDOUT, DatasetConfig
from utils.data.batches import BatchOrder
from utils.data.dataset import ContentMemory, Dataset, directory_errors, hold_out, resolution_errors
from utils.data.encoding.plan import CacheSettings
from utils.data.examples import ExampleTable
from utils.data.scan import scan
from utils.data.sources.decoding import BadFile
from utils.data.sources.listing import Lister
from utils.data.sources.readers import Readers
from utils.distributed.group import World
from utils.export.weights import export_errors
from utils.objective.objective import objective_errors
from utils.optim.registry import optimizer_errors
from utils.pipeline.partition import balanced_bounds
from utils.previews.prompt_list import Prompt, prompt_errors, read_prompts
from utils.report.dataset_gather import write_bad_files
from utils.trainable.lora import LoraTargets
from utils.trainable.targets import choose_modules, start_errors

CHECKPOINTS = "checkpoints"
MAX_BAD_FILES_SHOWN = 20
SAMPLE_BYTES = 4 * 2**20
MAX_READERS = 16
BAD_FILE_ADVICE = 'mend or remove these files, or leave them out with on_bad_file = "skip"'
SMALL_IMAGE_ADVICE = 'give larger images or a smaller resolution; "allow" enlarges them, "never" leaves them out'


@dataclass(frozen=True)
class Experiment:
    """A run that can start: all files read, all numbers known."""

    config: Config
    family: ModelFamily
    dataset: Dataset
    eval_sets: dict[str, ExampleTable]
    """Name -> images that are measured and not trained on."""
    memories: list[ContentMemory]
    """Where hashes of all their files are kept. Of other ranks than 0, all these are empty until the cache is filled."""
    prompts: list[Prompt]
    num_stages: int
    num_replicas: int
    global_batch: int
    bounds: list[int]
    adapter_plan: LoraTargets | None
    """None: the whole network is trained."""
    adapter_start: LoraFile | None
    """What the adapter starts from; None for a fresh start."""
    resume_run: Path | None
    """The run folder to go on in; None for a new one."""
    resume_from: SavedState | None
    changed_keys: list[str]
    """What the configuration says otherwise than when the run to go on in was last started."""
    identity: dict[str, Any]
    """What two runs must share for one to go on from the other's checkpoint."""

    @property
    def cache_settings(self) -> CacheSettings:
        config = self.config.experiment
        return CacheSettings(config.cache_folder, config.cache_posterior, config.text_cache_dtype)

    def num_steps(self, order: BatchOrder) -> int:
        """Optimizer steps of the whole run."""
        experiment = self.config.experiment
        limits = [experiment.max_steps, experiment.epochs and experiment.epochs * order.steps_per_epoch]
        return min(limit for limit in limits if limit is not None)


def run_identity(config: Config, family: ModelFamily, global_batch: int) -> dict[str, Any]:
    experiment = config.experiment
    return {
        "seed": experiment.seed,
        "global batch": global_batch,
        "layer list": family.layer_list_version,
        NETWORK_FILES: [sample_hash(path) for path in family.network_files],
        "network settings": family.network_settings,
        "adapter": experiment.adapter.model_dump(mode="json", exclude={"init_from"}) if experiment.adapter else "none",
        "optimizer.type": experiment.optimizer.type,
        "ema": experiment.ema.model_dump(mode="json") if experiment.ema else "none",
    }


def prepare(
    config_path: Path, overrides: Sequence[str], resume: str | None, world: World, *, only_look: bool = False
) -> Experiment:
    """Check everything. Raises ConfigError with every error found.

    `resume`: None, "" (newest run) or a run folder. `only_look`: from one process, at a run of any number, and writing
    nothing. Rank 0 alone looks at the datasets.
    """
    config = load_config(config_path, overrides)
    errors: list[ErrorDetail] = []
    errors += [ErrorDetail(config_path, key, text) for key, text in optimizer_errors(config.experiment.optimizer)]
    errors += [ErrorDetail(config_path, key, text) for key, text in objective_errors(config.experiment.objective)]
    _check_folders(config, errors)
    num_stages = _check_stages(config, world, errors, only_look)
    _check_directories(config, errors)
    _check_averages(config, errors)
    prompts = _read_prompts(config, errors)
    family = _open_model(config, errors)
    datasets = Datasets()
    bounds, plan, start = [0, 1], None, None
    if family is not None:
        bounds = _check_bounds(config, family, num_stages, errors)
        plan, start = _check_adapter(config, family, errors)
        errors += [ErrorDetail(config.path, key, text) for key, text in export_errors(config.experiment, family)]
        found = prompt_errors(prompts, config.experiment.sampling, family.latent, family.num_blocks)
        errors += [ErrorDetail(config.path, key, text) for key, text in found]
        _check_encoder_names(config, family, errors)
        if world.is_main:
            datasets = _open_datasets(config, family, errors, world, may_write=not only_look and not errors)
    num_replicas = max(1, world.size // num_stages)
    run = _find_run(config, resume, errors)
    if errors or family is None:
        raise ConfigError(located(errors, overrides))
    pipeline = config.experiment.pipeline
    global_batch = pipeline.micro_batch_size_per_gpu * pipeline.gradient_accumulation_steps * num_replicas
    identity = run_identity(config, family, global_batch)
    return Experiment(
        config=config,
        family=family,
        dataset=datasets.training,
        eval_sets=datasets.eval_sets,
        memories=datasets.memories,
        prompts=prompts,
        num_stages=num_stages,
        num_replicas=num_replicas,
        global_batch=global_batch,
        bounds=bounds,
        adapter_plan=plan,
        adapter_start=start,
        resume_run=run,
        resume_from=_find_checkpoint(config, run, identity),
        changed_keys=changed_keys(run, config) if run is not None else [],
        identity=identity,
    )


def _check_folders(config: Config, errors: list[ErrorDetail]) -> None:
    """Folders that will be written to."""
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
    """Who wants to use an average of the weights where none is kept."""
    experiment = config.experiment
    for key, table in (("sampling", experiment.sampling), ("eval", experiment.eval)):
        if table is not None and table.weights == "ema" and experiment.ema is None:
            errors.append(ErrorDetail(config.path, f"{key}.weights", "= 'ema': there is no average without an [ema] table"))


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


def _check_stages(config: Config, world: World, errors: list[ErrorDetail], only_look: bool) -> int:
    stages = config.experiment.pipeline.pipeline_stages
    if stages == "auto":
        return world.size
    if world.size % stages and not (only_look and world.size == 1):
        message = f"= {stages}: must divide the number of processes, {world.size}; start a multiple of {stages} processes"
        errors.append(ErrorDetail(config.path, "pipeline.pipeline_stages", message))
    return stages


def _open_model(config: Config, errors: list[ErrorDetail]) -> ModelFamily | None:
    model = config.experiment.model
    try:
        family: ModelFamily = family_class(model.type)(model)
    except ModelFilesError as error:
        errors += [ErrorDetail(config.path, f"model.{key}", text) for key, text in error.errors]
        return None
    return family


@dataclass
class Datasets:
    """What is trained on, and by a set's name what is only measured."""

    training: Dataset = field(default_factory=Dataset)
    eval_sets: dict[str, ExampleTable] = field(default_factory=dict)
    memories: list[ContentMemory] = field(default_factory=list)


def num_readers(world: World) -> int:
    """Processes that read images for a rank: all cores but one for each rank, at least one, and no more than help."""
    return max(1, min(MAX_READERS, len(os.sched_getaffinity(0)) // world.local_size - 1))


def _open_datasets(
    config: Config, family: ModelFamily, errors: list[ErrorDetail], world: World, *, may_write: bool
) -> Datasets:
    """may_write: whether what was found in folders may be remembered in the cache, and bad files be listed."""
    with Readers(num_readers(world) * world.local_size) as readers:  # the other ranks are waiting
        lister = Lister(readers, config.experiment.cache_folder / "files", may_write=may_write)
        datasets = Datasets(_open_dataset(*config.dataset_of(TRAINING), family, errors, lister))
        datasets.memories.append(datasets.training.memory)
        _hold_out(config, datasets, errors)
        for name in config.eval_sets:
            found = _open_dataset(*config.dataset_of(name), family, errors, lister, prefix=f"eval/{name}/")
            datasets.eval_sets[name] = found.examples
            datasets.memories.append(found.memory)
            both = _num_shared(datasets.training.examples, found.examples)
            if both:
                warning = f"{both} images of the evaluation set {name!r} are trained on too"
                datasets.training.warnings.append(warning)
            datasets.training.warnings.extend(found.warnings)
            for told, more in zip(_told_files(datasets.training), _told_files(found), strict=True):
                told.extend(more)
    if may_write and datasets.training.fatal_files:  # later there is no run that could list them
        write_bad_files(config.experiment.output_dir, datasets.training, ())
    return datasets


def _told_files(dataset: Dataset) -> tuple[list[BadFile], list[BadFile], list[BadFile]]:
    """The files that are told of when the run begins, or is refused."""
    return dataset.bad_files, dataset.fatal_files, dataset.left_out


def eval_set_names(config: Config) -> list[str]:
    """Those of the evaluation sets, in the order in which they are looked at."""
    held_out = config.experiment.eval is not None and config.experiment.eval.holdout_images > 0
    return [*([HOLDOUT] if held_out else []), *config.eval_sets]


def _hold_out(config: Config, datasets: Datasets, errors: list[ErrorDetail]) -> None:
    held_out = config.experiment.eval.holdout_images if config.experiment.eval is not None else 0
    if not held_out or not len(datasets.training.examples):
        return
    try:
        examples, datasets.eval_sets[HOLDOUT] = hold_out(datasets.training.examples, held_out, config.experiment.seed)
        datasets.training = replace(datasets.training, examples=examples)
    except ValueError as error:
        errors.append(ErrorDetail(config.path, "eval.holdout_images", f"= {held_out}: {error}"))


def _num_shared(table: ExampleTable, other: ExampleTable) -> int:
    """Files that examples of both tables are of."""
    first, second = (np.unique(one.images.same[one.rows[:, 0]]) for one in (table, other))
    return len(np.intersect1d(first, second))


def _open_dataset(
    path: Path, table: DatasetConfig, family: ModelFamily, errors: list[ErrorDetail], lister: Lister, *, prefix: str = ""
) -> Dataset:
    missing = directory_errors(table)
    found = [ErrorDetail(path, key, text) for key, text in resolution_errors(table, family.latent)]
    if found:
        errors += found
        return Dataset()
    dataset = scan(table, family.latent.pixel_multiple, lister, prefix=prefix)
    errors += _shortened(path, dataset.fatal_files, "on_bad_file", BAD_FILE_ADVICE)
    errors += _shortened(path, dataset.refused, "upscale", SMALL_IMAGE_ADVICE)
    if not len(dataset.examples) and not missing:
        folders = ", ".join(str(directory.path) for directory in table.directory)
        errors.append(ErrorDetail(path, "directory", f"no usable image with a caption in {folders}"))
    return dataset


def _shortened(path: Path, bad_files: Sequence[BadFile], key: str, advice: str) -> list[ErrorDetail]:
    """An error for each of the first files, and one that says what to do."""
    if not bad_files:
        return []
    errors = [ErrorDetail(bad.path, "", bad.reason) for bad in bad_files[:MAX_BAD_FILES_SHOWN]]
    rest = len(bad_files) - MAX_BAD_FILES_SHOWN
    if rest > 0:
        errors.append(ErrorDetail(path, "", f"{rest} more files cannot be used"))
    return [*errors, ErrorDetail(path, key, advice)]


def _check_bounds(config: Config, family: ModelFamily, num_stages: int, errors: list[ErrorDetail]) -> list[int]:
    try:
        return balanced_bounds([layer.cost for layer in family.layers], num_stages)
    except ValueError as error:
        errors.append(ErrorDetail(config.path, "pipeline.pipeline_stages", f"= {num_stages}: {error}"))
        return [0, len(family.layers)]


def _check_adapter(
    config: Config, family: ModelFamily, errors: list[ErrorDetail]
) -> tuple[LoraTargets | None, LoraFile | None]:
    """What is trained of the network, and the file it starts from."""
    settings = config.experiment.adapter
    if settings is None:
        return None, None
    plan, found = choose_modules(settings, family)
    errors += [ErrorDetail(config.path, key, text) for key, text in found]
    file = None
    if settings.init_from is not None:
        try:
            file = family.open_lora_file(settings.init_from)
        except ModelFilesError as error:
            errors += [ErrorDetail(config.path, "adapter.init_from", text) for _, text in error.errors]
    if file is not None and not found:
        texts = start_errors(file, plan, settings, family)
        errors += [ErrorDetail(config.path, "adapter.init_from", f"{file.path} {text}") for text in texts]
    return plan, file


def _find_run(config: Config, resume: str | None, errors: list[ErrorDetail]) -> Path | None:
    """The run folder to go on in; None for a new run."""
    if resume is None:
        return None
    run = Path(resume) if resume else newest_run(config.experiment.output_dir)
    if run is not None and not (run / "config.toml").is_file():
        errors.append(ErrorDetail(run, "", "is no run folder: it has no config.toml"))
    return run


def _find_checkpoint(config: Config, run: Path | None, identity: dict[str, Any]) -> SavedState | None:
    """The run's newest checkpoint, if any. Raises ConfigError when this configuration would be another training."""
    try:
        saved = find_checkpoints(run / CHECKPOINTS) if run is not None else []
    except CheckpointError as error:
        raise ConfigError([ErrorDetail(config.path, "", str(error))]) from error
    if not saved:
        return None
    errors = [ErrorDetail(config.path, "", text) for text in identity_errors(saved[-1], identity)]
    if errors:
        raise ConfigError(errors)
    return saved[-1]


def sample_hash(path: Path) -> str:
    """Tells one weights file from another in no time: a hash of its size, its first and its last bytes."""
    size = path.stat().st_size
    digest = hashlib.blake2b(str(size).encode(), digest_size=8)
    with path.open("rb") as file:
        digest.update(file.read(SAMPLE_BYTES))
        file.seek(max(0, size - SAMPLE_BYTES))
        digest.update(file.read())
    return digest.hexdigest()


def run_files(config: Config) -> dict[str, BaseModel]:
    """The configuration as a run folder keeps it: file name -> table."""
    sets = {f"eval_{name}.toml": table for name, table in config.eval_sets.items()}
    return {"config.toml": config.experiment, "dataset.toml": config.dataset, **sets}


def changed_keys(run: Path, config: Config) -> list[str]:
    """One line for each key of either file that is not as in the run folder."""
    lines = []
    for name, table in run_files(config).items():
        try:
            before = flatten(tomllib.loads((run / name).read_text(encoding="utf-8")))
        except (OSError, tomllib.TOMLDecodeError):
            continue  # it will be written anew
        now = flatten(tomllib.loads(dump_toml(table)))
        for key in sorted(before.keys() | now.keys()):
            if before.get(key) != now.get(key):
                lines.append(f"{key} was {before.get(key, 'unset')!r}, is now {now.get(key, 'unset')!r}")
    return lines


def flatten(table: dict[str, Any], path: str = "") -> dict[str, Any]:
    """{"a": {"b": 1}} to {"a.b": 1}."""
    flat: dict[str, Any] = {}
    for key, value in table.items():
        flat.update(flatten(value, f"{path}{key}.") if isinstance(value, dict) else {f"{path}{key}": value})
    return flat


def newest_run(output_dir: Path) -> Path | None:
    """The run folder started last, by its name."""
    runs = sorted(path.parent for path in output_dir.glob("*/config.toml"))
    return runs[-1] if runs else None
