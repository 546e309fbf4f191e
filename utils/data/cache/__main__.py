"""python -m utils.data.cache verify|prune|stats DIR"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from utils.data.cache.locks import CacheInUse, is_cache
from utils.data.cache.maintenance import prune, stats, verify


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m utils.data.cache", description="Look after a cache of encoded data.")
    commands = parser.add_subparsers(dest="command", required=True)
    verifying = commands.add_parser("verify", help="read everything and compare it with its checksums; exit 1 for damage")
    pruning = commands.add_parser("prune", help="delete damaged shards, and those that no run has used for long")
    pruning.add_argument("--unused-days", type=_days, default=30.0, help="how long is long (default: 30)")
    pruning.add_argument("--dry-run", action="store_true", help="only say what would be deleted")
    counting = commands.add_parser("stats", help="say what is in it")
    for command in (verifying, pruning, counting):
        command.add_argument("folder", type=Path, metavar="DIR", help="the cache: `cache_dir`, or `cache` in output_dir")
    return parser.parse_args(arguments)


def _days(text: str) -> float:
    days = float(text)
    if not days >= 0:  # also what is no number
        raise argparse.ArgumentTypeError(f"must be 0 or more, is {text}")
    return days


def main(arguments: Sequence[str] | None = None) -> int:
    """The exit code: 0, or 1 where something is wrong."""
    chosen = parse_arguments(arguments)
    if not chosen.folder.is_dir():
        print(f"{chosen.folder} is no folder", file=sys.stderr)
        return 1
    if not is_cache(chosen.folder):  # it may be a folder of models: nothing in there is ours to judge
        print(f"{chosen.folder} is no cache: no run has ever used it as its cache_dir", file=sys.stderr)
        return 1
    try:
        return _look_after(chosen)
    except (CacheInUse, OSError) as error:
        print(error, file=sys.stderr)
        return 1


def _look_after(chosen: argparse.Namespace) -> int:
    """Do the command; the exit code."""
    if chosen.command == "verify":
        return 1 if verify(chosen.folder) else 0
    if chosen.command == "stats":
        stats(chosen.folder)
    else:
        prune(chosen.folder, unused_days=chosen.unused_days, dry_run=chosen.dry_run)
    return 0


if __name__ == "__main__":
    sys.exit(main())
