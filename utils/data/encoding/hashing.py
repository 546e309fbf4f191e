"""The hashes of the bytes of a dataset's files, by which the cache names what it encodes: read once, then remembered."""

from __future__ import annotations

import itertools
import time
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from pathlib import Path

import numpy as np
from tqdm import tqdm

from utils.data.dataset import ContentMemory
from utils.data.examples import ExampleTable, Unhashed
from utils.data.sources.decoding import BadFile
from utils.data.sources.readers import Readers
from utils.tracking.metrics import bar_seconds

HASHES_AT_ONCE = 16
"""Files that a reader process is asked to hash in one go."""
BATCHES_AHEAD = 64
REMEMBER_SECONDS = 60.0


def read_hashes(tables: Sequence[ExampleTable], memories: Sequence[ContentMemory], readers: Readers) -> list[BadFile]:
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
