"""Hashes of a dataset's image files, from which cache keys are computed. Each file is hashed once; its hash is stored."""

from __future__ import annotations

import itertools
import time
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from pathlib import Path

import numpy as np
from tqdm import tqdm

from utils.console import bar_interval_seconds
from utils.data.examples import ExampleTable, Unhashed
from utils.data.sources.decoding import BadFile
from utils.data.sources.readers import Readers
from utils.files.file_index import StoredHashes

FILES_PER_REQUEST = 16
"""Number of files per request to a reader process."""
REQUESTS_AHEAD = 64
SAVE_INTERVAL_SECONDS = 60.0


def hash_files(tables: Sequence[ExampleTable], stored: Sequence[StoredHashes], readers: Readers) -> list[BadFile]:
    """Hashes the files of the tables that have no hash yet and saves the hashes; returns the unreadable files."""
    bad_files: list[BadFile] = []
    count = sum(table.num_unhashed() for table in tables)
    todo = (entry for table in tables for entry in table.unhashed())
    saved_at = time.monotonic()
    with tqdm(
        total=count, desc="reading files", unit="file", leave=False, delay=2.0, mininterval=bar_interval_seconds()
    ) as bar:
        for (column, row, file), result in _hashes(todo, readers):
            if isinstance(result, str):
                bad_files.append(BadFile(Path(str(file)), result))
            else:
                column[row] = np.frombuffer(result, np.uint8)
            bar.update()
            if time.monotonic() - saved_at > SAVE_INTERVAL_SECONDS:
                _save(stored)
                saved_at = time.monotonic()
    if count:
        _save(stored)
    return bad_files


def _save(stored: Sequence[StoredHashes]) -> None:
    for part in stored:
        part.save()


def _hashes(todo: Iterator[Unhashed], readers: Readers) -> Iterator[tuple[Unhashed, bytes | str]]:
    """Yields each file with its hash, or with the reason why it cannot be read. Several requests are in flight."""
    waiting: deque[tuple[list[Unhashed], Future[list[bytes | str]]]] = deque()
    while batch := list(itertools.islice(todo, FILES_PER_REQUEST)):
        waiting.append((batch, readers.hashes([file for _, _, file in batch])))
        if len(waiting) > REQUESTS_AHEAD:
            first, future = waiting.popleft()
            yield from zip(first, future.result(), strict=True)
    for first, future in waiting:
        yield from zip(first, future.result(), strict=True)
