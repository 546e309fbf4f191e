"""Fills the cache with a run's dataset, and applies the dataset's rules to what could not be encoded. All ranks together."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch

from utils.config.load import TRAINING, ConfigError, ErrorDetail
from utils.console import print_line
from utils.data.cache.locks import CacheInUse
from utils.data.cache.shards import CacheWriteError, DamagedShard
from utils.data.encoding.encoded import EncodedData
from utils.data.encoding.precompute import CachedDataset, CachingError, RunData, cache_dataset
from utils.data.examples import ExampleTable
from utils.distributed import group
from utils.distributed.world import world
from utils.pipeline.feed import EMPTY_CAPTION
from utils.report.dataset_gather import MAX_SHOWN_IN_LOG, Gatherer, write_bad_files, write_page
from utils.run.datasets import BAD_FILE_ADVICE, eval_set_names, num_readers
from utils.run.experiment import Experiment


def encode_dataset(
    experiment: Experiment, device: torch.device, *, wants_report: bool = False
) -> tuple[EncodedData, Experiment]:
    """Encodes what the cache lacks; returns the cache, and the experiment without the examples that failed, on every rank.

    The dataset report is written if `wants_report`, and if anything was encoded. Raises ConfigError on every rank for files
    that could not be encoded and are not to be skipped, and when the disk has too little space.
    """
    config, here = experiment.config.experiment, world()
    texts = {EMPTY_CAPTION, *(text for prompt in experiment.prompts for text in (prompt.text, prompt.negative))}
    tables = [experiment.dataset.examples, *experiment.eval_sets.values()]
    run_data = RunData(tables, sorted(texts), experiment.stored_hashes)
    try:
        cached = cache_dataset(experiment.family, run_data, experiment.cache_settings, device, num_readers(here))
    except (CachingError, CacheInUse, DamagedShard, CacheWriteError, PermissionError) as error:
        raise ConfigError([ErrorDetail(experiment.config.path, "cache_dir", str(error))]) from error
    if here.is_main:
        write_bad_files(config.output_dir, experiment.dataset, cached.unusable.bad_files)
    encoded = without_unusable(experiment, cached)
    if here.is_main and (wants_report or cached.encoded_any):
        _write_dataset_report(encoded, cached, device)
    group.wait_for_all("dataset encoded")
    return cached.data, encoded


def _write_dataset_report(experiment: Experiment, cached: CachedDataset, device: torch.device) -> None:
    """Writes the report on the training set, and logs how many captions exceed each encoder's length. Rank 0 only."""
    config, order = experiment.config.experiment, experiment.batch_order()
    tile_pixels = config.sampling.decode_tile_pixels
    gatherer = Gatherer(experiment.family, cached.data, experiment.dataset.examples, order, tile_pixels)
    bad_files = [*experiment.dataset.bad_files, *cached.unusable.bad_files]
    title = f"Dataset {experiment.config.dataset_path}"
    facts = gatherer.facts(title, experiment.dataset, bad_files, experiment.num_steps(order), device)
    path = write_page(config.output_dir, facts)
    for encoder in facts.encoders:
        if encoder.num_cut:
            print_line(
                f"{encoder.num_cut} captions exceed the {encoder.max_tokens} tokens of {encoder.name} and are truncated"
            )
    print_line(f"dataset report: {path}")


def without_unusable(experiment: Experiment, cached: CachedDataset) -> Experiment:
    """The experiment without the examples that could not be encoded.

    Raises ConfigError when one of them belongs to a directory that does not skip bad files, or none is left of a set.
    """
    names = [TRAINING, *eval_set_names(experiment.config)]
    usable: dict[str, ExampleTable] = {}
    errors = [ErrorDetail(bad.path, "", bad.reason) for bad in cached.unusable.bad_files]
    fatal = []
    for name, table, unusable in zip(names, cached.tables, cached.unusable.examples, strict=True):
        path, _ = experiment.config.dataset_of(name)
        usable[name] = table.where(~unusable)
        if not all(table.directory_of(row).skip_bad for row in np.flatnonzero(unusable).tolist()):
            fatal.append(ErrorDetail(path, "on_bad_file", BAD_FILE_ADVICE))
        elif not len(usable[name]):
            fatal.append(ErrorDetail(path, "directory", "no image could be encoded"))
    if fatal:
        raise ConfigError(errors + fatal)
    for error in errors[:MAX_SHOWN_IN_LOG]:  # the list of bad files has all of them
        print_line(f"skipped: {error}", is_main=world().is_main)
    dataset = replace(experiment.dataset, examples=usable.pop(TRAINING))
    return replace(experiment, dataset=dataset, eval_sets=usable)
