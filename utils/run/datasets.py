"""Opens the training set and the evaluation sets of a configuration. Rank 0 alone does so; the others map its tables."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from models.family import ModelFamily
from utils.config.load import TRAINING, Config, ErrorDetail
from utils.config.schema.dataset import DatasetConfig
from utils.config.schema.evaluation import HOLDOUT
from utils.data.dataset import Dataset, directory_errors, hold_out, resolution_errors
from utils.data.examples import ExampleTable
from utils.data.scan import scan
from utils.data.sources.decoding import BadFile
from utils.data.sources.directory_index import DirectoryIndexer
from utils.data.sources.readers import Readers
from utils.distributed.world import World
from utils.files.file_index import FileIndex, StoredHashes
from utils.report.dataset_gather import write_bad_files

MAX_BAD_FILES_SHOWN = 20
MAX_READERS = 16
BAD_FILE_ADVICE = 'Fix or remove these files, or set on_bad_file = "skip".'
SMALL_IMAGE_ADVICE = 'Give larger images or a smaller resolution; "allow" enlarges such images, "never" skips them.'


@dataclass
class Datasets:
    """The training set, and the evaluation sets by name."""

    training: Dataset = field(default_factory=Dataset)
    eval_sets: dict[str, ExampleTable] = field(default_factory=dict)
    stored_hashes: list[StoredHashes] = field(default_factory=list)


def num_readers(world: World) -> int:
    """Image-decoding processes of one rank: the cores of its share but one, at least one, at most MAX_READERS."""
    return max(1, min(MAX_READERS, len(os.sched_getaffinity(0)) // world.local_size - 1))


def eval_set_names(config: Config) -> list[str]:
    """Names of the evaluation sets, in the order in which they are evaluated."""
    held_out = config.experiment.eval is not None and config.experiment.eval.holdout_images > 0
    return [*([HOLDOUT] if held_out else []), *config.eval_sets]


def open_datasets(
    config: Config, family: ModelFamily, errors: list[ErrorDetail], world: World, *, may_write: bool
) -> Datasets:
    """Scans every dataset of the configuration and appends its errors.

    `may_write`: whether the file index in the cache folder is updated and the list of bad files written.
    """
    with Readers(num_readers(world) * world.local_size) as readers:  # the other ranks of this host are idle
        indexer = DirectoryIndexer(readers, FileIndex(config.experiment.cache_folder, may_write=may_write))
        datasets = Datasets(_open_dataset(*config.dataset_of(TRAINING), family, errors, indexer))
        datasets.stored_hashes += datasets.training.stored_hashes
        _hold_out(config, datasets, errors)
        for name in config.eval_sets:
            found = _open_dataset(*config.dataset_of(name), family, errors, indexer, prefix=f"eval/{name}/")
            _add_eval_set(datasets, name, found)
    if may_write and datasets.training.fatal_files:  # such a run is refused, so nothing later could list them
        write_bad_files(config.experiment.output_dir, datasets.training, ())
    return datasets


def _add_eval_set(datasets: Datasets, name: str, found: Dataset) -> None:
    datasets.eval_sets[name] = found.examples
    datasets.stored_hashes += found.stored_hashes
    both = _num_shared(datasets.training.examples, found.examples)
    if both:
        datasets.training.warnings.append(f"{both} images of the evaluation set {name!r} are also in the training set")
    datasets.training.warnings.extend(found.warnings)
    for reported, more in zip(_reported_files(datasets.training), _reported_files(found), strict=True):
        reported.extend(more)


def _reported_files(dataset: Dataset) -> tuple[list[BadFile], list[BadFile], list[BadFile]]:
    """The lists of files that are reported when a run starts or is refused."""
    return dataset.bad_files, dataset.fatal_files, dataset.skipped


def _hold_out(config: Config, datasets: Datasets, errors: list[ErrorDetail]) -> None:
    """Moves `eval.holdout_images` images from the training set to an evaluation set."""
    held_out = config.experiment.eval.holdout_images if config.experiment.eval is not None else 0
    if not held_out or not len(datasets.training.examples):
        return
    try:
        examples, datasets.eval_sets[HOLDOUT] = hold_out(datasets.training.examples, held_out, config.experiment.seed)
        datasets.training = replace(datasets.training, examples=examples)
    except ValueError as error:
        errors.append(ErrorDetail(config.path, "eval.holdout_images", f"= {held_out}: {error}"))


def _num_shared(table: ExampleTable, other: ExampleTable) -> int:
    """Image files that both tables have examples of."""
    first, second = (np.unique(one.images.file_ids[one.rows[:, 0]]) for one in (table, other))
    return len(np.intersect1d(first, second))


def _open_dataset(
    path: Path,
    table: DatasetConfig,
    family: ModelFamily,
    errors: list[ErrorDetail],
    indexer: DirectoryIndexer,
    *,
    prefix: str = "",
) -> Dataset:
    missing = directory_errors(table)
    found = [ErrorDetail(path, key, text) for key, text in resolution_errors(table, family.latent)]
    if found:
        errors += found
        return Dataset()
    dataset = scan(table, family.latent.pixel_multiple, indexer, prefix=prefix)
    errors += _shortened(path, dataset.fatal_files, "on_bad_file", BAD_FILE_ADVICE)
    errors += _shortened(path, dataset.too_small, "upscale", SMALL_IMAGE_ADVICE)
    if not len(dataset.examples) and not missing:
        folders = ", ".join(str(directory.path) for directory in table.directory)
        errors.append(ErrorDetail(path, "directory", f"no usable image with a caption in {folders}"))
    return dataset


def _shortened(path: Path, bad_files: Sequence[BadFile], key: str, advice: str) -> list[ErrorDetail]:
    """An error for each of the first files, their number beyond these, and an error with the advice."""
    if not bad_files:
        return []
    errors = [ErrorDetail(bad.path, "", bad.reason) for bad in bad_files[:MAX_BAD_FILES_SHOWN]]
    rest = len(bad_files) - MAX_BAD_FILES_SHOWN
    if rest > 0:
        errors.append(ErrorDetail(path, "", f"{rest} more files cannot be used"))
    return [*errors, ErrorDetail(path, key, advice)]
