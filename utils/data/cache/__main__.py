"""python -m utils.data.cache verify|prune|stats DIR"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from utils.data.cache.locks import CacheInUse
from utils.data.cache.maintenance import prune, stats, verify


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m utils.data.cache", description="Look after a cache of encoded data.")
    commands = parser.add_subparsers(dest="command", required=True)
    verifying = commands.add_parser("verify", help="read everything and compare it with its checksums; exit 1 for damage")
    pruning = commands.add_parser("prune", help="delete damaged shards, and those that no run has used for long")
    pruning.add_argument("--unused-days", type=float, default=30.0, help="how long is long (default: 30)")
    pruning.add_argument("--dry-run", action="store_true", help="only say what would be deleted")
    counting = commands.add_parser("stats", help="say what is in it")
    for command in (verifying, pruning, counting):
        command.add_argument("folder", type=Path, metavar="DIR", help="the cache: `cache_dir`, or `cache` in output_dir")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    """The exit code: 0, or 1 where something is wrong."""
    chosen = parse_arguments(arguments)
    if not chosen.folder.is_dir():
        print(f"{chosen.folder} is no folder", file=sys.stderr)
        return 1
    if chosen.command == "verify":
        return 1 if verify(chosen.folder) else 0
    if chosen.command == "stats":
        stats(chosen.folder)
        return 0
    try:
        prune(chosen.folder, unused_days=chosen.unused_days, dry_run=chosen.dry_run)
    except CacheInUse as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
