"""The caching pass: run each frozen encoder over what its store lacks, shared out among the ranks.

Rank 0 hashes files and decides what is missing. Then all work through one queue, one encoder in memory at a time, and none
at all when nothing is missing. On each rank the encoder is kept busy: images are decoded ahead in other processes, and
results are fetched, checked and written behind it by a thread. Work is taken when it is needed, never shared out before, so
ranks of different speed end together. What failed is told at the end, with every example that cannot be used for it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch

from models.family import ModelFamily
from utils.console import print_line
from utils.data.cache.locks import SharedUse, remove_leftovers
from utils.data.dataset import ContentMemory
from utils.data.encoding.encoded import EncodedData
from utils.data.encoding.encoder_pass import Failure, Item, Kind, Sources, encode_missing, is_control
from utils.data.encoding.hashing import read_hashes
from utils.data.encoding.plan import (
    TEXTS,
    CachePlan,
    CacheSettings,
    Wanted,
    make_plan,
    wanted_captions,
    wanted_latents,
    wanted_masks,
)
from utils.data.examples import Example, ExampleTable
from utils.data.sources.decoding import CONTENT_BYTES, BadFile
from utils.data.sources.readers import Readers
from utils.distributed import group
from utils.distributed.world import world


class CacheError(Exception):
    """The pass cannot be made, and why; on every rank."""


@dataclass(frozen=True)
class RunData:
    """What a run reads from the cache."""

    tables: Sequence[ExampleTable]
    texts: Sequence[str]
    """Captions of no image."""
    memories: Sequence[ContentMemory]
    """Where hashes of the tables' files are kept."""


@dataclass
class Unusable:
    """What could not be encoded of a run's tables."""

    examples: list[np.ndarray]
    """Of each table, which examples: boolean."""
    bad_files: list[BadFile] = field(default_factory=list)


@dataclass(frozen=True)
class Cached:
    """What the pass leaves, on every rank."""

    data: EncodedData
    tables: list[ExampleTable]
    """As they were given to rank 0, read from files."""
    unusable: Unusable
    encoded_any: bool


def cache_dataset(
    family: ModelFamily, run_data: RunData, settings: CacheSettings, device: torch.device, num_readers: int
) -> Cached:
    """Encode what the cache lacks. All ranks; what is to be encoded, rank 0 says, whose `run_data` counts.

    Raises CacheError on every rank when the disk has no room for it, or a text of no image cannot be encoded.
    """
    use = SharedUse(settings.folder)  # before anything is planned: what is there now must stay
    is_main = world().is_main
    with Readers(num_readers) as readers:
        decided = _decide(family, run_data, settings, readers) if is_main else None
        group.wait_for_all("cache planned")  # reading a large dataset may outlast a collective's time limit
        decision = group.broadcast(decided)
        assert decision is not None
        plan, texts = decision.plan, decision.texts
        for line in (*decision.notes, plan.describe()):
            print_line(line, is_main=is_main)
        if decision.error is not None:
            raise CacheError(decision.error)
        tables = [ExampleTable.open(path) for path in decision.table_files]
        sources = Sources(tables, texts, settings, readers, family.latent.downscale)
        failures = encode_missing(family, plan, sources, device, num_readers + 1)
    for failure in failures:
        if failure.item[0] == TEXTS:
            raise CacheError(f"{texts[failure.item[1]]!r}: {failure.reason}")
    unusable = group.broadcast(_blame(tables, failures, decision.unread) if is_main else None)
    assert unusable is not None
    data = EncodedData(plan.folders)
    del use
    return Cached(data, tables, unusable, any(len(work.items) for work in plan.all_work().values()))


# --- deciding ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Decision:
    """Rank 0's."""

    plan: CachePlan
    notes: list[str]
    table_files: list[Path]
    texts: list[str]
    unread: list[BadFile]
    """Files whose bytes could not be read."""
    error: str | None


def _decide(family: ModelFamily, run_data: RunData, settings: CacheSettings, readers: Readers) -> _Decision:
    remove_leftovers(settings.folder)
    unread = read_hashes(run_data.tables, run_data.memories, readers)
    plan = make_plan(family, run_data.tables, run_data.texts, settings)
    files = [table.save_in(settings.folder / "datasets") for table in run_data.tables]
    return _Decision(plan, _copies(run_data.tables), files, list(run_data.texts), unread, plan.room_error())


def _copies(tables: Sequence[ExampleTable]) -> list[str]:
    """Whether images of later tables, which are only measured, are byte for byte in the first, which is trained on."""
    trained, *measured = (map(bytes, table.images.content[np.unique(table.rows[:, 0])]) for table in tables)
    wanted = {content for contents in measured for content in contents} - {bytes(CONTENT_BYTES)}  # of files that are unread
    both = {content for content in trained if content in wanted} if wanted else ()
    return [f"note: {len(both)} images of evaluation sets are copies of images that are trained on"] if both else []


# --- blaming -----------------------------------------------------------------------------------------------------------


def _blame(tables: Sequence[ExampleTable], failures: Sequence[Failure], unread: Sequence[BadFile]) -> Unusable:
    """Every example that cannot be used: equal images share an entry, and images of one caption another."""
    unusable = Unusable([table.incomplete() for table in tables], list(unread))
    bad_files: dict[tuple[Path, str], None] = {}  # each once, in order
    for kind, all_wanted in _WANTED.items():
        of_kind = {failure.item: failure.reason for failure in failures if failure.kind == kind}
        if not of_kind:
            continue
        wanted = all_wanted(tables)
        items = [(table, row, variant) for table, row, variant in wanted.items.tolist()]
        keys = [key.tobytes() for key in wanted.keys]
        reasons = {key: of_kind[item] for key, item in zip(keys, items, strict=True) if item in of_kind}
        for key, item in zip(keys, items, strict=True):
            if key in reasons:
                number, row, _ = item
                rows = tables[number].rows[:, 0]
                unusable.examples[number] |= rows == rows[row] if kind == "caption" else np.arange(len(rows)) == row
                bad_files[_bad_file(tables[number][row], kind, item, reasons[key])] = None
    unusable.bad_files += [BadFile(path, reason) for path, reason in bad_files]
    return unusable


_WANTED: dict[Kind, Callable[[Sequence[ExampleTable]], Wanted]] = {
    "latents": wanted_latents,
    "mask": wanted_masks,
    "caption": lambda tables: wanted_captions(tables, ()),
}


def _bad_file(example: Example, kind: Kind, item: Item, reason: str) -> tuple[Path, str]:
    """It is the image that cannot be used."""
    image = Path(str(example.image))
    if kind == "mask":
        return image, f"its mask {example.mask} {reason}"
    if kind == "latents" and is_control(item):
        return image, f"its control image {example.control} {reason}"
    return image, reason
