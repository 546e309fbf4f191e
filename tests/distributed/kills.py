"""Caching passes of two ranks that are killed, and what a second start makes of them. For a test and a benchmark."""

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
"""(Encoder's folder, key) -> checksum of all the entry's bytes."""


def entries_of(cache: Path) -> Entries:
    """Every entry of every shard that is there."""
    entries: Entries = {}
    for path in cache.glob("*/*/*.safetensors"):
        tensors = map_shard(path)
        for key, checksum in zip(tensors[KEYS].numpy(), tensors[CHECKSUMS].numpy(), strict=True):
            entries[path.parents[1].name, key.tobytes()] = checksum.tobytes()
    return entries


@dataclass(frozen=True)
class Pass:
    """An experiment whose caching pass is run again and again."""

    experiment: Path

    @property
    def cache(self) -> Path:
        return self.experiment.parent / "output" / "cache"

    def start(self, name: str) -> Ranks:
        """`--cache-only` of two ranks; what they encode is written into the file of that name."""
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
        """What a start has encoded, and how often."""
        lines = (self.experiment.parent / f"{name}.txt").read_text(encoding="utf-8").splitlines()
        parts = (line.split(" ") for line in lines if line.count(" ") == 1 and len(line.split(" ")[1]) == 32)
        return Counter((folder, bytes.fromhex(key)) for folder, key in parts)


def make_pass(folder: Path, model: Path, images: Path) -> Pass:
    changes = {"resolutions": [32, 48], "directory": [{"path": str(images), "horizontal_flip": True}]}
    return Pass(write_experiment(folder, model, images, dataset_file=changes))


@dataclass(frozen=True)
class Undisturbed:
    """A pass nobody has killed."""

    entries: Entries
    seconds: float
    """How long it encoded."""


def undisturbed(work: Pass) -> Undisturbed:
    ranks = work.start("undisturbed")
    log = work.experiment.parent / "undisturbed.txt"
    while not log.stat().st_size:
        time.sleep(0.005)
    began = time.time()
    finished = ranks.wait()
    assert finished.exit_code == 0, finished.output
    seconds = log.stat().st_mtime - began
    entries = entries_of(work.cache)
    counts = work.encoded("undisturbed")
    assert set(counts) == set(entries) and set(counts.values()) == {1}
    return Undisturbed(entries, seconds)


@dataclass(frozen=True)
class Outcome:
    """What a killed pass left, and what a second start made of it."""

    kept: Entries
    """In whole shards after the kill."""
    added: int
    """Entries the killed pass had encoded."""
    again: Counter[tuple[str, bytes]]
    """What the second start encoded."""
    entries: Entries
    """In the end."""
    leftovers: list[Path]
    """Unfinished files in the end."""

    def describe(self) -> str:
        return f"{len(self.kept)} of {len(self.entries)} kept, {self.added - len(self.kept)} encoded twice"


def kill_and_go_on(work: Pass, seconds: float) -> Outcome:
    """Kill both ranks so many seconds after the first entry of a new cache, and start again."""
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


def assert_nothing_was_lost(outcome: Outcome, whole: Undisturbed) -> None:
    """The cache is an undisturbed pass's, and nothing was encoded that a whole shard had."""
    assert outcome.entries == whole.entries
    assert set(outcome.again.values()) <= {1}
    assert not outcome.again.keys() & outcome.kept.keys()
    assert outcome.again.keys() | outcome.kept.keys() == whole.entries.keys()
    assert outcome.leftovers == []
