"""Kills caching of two ranks and starts it again. Used by a test and a benchmark."""

from __future__ import annotations

import shutil
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from tests.distributed.cache_ranks import LOG
from tests.distributed.launch import Ranks, start_ranks
from tests.tiny_model import write_experiment
from utils.data.cache.shards import CHECKSUMS, KEYS, map_shard

NUM_RANKS = 2
Entries = dict[tuple[str, bytes], bytes]
"""(Folder of the encoder, key) -> checksum of the entry."""


def entries_of(cache: Path) -> Entries:
    """Returns the entries of all shards."""
    entries: Entries = {}
    for path in cache.glob("*/*/*.safetensors"):
        tensors = map_shard(path)
        for key, checksum in zip(tensors[KEYS].numpy(), tensors[CHECKSUMS].numpy(), strict=True):
            entries[path.parents[1].name, key.tobytes()] = checksum.tobytes()
    return entries


@dataclass(frozen=True)
class CachingExperiment:
    """An experiment whose dataset is cached repeatedly."""

    experiment: Path

    @property
    def cache(self) -> Path:
        return self.experiment.parent / "output" / "cache"

    def start(self, name: str) -> Ranks:
        """Starts `--cache-only` on two ranks; the encoded entries are logged to a file with this name."""
        log = self.experiment.parent / f"{name}.txt"
        log.touch()
        return start_ranks(
            NUM_RANKS,
            ["--config", str(self.experiment), "--cache-only"],
            self.experiment.parent / f"{name}_output.txt",
            "tests.distributed.cache_ranks",
            {LOG: str(log)},
        )

    def encoded(self, name: str) -> Counter[tuple[str, bytes]]:
        """Returns how often each entry was encoded in the start with this name."""
        lines = (self.experiment.parent / f"{name}.txt").read_text(encoding="utf-8").splitlines()
        parts = (line.split(" ") for line in lines if line.count(" ") == 1 and len(line.split(" ")[1]) == 32)
        return Counter((folder, bytes.fromhex(key)) for folder, key in parts)


def make_experiment(folder: Path, model: Path, images: Path) -> CachingExperiment:
    changes = {"resolutions": [32, 48], "directory": [{"path": str(images), "horizontal_flip": True}]}
    return CachingExperiment(write_experiment(folder, model, images, dataset_file=changes))


@dataclass(frozen=True)
class Uninterrupted:
    """The result of caching without a kill."""

    entries: Entries
    seconds: float
    """Duration of encoding."""


def run_uninterrupted(work: CachingExperiment) -> Uninterrupted:
    ranks = work.start("uninterrupted")
    log = work.experiment.parent / "uninterrupted.txt"
    while not log.stat().st_size:
        time.sleep(0.005)
    start = time.time()
    finished = ranks.wait()
    assert finished.exit_code == 0, finished.output
    seconds = log.stat().st_mtime - start
    entries = entries_of(work.cache)
    counts = work.encoded("uninterrupted")
    assert set(counts) == set(entries) and set(counts.values()) == {1}
    return Uninterrupted(entries, seconds)


@dataclass(frozen=True)
class Outcome:
    """The cache after a kill and after a second start."""

    kept: Entries
    """Entries in complete shards after the kill."""
    added: int
    """Number of entries that were encoded before the kill."""
    again: Counter[tuple[str, bytes]]
    """Entries that the second start encoded, and how often."""
    entries: Entries
    """Entries after the second start."""
    leftovers: list[Path]
    """Temporary files after the second start."""

    def describe(self) -> str:
        return f"{len(self.kept)} of {len(self.entries)} kept, {self.added - len(self.kept)} encoded twice"


def kill_and_restart(work: CachingExperiment, seconds: float) -> Outcome:
    """Kills both ranks `seconds` after the first entry of a new cache, and starts again."""
    shutil.rmtree(work.cache, ignore_errors=True)
    for name in ("killed", "second"):
        (work.experiment.parent / f"{name}.txt").unlink(missing_ok=True)
    ranks = work.start("killed")
    log = work.experiment.parent / "killed.txt"
    while not log.stat().st_size:
        time.sleep(0.002)
    time.sleep(seconds)
    ranks.kill()
    kept = entries_of(work.cache)
    finished = work.start("second").wait()
    assert finished.exit_code == 0, finished.output
    leftovers = list(work.cache.rglob(".*.tmp"))
    added = sum(work.encoded("killed").values())
    return Outcome(kept, added, work.encoded("second"), entries_of(work.cache), leftovers)


def assert_nothing_was_lost(outcome: Outcome, expected: Uninterrupted) -> None:
    """The cache equals the one of an uninterrupted start, and no entry of a complete shard was encoded again."""
    assert outcome.entries == expected.entries
    assert set(outcome.again.values()) <= {1}
    assert not outcome.again.keys() & outcome.kept.keys()
    assert outcome.again.keys() | outcome.kept.keys() == expected.entries.keys()
    assert outcome.leftovers == []
