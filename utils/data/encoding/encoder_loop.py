"""Runs one encoder after the other over the entries that the cache lacks; all ranks share the work through a queue.

An encoder gets one image or caption at a time: in a batch, the last bits of a result depend on the rest of the batch, and a
cache entry must not depend on which other entries were missing. A file that cannot be read is recorded and skipped by the
rank that reads it; the other ranks do not wait for it.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
import torch
from tqdm import tqdm

from models.family import EncodedItem, EncodeFunction, FrozenEncoder, ModelFamily
from utils.background import BackgroundWorker
from utils.console import bar_interval_seconds, print_line
from utils.data.cache.locks import WriterLock
from utils.data.cache.shards import ShardWriter
from utils.data.encoding.encoder_inputs import EncoderInputs, InputSource, Kind
from utils.data.encoding.masks import MaskEncoder
from utils.data.encoding.plan import CachePlan, Work
from utils.data.encoding.required import Item
from utils.data.sources.decoding import BadFile
from utils.distributed import group
from utils.distributed.world import world

MAX_UNWRITTEN = 8
"""Encoded items that may wait to be written."""


class Failure(NamedTuple):
    """An item that could not be encoded."""

    kind: Kind
    item: Item
    reason: str
    """A phrase such as "is empty (0 bytes)", to follow the name of the file or text."""


def encode_missing(
    family: ModelFamily, plan: CachePlan, inputs: EncoderInputs, device: torch.device, num_ahead: int
) -> list[Failure]:
    """Encodes everything that is missing. Called by all ranks; returns the failures of all ranks, on every rank."""
    failures: list[Failure] = []
    writer = WriterLock(plan.folders.cache)
    jobs: list[tuple[FrozenEncoder, Work, InputSource]] = [
        (family.image_encoder, plan.latents, inputs.images()),
        (MaskEncoder(family.latent.downscale), plan.masks, inputs.masks()),
        *((encoder, plan.texts[encoder.name], inputs.captions()) for encoder in family.text_encoders),
    ]
    for encoder, work, source in jobs:
        if len(work.items):
            failures += EncoderLoop(encoder, work, source, device, num_ahead, writer.name).run()
    writer.close()
    return [failure for found in group.gather(failures) for failure in found]


class EncoderLoop:
    """Encodes one encoder's missing entries on this rank: reads ahead, encodes, and writes in a background thread."""

    def __init__(
        self, encoder: FrozenEncoder, work: Work, source: InputSource, device: torch.device, num_ahead: int, writer: str
    ) -> None:
        self._encoder, self._work, self._source, self._device = encoder, work, source, device
        self._num_ahead = num_ahead
        self._writer = ShardWriter(work.folder, writer)
        self._failures: list[Failure] = []
        self._num_done, self._idle_seconds = 0, 0.0

    def run(self) -> list[Failure]:
        """Returns when all ranks have finished, with the failures of this rank. Called by all ranks."""
        is_main, total = world().is_main, len(self._work.items)
        queue = group.WorkQueue(f"encode {self._encoder.name}", total)
        encode: EncodeFunction | None = None
        title, interval = f"caching {self._encoder.name}", bar_interval_seconds()
        start = time.monotonic()
        with (
            tqdm(total=total, desc=title, unit="item", disable=not is_main, mininterval=interval) as bar,
            BackgroundWorker(self._finish, MAX_UNWRITTEN) as worker,
        ):
            for item, reading in self._read_ahead(queue):
                if encode is None:  # loaded on the first item: a rank that gets no work does not load the encoder
                    encode = self._encoder.load(self._device)
                    start, self._idle_seconds = time.monotonic(), 0.0
                content = self._wait_for(item, reading)
                if content is not None:
                    encoded = encode([content])[0]
                    with self._idle():
                        worker.put((item, encoded))
                if is_main:
                    bar.update(queue.num_taken() - bar.n)
        self._writer.flush()
        seconds = time.monotonic() - start
        group.wait_for_all(f"encoded {self._encoder.name}")
        self._report(seconds)
        del encode
        group.free_memory()
        return self._failures

    def _read_ahead(self, queue: Iterable[int]) -> Iterator[tuple[Item, Future[Any]]]:
        """Yields the queue's items with their futures; up to `num_ahead` further items are being read."""
        waiting: deque[tuple[Item, Future[Any]]] = deque()
        for index in queue:
            table, row, variant = self._work.items[index].tolist()
            item = (table, row, variant)
            waiting.append((item, self._source.read(item)))
            if len(waiting) > self._num_ahead:
                yield waiting.popleft()
        yield from waiting

    def _wait_for(self, item: Item, reading: Future[Any]) -> Any:
        """Returns the encoder's input, or None for an item that cannot be read."""
        try:
            with self._idle():
                content = reading.result()
        except BadFile as bad:
            self._failures.append(Failure(self._source.kind, item, bad.reason))
            return None
        return torch.from_numpy(content) if isinstance(content, np.ndarray) else content

    @contextmanager
    def _idle(self) -> Iterator[None]:
        """Counts the time inside as time in which the encoder is idle."""
        start = time.monotonic()
        try:
            yield
        finally:
            self._idle_seconds += time.monotonic() - start

    def _finish(self, encoded: tuple[Item, EncodedItem]) -> None:
        """Copies an encoded item to the CPU, checks it, and adds it to a shard. Called in the background thread."""
        item, tensors = encoded
        fetched = {name: tensor.cpu() for name, tensor in tensors.items()}
        if all(bool(tensor.isfinite().all()) for tensor in fetched.values()):
            self._writer.add(self._source.group(item), self._source.key(item), self._source.pack(fetched))
            self._num_done += 1
        else:
            reason = f"is encoded to NaN or Inf by {self._encoder.name}"
            self._failures.append(Failure(self._source.kind, item, reason))

    def _report(self, seconds: float) -> None:
        """Prints the encoding rate and the fraction of time in which encoders were busy, over all ranks."""
        all_ranks = group.gather((self._num_done, seconds, self._idle_seconds))
        done, total_seconds, idle_seconds = (sum(numbers) for numbers in zip(*all_ranks, strict=True))
        if done:
            longest = max(rank_seconds for _, rank_seconds, _ in all_ranks)
            utilisation = 1 - idle_seconds / total_seconds
            print_line(
                f"{self._encoder.name}: encoded {done:,} items in {longest:.1f} s "
                f"({done / longest:,.1f}/s, encoder utilisation {utilisation:.0%})",
                is_main=world().is_main,
            )
