"""Looking after a cache folder: what is in it, whether it is whole, and what of it nobody needs any more."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from utils.data.cache.locks import WRITERS, exclusive_use, remove_leftovers
from utils.data.cache.shards import CHECKSUMS, KEYS, SHARD_FILES, DamagedShard, checksum, entry_of, map_shard, shard_name
from utils.tracking.metrics import bytes_in_words

DAY_SECONDS = 86400.0
_REMADE = ("files", "datasets")
"""Folders of files that a run makes anew when it needs them: what was listed, and tables of examples."""


@dataclass(frozen=True)
class ShardFacts:
    """A shard, or a file in the place of one."""

    path: Path
    num_entries: int
    num_bytes: int
    unused_days: float
    damage: str | None
    """What is wrong with it."""

    @property
    def encoder(self) -> str:
        """The folder of its encoder."""
        return self.path.parents[1].name


def look_at_shards(cache_folder: Path, *, checksums: bool) -> Iterator[ShardFacts]:
    """Every shard; with `checksums`, every byte of it is read and compared with what was written."""
    for path in sorted(cache_folder.glob(f"*/*/{SHARD_FILES}")):
        status = path.stat()
        num_entries, damage = 0, None
        try:
            tensors = map_shard(path)
            num_entries = len(tensors[KEYS])
            if checksums:
                bad = [row for row in range(num_entries) if not _is_as_written(tensors, row)]
                damage = f"{len(bad)} of {num_entries} entries are not what was written" if bad else None
                if shard_name(key.numpy().tobytes() for key in tensors[KEYS]) != path.stem:
                    damage = "its keys are not those that gave it its name"
        except DamagedShard as error:
            damage = str(error)
        yield ShardFacts(path, num_entries, status.st_size, (time.time() - status.st_mtime) / DAY_SECONDS, damage)


def _is_as_written(tensors: Mapping[str, Tensor], row: int) -> bool:
    return checksum(entry_of(tensors, row)) == tensors[CHECKSUMS][row].numpy().tobytes()


def verify(cache_folder: Path) -> int:
    """Read everything and compare; says what is damaged. Returns how many shards are."""
    num_damaged, num_entries, num_bytes = 0, 0, 0
    for facts in look_at_shards(cache_folder, checksums=True):
        num_entries += facts.num_entries
        num_bytes += facts.num_bytes
        if facts.damage is not None:
            num_damaged += 1
            print(f"damaged: {facts.path}: {facts.damage}")
    print(f"{num_entries:,} entries in {bytes_in_words(num_bytes)}: {num_damaged} damaged shards")
    if num_damaged:
        print(f"`python -m utils.data.cache prune {cache_folder}` removes them; the next run encodes what was in them anew")
    return num_damaged


@dataclass
class _Group:
    """The shards of one encoder and one size."""

    num_shards: int = 0
    num_entries: int = 0
    num_bytes: int = 0
    unused_days: float = float("inf")

    def add(self, facts: ShardFacts) -> None:
        self.num_shards += 1
        self.num_entries += facts.num_entries
        self.num_bytes += facts.num_bytes
        self.unused_days = min(self.unused_days, facts.unused_days)

    def cells(self) -> tuple[str, ...]:
        used = "today" if self.unused_days < 1 else f"{self.unused_days:.0f} days ago"
        return f"{self.num_shards:,}", f"{self.num_entries:,}", bytes_in_words(self.num_bytes), used


def stats(cache_folder: Path) -> None:
    """Say what is in the cache: by encoder and by size of what was encoded."""
    groups: dict[tuple[str, str], _Group] = {}
    for facts in look_at_shards(cache_folder, checksums=False):
        groups.setdefault((facts.encoder, facts.path.parent.name), _Group()).add(facts)
    rows: list[tuple[str, ...]] = [("encoder", "of", "shards", "entries", "room", "used")]
    rows += [(*names, *group.cells()) for names, group in groups.items()]
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    for row in rows:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
    print(f"{len(groups)} groups, {bytes_in_words(sum(group.num_bytes for group in groups.values()))} in all")


def prune(cache_folder: Path, *, unused_days: float, dry_run: bool) -> None:
    """Delete, or only list, what nobody needs: shards that are damaged or that no run has used for so many days, and what
    killed runs have left behind. A shard is kept as long as one of its entries is used.

    Raises CacheInUse while a run uses the cache.
    """
    with exclusive_use(cache_folder):
        doomed = {path: "left by a run that was killed" for path in remove_leftovers(cache_folder, dry_run=True)}
        for facts in look_at_shards(cache_folder, checksums=True):
            if facts.damage is not None:
                doomed[facts.path] = "damaged"
            elif facts.unused_days > unused_days:
                doomed[facts.path] = f"not used for {facts.unused_days:.0f} days"
        for name in _REMADE:
            for path in sorted((cache_folder / name).glob(SHARD_FILES)):
                if time.time() - path.stat().st_mtime > unused_days * DAY_SECONDS:
                    doomed[path] = "not used any more"
        for name in (*_REMADE, WRITERS):  # whoever wrote them is not here any more
            doomed |= {path: "left by a run that was killed" for path in (cache_folder / name).glob(".*.tmp")}
        total = sum(path.stat().st_size for path in doomed)
        for path, reason in doomed.items():
            print(f"{'would delete' if dry_run else 'deleted'} {path}: {reason}")
            if not dry_run:
                path.unlink(missing_ok=True)
        print(f"{len(doomed)} files, {bytes_in_words(total)}{' could be had' if dry_run else ' deleted'}")
