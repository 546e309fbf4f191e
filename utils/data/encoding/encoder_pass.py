"""One encoder after the other over what is missing: taken from a queue, read ahead, encoded, written behind.

An encoder gets one image, or one caption, at a time: in a batch, the last bit of a result depends on its neighbours, and
what is cached must not depend on what else was missing that day. A file that cannot be read is written down and passed over
by whoever meets it; no rank waits for one that failed on it.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from models.family import EncodedItem, EncodeFunction, FrozenEncoder, ModelFamily
from utils.background import Behind
from utils.console import bar_interval_seconds, print_line
from utils.data.cache.locks import WriterLock
from utils.data.cache.shards import ShardWriter
from utils.data.encoding.encoded import caption_key, latents_key, mask_key
from utils.data.encoding.masks import MaskEncoder
from utils.data.encoding.plan import CONTROL, CONTROL_MIRRORED, MIRRORED, TEXTS, CachePlan, CacheSettings, Work
from utils.data.encoding.stored_names import STORED_STD
from utils.data.encoding.text_storage import pack
from utils.data.examples import Example, ExampleTable
from utils.data.sources.decoding import BadFile
from utils.data.sources.readers import Readers
from utils.distributed import group
from utils.distributed.world import world

Item = tuple[int, int, int]
"""Table, example, variant; as in plan.Work."""
Kind = Literal["latents", "mask", "caption"]
"""Of entries."""
DEPTH_BEHIND = 8
"""Results that may wait to be written."""
CAPTIONS = "captions"
"""Group of the entries of text encoders, which all have one shape."""


class Failure(NamedTuple):
    """An item that could not be encoded."""

    kind: Kind
    item: Item
    reason: str


class Source(NamedTuple):
    """How an encoder's items are read, and where their entries belong."""

    kind: Kind
    read: Callable[[Item], Future[Any]]
    key: Callable[[Item], bytes]
    group: Callable[[Item], str]
    pack: Callable[[EncodedItem], dict[str, Tensor]]
    """What of an item is kept, and how."""


class Sources:
    """Items of work to what is encoded, on any rank."""

    def __init__(
        self, tables: Sequence[ExampleTable], texts: Sequence[str], settings: CacheSettings, readers: Readers, downscale: int
    ) -> None:
        self._tables, self._texts, self._settings, self._readers = tables, texts, settings, readers
        self._downscale = downscale

    def images(self) -> Source:
        def read(item: Item) -> Future[Any]:
            example = self._example(item)
            file = example.control if is_control(item) else example.image
            assert file is not None
            content = example.control_content if is_control(item) else example.content
            return self._readers.pixels(file, example.box, flipped=is_flipped(item), content=content)

        def key(item: Item) -> bytes:
            example = self._example(item)
            content = example.control_content if is_control(item) else example.content
            return latents_key(content, example.box.key(), flipped=is_flipped(item))

        def keep(entry: EncodedItem) -> dict[str, Tensor]:
            mean = {"latents": entry["latents"]}
            return {**mean, STORED_STD: entry["std"]} if self._settings.posterior else mean

        return Source("latents", read, key, self._bucket, keep)

    def masks(self) -> Source:
        def read(item: Item) -> Future[Any]:
            example = self._example(item)
            assert example.mask is not None
            return self._readers.mask(example.mask, example.box, self._downscale, content=example.mask_content)

        def key(item: Item) -> bytes:
            example = self._example(item)
            return mask_key(example.mask_content, example.box.key())

        return Source("mask", read, key, self._bucket, dict)

    def captions(self) -> Source:
        def read(item: Item) -> Future[Any]:
            future: Future[Any] = Future()
            future.set_result(self.caption(item))
            return future

        def keep(entry: EncodedItem) -> dict[str, Tensor]:
            return pack(entry, self._settings.text_dtype)

        return Source("caption", read, lambda item: caption_key(self.caption(item)), lambda _item: CAPTIONS, keep)

    def caption(self, item: Item) -> str:
        table, row, variant = item
        return self._texts[row] if table == TEXTS else self._example(item).caption(variant)

    def _example(self, item: Item) -> Example:
        table, row, _ = item
        return self._tables[table][row]

    def _bucket(self, item: Item) -> str:
        return str(self._example(item).bucket)


def is_flipped(item: Item) -> bool:
    return item[2] in (MIRRORED, CONTROL_MIRRORED)


def is_control(item: Item) -> bool:
    return item[2] in (CONTROL, CONTROL_MIRRORED)


def encode_missing(
    family: ModelFamily, plan: CachePlan, sources: Sources, device: torch.device, num_ahead: int
) -> list[Failure]:
    """Encode everything the plan misses. All ranks; returns on all of them what could not be encoded."""
    failures: list[Failure] = []
    writer = WriterLock(plan.folders.cache)
    jobs: list[tuple[FrozenEncoder, Work, Source]] = [
        (family.image_encoder, plan.latents, sources.images()),
        (MaskEncoder(family.latent.downscale), plan.masks, sources.masks()),
        *((encoder, plan.texts[encoder.name], sources.captions()) for encoder in family.text_encoders),
    ]
    for encoder, work, source in jobs:
        if len(work.items):
            failures += EncoderPass(encoder, work, source, device, num_ahead, writer.name).run()
    writer.close()
    return [failure for found in group.gather(failures) for failure in found]


class EncoderPass:
    """One encoder's part of the pass, on this rank."""

    def __init__(
        self, encoder: FrozenEncoder, work: Work, source: Source, device: torch.device, num_ahead: int, writer: str
    ) -> None:
        self._encoder, self._work, self._source, self._device = encoder, work, source, device
        self._num_ahead = num_ahead
        self._writer = ShardWriter(work.folder, writer)
        self._failures: list[Failure] = []
        self._num_done, self._waited_seconds = 0, 0.0

    def run(self) -> list[Failure]:
        """All ranks; returns when everything is encoded, with what this rank could not encode."""
        is_main, total = world().is_main, len(self._work.items)
        queue = group.WorkQueue(f"encode {self._encoder.name}", total)
        encode: EncodeFunction | None = None
        title, seconds = f"caching {self._encoder.name}", bar_interval_seconds()
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
                    encoded = encode([content])[0]
                    with self._waiting():
                        behind.put((item, encoded))
                if is_main:
                    bar.update(queue.num_taken() - bar.n)
        self._writer.flush()
        seconds = time.monotonic() - began
        group.wait_for_all(f"encoded {self._encoder.name}")
        self._tell(seconds)
        del encode
        group.free_memory()
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
        try:
            with self._waiting():
                content = reading.result()
        except BadFile as bad:
            self._failures.append(Failure(self._source.kind, item, bad.reason))
            return None
        return torch.from_numpy(content) if isinstance(content, np.ndarray) else content

    @contextmanager
    def _waiting(self) -> Iterator[None]:
        """Counts the time inside: the encoder has nothing to do."""
        began = time.monotonic()
        try:
            yield
        finally:
            self._waited_seconds += time.monotonic() - began

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
        everyones = group.gather((self._num_done, seconds, self._waited_seconds))
        done, spent, waited = (sum(numbers) for numbers in zip(*everyones, strict=True))
        if world().is_main and done:
            longest = max(seconds for _, seconds, _ in everyones)
            busy = 1 - waited / spent
            print_line(
                f"{self._encoder.name}: {done:,} in {longest:.1f} s, {done / longest:.1f}/s; encoders busy {busy:.0%}"
            )
