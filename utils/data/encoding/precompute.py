"""The caching pass: run each frozen encoder over what its store lacks, shared out among the ranks.

Rank 0 hashes files and decides what is missing. Then all work through one queue, one encoder in memory at a time, and none
at all when nothing is missing. On each rank the encoder is kept busy: pictures are decoded ahead in other processes, and
results are fetched, checked and written behind it by a thread. Work is taken when it is needed, never shared out before, so
ranks of different speed end together.

An encoder gets one picture, or one caption, at a time: in a batch, the last bit of a result depends on its neighbours, and
what is cached must not depend on what else was missing that day. A file that cannot be read is written down and passed over
by whoever meets it; no rank waits for one that failed on it.
"""

from __future__ import annotations

import itertools
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from models.base import EncodedItem, EncodeFunction, FrozenEncoder, ModelAdapter
from utils import distributed
from utils.background import Behind
from utils.data.cache.locks import SharedUse, WriterLock, remove_leftovers
from utils.data.cache.shards import ShardWriter
from utils.data.dataset import ContentMemory
from utils.data.encoding.encoded import EncodedData, caption_key, latents_key, mask_key
from utils.data.encoding.masks import MaskEncoder
from utils.data.encoding.plan import (
    CONTROL,
    CONTROL_MIRRORED,
    MIRRORED,
    TEXTS,
    CachePlan,
    CacheSettings,
    Wanted,
    Work,
    make_plan,
    wanted_captions,
    wanted_latents,
    wanted_masks,
)
from utils.data.encoding.text_storage import pack
from utils.data.examples import Example, ExampleTable, Unhashed
from utils.data.sources.images import CONTENT_BYTES, BadFile
from utils.data.sources.readers import Readers
from utils.log import bar_seconds, say

Item = tuple[int, int, int]
"""Table, example, variant; as in cache_plan.Work."""
Kind = Literal["latents", "mask", "caption"]
"""Of entries."""
HASHES_AT_ONCE = 16
"""Files that a reader process is asked to hash in one go."""
BATCHES_AHEAD = 64
REMEMBER_SECONDS = 60.0
DEPTH_BEHIND = 8
"""Results that may wait to be written."""
CAPTIONS = "captions"
"""Group of the entries of text encoders, which all have one shape."""


class CacheError(Exception):
    """The pass cannot be made, and why; on every rank."""


class Failure(NamedTuple):
    """An item that could not be encoded."""

    kind: Kind
    item: Item
    reason: str


@dataclass(frozen=True)
class RunData:
    """What a run reads from the cache."""

    tables: Sequence[ExampleTable]
    texts: Sequence[str]
    """Captions of no picture."""
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
    adapter: ModelAdapter, run_data: RunData, settings: CacheSettings, device: torch.device, num_readers: int
) -> Cached:
    """Encode what the cache lacks. All ranks; what is to be encoded, rank 0 says, whose `run_data` counts.

    Raises CacheError on every rank when the disk has no room for it, or a text of no picture cannot be encoded.
    """
    use = SharedUse(settings.folder)  # before anything is planned: what is there now must stay
    is_main = distributed.world().is_main
    with Readers(num_readers) as readers:
        decided = _decide(adapter, run_data, settings, readers) if is_main else None
        distributed.wait_for_all("cache planned")  # reading a large dataset may outlast a collective's time limit
        decision = distributed.broadcast(decided)
        assert decision is not None
        plan, texts = decision.plan, decision.texts
        for line in (*decision.notes, plan.describe()):
            say(line, is_main=is_main)
        if decision.problem is not None:
            raise CacheError(decision.problem)
        tables = [ExampleTable.open(path) for path in decision.table_files]
        sources = _Sources(tables, texts, settings, readers, adapter.latent.downscale)
        failures = encode_missing(adapter, plan, sources, device, num_readers + 1)
    for failure in failures:
        if failure.item[0] == TEXTS:
            raise CacheError(f"{texts[failure.item[1]]!r}: {failure.reason}")
    unusable = distributed.broadcast(_blame(tables, failures, decision.unread) if is_main else None)
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
    problem: str | None


def _decide(adapter: ModelAdapter, run_data: RunData, settings: CacheSettings, readers: Readers) -> _Decision:
    remove_leftovers(settings.folder)
    unread = _read_hashes(run_data.tables, run_data.memories, readers)
    plan = make_plan(adapter, run_data.tables, run_data.texts, settings)
    files = [table.save_in(settings.folder / "datasets") for table in run_data.tables]
    return _Decision(plan, _copies(run_data.tables), files, list(run_data.texts), unread, plan.room_problem())


def _copies(tables: Sequence[ExampleTable]) -> list[str]:
    """Whether pictures of later tables, which are only measured, are byte for byte in the first, which is trained on."""
    trained, *measured = (map(bytes, table.pictures.content[np.unique(table.rows[:, 0])]) for table in tables)
    wanted = {content for contents in measured for content in contents} - {bytes(CONTENT_BYTES)}  # of files that are unread
    both = {content for content in trained if content in wanted} if wanted else ()
    return [f"note: {len(both)} pictures of evaluation sets are copies of pictures that are trained on"] if both else []


