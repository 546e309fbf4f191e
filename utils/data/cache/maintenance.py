"""Maintenance of a cache folder: checksums, statistics, and deletion of damaged or unused shards."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from utils.console import format_bytes
from utils.data.cache.locks import WRITERS, exclusive_lock, remove_leftovers
from utils.data.cache.shards import CHECKSUMS, KEYS, SHARD_FILES, DamagedShard, checksum, entry_of, map_shard, shard_name

DAY_SECONDS = 86400.0
_REBUILT_FOLDERS = ("files", "datasets")
"""Folders whose files a run rebuilds when they are missing: scanned directories and tables of examples."""
_LEFTOVER = "left by a run that was killed"


@dataclass(frozen=True)
class ShardFacts:
    """A file with the name of a shard."""

    path: Path
    num_entries: int
    num_bytes: int
    unused_days: float
    damage: str | None
    """Description of the damage; None for an intact shard."""

    @property
    def encoder(self) -> str:
        """Name of the encoder's folder."""
        return self.path.parents[1].name


def inspect_shards(cache_folder: Path, *, checksums: bool) -> Iterator[ShardFacts]:
    """Yields every shard. With `checksums`, every entry is read and compared with its checksum."""
    for path in sorted(cache_folder.glob(f"*/*/{SHARD_FILES}")):
        status = path.stat()
        num_entries, damage = 0, None
        try:
            tensors = map_shard(path)
            num_entries = len(tensors[KEYS])
            if checksums:
                num_bad = sum(not _matches_checksum(tensors, row) for row in range(num_entries))
                damage = f"{num_bad} of {num_entries} entries differ from their checksums" if num_bad else None
                if shard_name(key.numpy().tobytes() for key in tensors[KEYS]) != path.stem:
                    damage = "its keys do not match its name"
        except DamagedShard as error:
            damage = str(error)
        yield ShardFacts(path, num_entries, status.st_size, (time.time() - status.st_mtime) / DAY_SECONDS, damage)


def _matches_checksum(tensors: Mapping[str, Tensor], row: int) -> bool:
    return checksum(entry_of(tensors, row)) == tensors[CHECKSUMS][row].numpy().tobytes()


def verify(cache_folder: Path) -> int:
    """Compares every entry with its checksum and prints the damaged shards; returns their number."""
    num_damaged, num_entries, num_bytes = 0, 0, 0
    for facts in inspect_shards(cache_folder, checksums=True):
        num_entries += facts.num_entries
        num_bytes += facts.num_bytes
        if facts.damage is not None:
            num_damaged += 1
            print(f"damaged: {facts.path}: {facts.damage}")
    print(f"{num_entries:,} entries, {format_bytes(num_bytes)}: {num_damaged} damaged shards")
    if num_damaged:
        print(f"`python -m utils.data.cache prune {cache_folder}` deletes them; the next run encodes their entries again")
    return num_damaged


@dataclass
class _Group:
    """Totals of the shards of one encoder and one group."""

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
        return f"{self.num_shards:,}", f"{self.num_entries:,}", format_bytes(self.num_bytes), used


def stats(cache_folder: Path) -> None:
    """Prints the number and size of the shards of each encoder and group (bucket, or captions)."""
    groups: dict[tuple[str, str], _Group] = {}
    for facts in inspect_shards(cache_folder, checksums=False):
        groups.setdefault((facts.encoder, facts.path.parent.name), _Group()).add(facts)
    rows: list[tuple[str, ...]] = [("encoder", "group", "shards", "entries", "size", "last used")]
    rows += [(*names, *group.cells()) for names, group in groups.items()]
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    for row in rows:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
    print(f"{len(groups)} groups, {format_bytes(sum(group.num_bytes for group in groups.values()))} in total")


def prune(cache_folder: Path, *, unused_days: float, dry_run: bool) -> None:
    """Deletes damaged shards, shards that no run has used for `unused_days`, and leftovers of killed runs.

    A shard is kept as long as one of its entries is used. `dry_run` only prints the files. Raises CacheInUse while a run
    uses the cache.
    """
    with exclusive_lock(cache_folder):
        files = _files_to_delete(cache_folder, unused_days)
        total = sum(path.stat().st_size for path in files)
        for path, reason in files.items():
            print(f"{'would delete' if dry_run else 'deleted'} {path}: {reason}")
            if not dry_run:
                path.unlink(missing_ok=True)
        print(f"{len(files)} files, {format_bytes(total)}{' would be freed' if dry_run else ' freed'}")


def _files_to_delete(cache_folder: Path, unused_days: float) -> dict[Path, str]:
    """Path -> reason. The cache must be locked exclusively."""
    files = {path: _LEFTOVER for path in remove_leftovers(cache_folder, dry_run=True)}
    for facts in inspect_shards(cache_folder, checksums=True):
        if facts.damage is not None:
            files[facts.path] = "damaged"
        elif facts.unused_days > unused_days:
            files[facts.path] = f"not used for {facts.unused_days:.0f} days"
    for name in _REBUILT_FOLDERS:
        for path in sorted((cache_folder / name).glob(SHARD_FILES)):
            days = (time.time() - path.stat().st_mtime) / DAY_SECONDS
            if days > unused_days:
                files[path] = f"not used for {days:.0f} days"
    for name in (*_REBUILT_FOLDERS, WRITERS):  # no run uses the cache, so their writers have ended
        files |= {path: _LEFTOVER for path in (cache_folder / name).glob(".*.tmp")}
    return files
