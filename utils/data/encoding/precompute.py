"""Caching (pre-encoding): runs each frozen encoder over the entries that the cache lacks, on all ranks.

Rank 0 hashes the files and plans what is missing. All ranks then take items from one queue, so that ranks of different speed
finish together. One encoder is in memory at a time, and none when nothing is missing. On each rank, processes decode images
ahead of the encoder, and a thread fetches, checks and writes its results. Items that could not be encoded are reported at
the end, with all examples that they make unusable.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch

from models.family import ModelFamily
from utils.console import print_line
from utils.data.cache.locks import SharedLock, remove_leftovers
from utils.data.encoding.encoded import EncodedData
from utils.data.encoding.encoder_inputs import EncoderInputs, Kind
from utils.data.encoding.encoder_loop import Failure, encode_missing
from utils.data.encoding.hashing import hash_files
from utils.data.encoding.plan import CachePlan, CacheSettings, make_plan
from utils.data.encoding.required import (
    TEXTS,
    Item,
    RequiredEntries,
    is_control,
    required_captions,
    required_latents,
    required_masks,
)
from utils.data.examples import Example, ExampleTable
from utils.data.sources.decoding import HASH_BYTES, BadFile
from utils.data.sources.readers import Readers
from utils.distributed import group
from utils.distributed.world import world
from utils.files.file_index import StoredHashes


class CachingError(Exception):
    """Caching is impossible: too little disk space, or a text that cannot be encoded. Raised on every rank."""


@dataclass(frozen=True)
class RunData:
    """The examples and texts that a run reads from the cache."""

    tables: Sequence[ExampleTable]
    texts: Sequence[str]
    """Texts that belong to no image, such as prompts and the empty caption."""
    stored_hashes: Sequence[StoredHashes]
    """Where the hashes of the tables' files are stored."""


@dataclass
class UnusableExamples:
    """The examples that could not be encoded, and the causes."""

    examples: list[np.ndarray]
    """For each table, a boolean array that marks its unusable examples."""
    bad_files: list[BadFile] = field(default_factory=list)


@dataclass(frozen=True)
class CachedDataset:
    """The result of caching, identical on every rank."""

    data: EncodedData
    tables: list[ExampleTable]
    """The tables of rank 0, mapped from files."""
    unusable: UnusableExamples
    encoded_any: bool


def cache_dataset(
    family: ModelFamily, run_data: RunData, settings: CacheSettings, device: torch.device, num_readers: int
) -> CachedDataset:
    """Encodes the missing entries. Called by all ranks; only the `run_data` of rank 0 is used.

    Raises CachingError on every rank when the disk space is too small or a text that belongs to no image cannot be encoded.
    """
    lock = SharedLock(settings.folder)  # before planning, so that no entry found by the plan can be pruned
    is_main = world().is_main
    with Readers(num_readers) as readers:
        decided = _decide(family, run_data, settings, readers) if is_main else None
        group.wait_for_all("cache planned")  # reading a large dataset may take longer than a collective's timeout
        decision = group.broadcast(decided)
        assert decision is not None
        plan, texts = decision.plan, decision.texts
        for line in (*decision.notes, plan.describe()):
            print_line(line, is_main=is_main)
        if decision.error is not None:
            raise CachingError(decision.error)
        tables = [ExampleTable.open(path) for path in decision.table_files]
        inputs = EncoderInputs(tables, texts, settings, readers, family.latent.downscale)
        failures = encode_missing(family, plan, inputs, device, num_readers + 1)
    for failure in failures:
        if failure.item[0] == TEXTS:
            raise CachingError(f"{texts[failure.item[1]]!r} {failure.reason}")
    unusable = group.broadcast(_find_unusable(tables, failures, decision.unread) if is_main else None)
    assert unusable is not None
    data = EncodedData(plan.folders)
    del lock  # EncodedData holds a lock of its own
    return CachedDataset(data, tables, unusable, any(len(work.items) for work in plan.all_work().values()))


# --- planning ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Decision:
    """The plan of rank 0."""

    plan: CachePlan
    notes: list[str]
    table_files: list[Path]
    texts: list[str]
    unread: list[BadFile]
    """Files that could not be hashed."""
    error: str | None


def _decide(family: ModelFamily, run_data: RunData, settings: CacheSettings, readers: Readers) -> _Decision:
    remove_leftovers(settings.folder)
    unread = hash_files(run_data.tables, run_data.stored_hashes, readers)
    plan = make_plan(family, run_data.tables, run_data.texts, settings)
    files = [table.save_in(settings.folder / "datasets") for table in run_data.tables]
    notes = _duplicate_notes(run_data.tables)
    return _Decision(plan, notes, files, list(run_data.texts), unread, plan.disk_space_error())


def _duplicate_notes(tables: Sequence[ExampleTable]) -> list[str]:
    """Reports images of evaluation sets (all tables but the first) that are byte-identical to training images."""
    trained, *evaluated = (map(bytes, table.images.hashes[np.unique(table.rows[:, 0])]) for table in tables)
    evaluated_hashes = {digest for table in evaluated for digest in table} - {bytes(HASH_BYTES)}  # zeros: not hashed
    both = {digest for digest in trained if digest in evaluated_hashes} if evaluated_hashes else ()
    return [f"note: {len(both)} images of evaluation sets are copies of training images"] if both else []


# --- unusable examples -------------------------------------------------------------------------------------------------


def _find_unusable(
    tables: Sequence[ExampleTable], failures: Sequence[Failure], unread: Sequence[BadFile]
) -> UnusableExamples:
    """Finds all examples of failed entries: identical images share latents, and all sizes of an image share its captions."""
    unusable = UnusableExamples([table.incomplete() for table in tables], list(unread))
    bad_files: dict[tuple[Path, str], None] = {}  # an ordered set
    for kind, required_of in _REQUIRED.items():
        failed = {failure.item: failure.reason for failure in failures if failure.kind == kind}
        if not failed:
            continue
        required = required_of(tables)
        items = [(table, row, variant) for table, row, variant in required.items.tolist()]
        keys = [key.tobytes() for key in required.keys]
        reasons = {key: failed[item] for key, item in zip(keys, items, strict=True) if item in failed}
        for key, item in zip(keys, items, strict=True):
            if key in reasons:
                number, row, _ = item
                rows = tables[number].rows[:, 0]
                unusable.examples[number] |= rows == rows[row] if kind == "caption" else np.arange(len(rows)) == row
                bad_files[_bad_file(tables[number][row], kind, item, reasons[key])] = None
    unusable.bad_files += [BadFile(path, reason) for path, reason in bad_files]
    return unusable


_REQUIRED: dict[Kind, Callable[[Sequence[ExampleTable]], RequiredEntries]] = {
    "latents": required_latents,
    "mask": required_masks,
    "caption": lambda tables: required_captions(tables, ()),
}


def _bad_file(example: Example, kind: Kind, item: Item, reason: str) -> tuple[Path, str]:
    """Returns the path of the image, which cannot be used, and the reason, which may lie in a file that belongs to it."""
    image = Path(str(example.image))
    if kind == "mask":
        return image, f"its mask {example.mask} {reason}"
    if kind == "latents" and is_control(item):
        return image, f"its control image {example.control} {reason}"
    return image, f"its caption {reason}" if kind == "caption" else reason