def _read_hashes(tables: Sequence[ExampleTable], memories: Sequence[ContentMemory], readers: Readers) -> list[BadFile]:
    """Fill in the hashes of files that are not known yet, and remember them; returns the files that cannot be read."""
    bad_files: list[BadFile] = []
    count = sum(table.num_unhashed() for table in tables)
    todo = (entry for table in tables for entry in table.unhashed())
    remembered_at = time.monotonic()
    with tqdm(total=count, desc="reading files", unit="file", leave=False, delay=2.0, mininterval=bar_seconds()) as bar:
        for (column, row, file), answer in _hashes(todo, readers):
            if isinstance(answer, str):
                bad_files.append(BadFile(Path(str(file)), answer))
            else:
                column[row] = np.frombuffer(answer, np.uint8)
            bar.update()
            if time.monotonic() - remembered_at > REMEMBER_SECONDS:
                _remember(memories)
                remembered_at = time.monotonic()
    if count:
        _remember(memories)
    return bad_files


def _remember(memories: Sequence[ContentMemory]) -> None:
    for memory in memories:
        memory.save()


def _hashes(todo: Iterator[Unhashed], readers: Readers) -> Iterator[tuple[Unhashed, bytes | str]]:
    """Each file with its hash, or the reason why it has none; several batches are read at once."""
    waiting: deque[tuple[list[Unhashed], Future[list[bytes | str]]]] = deque()
    while batch := list(itertools.islice(todo, HASHES_AT_ONCE)):
        waiting.append((batch, readers.hashes([file for _, _, file in batch])))
        if len(waiting) > BATCHES_AHEAD:
            first, future = waiting.popleft()
            yield from zip(first, future.result(), strict=True)
    for first, future in waiting:
        yield from zip(first, future.result(), strict=True)


# --- encoding ----------------------------------------------------------------------------------------------------------


class _Source(NamedTuple):
    """How an encoder's items are read, and where their entries belong."""

    kind: Kind
    read: Callable[[Item], Future[Any]]
    key: Callable[[Item], bytes]
    group: Callable[[Item], str]
    pack: Callable[[EncodedItem], dict[str, Tensor]]
    """What of an item is kept, and how."""


class _Sources:
    """Items of work to what is encoded, on any rank."""

    def __init__(
        self, tables: Sequence[ExampleTable], texts: Sequence[str], settings: CacheSettings, readers: Readers, downscale: int
    ) -> None:
        self._tables, self._texts, self._settings, self._readers = tables, texts, settings, readers
        self._downscale = downscale

    def pictures(self) -> _Source:
        def read(item: Item) -> Future[Any]:
            example = self._example(item)
            file = example.control if is_control(item) else example.image
            assert file is not None
            content = example.control_content if is_control(item) else example.content
            return self._readers.pixels(file, example.box, mirrored=is_mirrored(item), content=content)

        def key(item: Item) -> bytes:
            example = self._example(item)
            content = example.control_content if is_control(item) else example.content
            return latents_key(content, example.box.key(), mirrored=is_mirrored(item))

        def keep(entry: EncodedItem) -> dict[str, Tensor]:
            return dict(entry) if self._settings.posterior else {"latents": entry["latents"]}

        return _Source("latents", read, key, self._bucket, keep)

    def masks(self) -> _Source:
        def read(item: Item) -> Future[Any]:
            example = self._example(item)
            assert example.mask is not None
            return self._readers.mask(example.mask, example.box, self._downscale, content=example.mask_content)

        def key(item: Item) -> bytes:
            example = self._example(item)
            return mask_key(example.mask_content, example.box.key())

        return _Source("mask", read, key, self._bucket, dict)

    def captions(self) -> _Source:
        def read(item: Item) -> Future[Any]:
            future: Future[Any] = Future()
            future.set_result(self.caption(item))
            return future

        def keep(entry: EncodedItem) -> dict[str, Tensor]:
            return pack(entry, self._settings.text_dtype)

        return _Source("caption", read, lambda item: caption_key(self.caption(item)), lambda _item: CAPTIONS, keep)

    def caption(self, item: Item) -> str:
        table, row, variant = item
        return self._texts[row] if table == TEXTS else self._example(item).caption(variant)

    def _example(self, item: Item) -> Example:
        table, row, _ = item
        return self._tables[table][row]

    def _bucket(self, item: Item) -> str:
        return str(self._example(item).bucket)


def is_mirrored(item: Item) -> bool:
    return item[2] in (MIRRORED, CONTROL_MIRRORED)


def is_control(item: Item) -> bool:
    return item[2] in (CONTROL, CONTROL_MIRRORED)


