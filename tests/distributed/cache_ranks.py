"""Runs train.py with small shards and logs every encoded entry; the program of each rank in test_cache_kills.py.

The environment variable CACHE_LOG is the path of the log. A line has the folder of the encoder and the key of the entry.
"""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

import train
from utils.data.cache.shards import ShardWriter

LOG = "CACHE_LOG"
ENTRIES_A_SHARD = 3
SECONDS_AN_ENTRY = 0.04

_add = ShardWriter.add
_init = ShardWriter.__init__


def _make_small(self: ShardWriter, folder: Path, writer: str, **_limits: Any) -> None:
    _init(self, folder, writer, max_bytes=2**40, max_seconds=1e9)
    self._num_added = 0  # type: ignore[attr-defined]


def _add_and_log(self: ShardWriter, group: str, key: bytes, tensors: Mapping[str, Tensor]) -> None:
    time.sleep(SECONDS_AN_ENTRY)
    with open(os.environ[LOG], "a", encoding="utf-8") as file:
        file.write(f"{self.folder.name} {key.hex()}\n")
    _add(self, group, key, tensors)
    self._num_added += 1  # type: ignore[attr-defined]
    if self._num_added % ENTRIES_A_SHARD == 0:  # type: ignore[attr-defined]
        self.flush()


def main() -> None:
    ShardWriter.__init__ = _make_small  # type: ignore[method-assign]
    ShardWriter.add = _add_and_log  # type: ignore[method-assign]
    train.main()