def encode_missing(
    adapter: ModelAdapter, plan: CachePlan, sources: _Sources, device: torch.device, num_ahead: int
) -> list[Failure]:
    """Encode everything the plan misses. All ranks; returns on all of them what could not be encoded."""
    failures: list[Failure] = []
    writer = WriterLock(plan.folders.cache)
    jobs: list[tuple[FrozenEncoder, Work, _Source]] = [
        (adapter.image_encoder, plan.latents, sources.pictures()),
        (MaskEncoder(adapter.latent.downscale), plan.masks, sources.masks()),
        *((encoder, plan.texts[encoder.name], sources.captions()) for encoder in adapter.text_encoders),
    ]
    for encoder, work, source in jobs:
        if len(work.items):
            failures += _EncoderPass(encoder, work, source, device, num_ahead, writer.name).run()
    writer.close()
    return [failure for found in distributed.gather(failures) for failure in found]


class _EncoderPass:
    """One encoder's part of the pass, on this rank."""

    def __init__(
        self, encoder: FrozenEncoder, work: Work, source: _Source, device: torch.device, num_ahead: int, writer: str
    ) -> None:
        self._encoder, self._work, self._source, self._device = encoder, work, source, device
        self._num_ahead = num_ahead
        self._writer = ShardWriter(work.folder, writer)
        self._failures: list[Failure] = []
        self._num_done, self._waited_seconds = 0, 0.0

    def run(self) -> list[Failure]:
        """All ranks; returns when everything is encoded, with what this rank could not encode."""
        is_main, total = distributed.world().is_main, len(self._work.items)
        queue = distributed.WorkQueue(f"encode {self._encoder.name}", total)
        encode: EncodeFunction | None = None
        title, seconds = f"caching {self._encoder.name}", bar_seconds()
        began = time.monotonic()
        with (
            tqdm(total=total, desc=title, unit="item", disable=not is_main, mininterval=seconds) as bar,
            Behind(self._finish, DEPTH_BEHIND) as behind,
        ):
            for item, reading in self._read_ahead(queue):
                if encode is None:  # not before: a rank that gets no work need not hold the encoder
                    encode = self._encoder.load(self._device)
                    began, self._waited_seconds = time.monotonic(), 0.0
                content = self._wait_for(item, reading)
                if content is not None:
                    behind.put((item, encode([content])[0]))
                if is_main:
                    bar.update(queue.num_taken() - bar.n)
        self._writer.flush()
        seconds = time.monotonic() - began
        distributed.wait_for_all(f"encoded {self._encoder.name}")
        self._tell(seconds)
        del encode
        distributed.free_memory()
        return self._failures

    def _read_ahead(self, queue: Iterable[int]) -> Iterator[tuple[Item, Future[Any]]]:
        """Items of the queue, whose reading has begun; a few more have been taken and begun."""
        waiting: deque[tuple[Item, Future[Any]]] = deque()
        for index in queue:
            table, row, variant = self._work.items[index].tolist()
            item = (table, row, variant)
            waiting.append((item, self._source.read(item)))
            if len(waiting) > self._num_ahead:
                yield waiting.popleft()
        yield from waiting

    def _wait_for(self, item: Item, reading: Future[Any]) -> Any:
        """What was read: pixels, a mask as tensors, or a text; None if it could not be."""
        began = time.monotonic()
        try:
            content = reading.result()
        except BadFile as bad:
            self._failures.append(Failure(self._source.kind, item, bad.reason))
            return None
        finally:
            self._waited_seconds += time.monotonic() - began
        return torch.from_numpy(content) if isinstance(content, np.ndarray) else content

    def _finish(self, encoded: tuple[Item, EncodedItem]) -> None:
        """In the other thread: fetch, check, and put into a shard."""
        item, tensors = encoded
        fetched = {name: tensor.cpu() for name, tensor in tensors.items()}
        if all(bool(tensor.isfinite().all()) for tensor in fetched.values()):
            self._writer.add(self._source.group(item), self._source.key(item), self._source.pack(fetched))
            self._num_done += 1
        else:
            reason = f"{self._encoder.name} made numbers of it that are not finite"
            self._failures.append(Failure(self._source.kind, item, reason))

    def _tell(self, seconds: float) -> None:
        """How fast it was, and how much of the time the encoder had something to do."""
        everyones = distributed.gather((self._num_done, seconds, self._waited_seconds))
        done, spent, waited = (sum(numbers) for numbers in zip(*everyones, strict=True))
        if distributed.world().is_main and done:
            longest = max(seconds for _, seconds, _ in everyones)
            busy = 1 - waited / spent
            say(f"{self._encoder.name}: {done:,} in {longest:.1f} s, {done / longest:.1f}/s; encoders busy {busy:.0%}")


# --- blaming -----------------------------------------------------------------------------------------------------------


def _blame(tables: Sequence[ExampleTable], failures: Sequence[Failure], unread: Sequence[BadFile]) -> Unusable:
    """Every example that cannot be used: equal pictures share an entry, and pictures of one caption another."""
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
    """It is the picture that cannot be used."""
    image = Path(str(example.image))
    if kind == "mask":
        return image, f"its mask {example.mask} {reason}"
    if kind == "latents" and is_control(item):
        return image, f"its control picture {example.control} {reason}"
    return image, reason
