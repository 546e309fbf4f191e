"""Command line of the cache: python -m utils.data.cache verify|prune|stats DIR"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from utils.data.cache.locks import CacheInUse, is_cache
from utils.data.cache.maintenance import prune, stats, verify


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m utils.data.cache", description="Check, clean up or summarise a cache of encoded data."
    )
    commands = parser.add_subparsers(dest="command", required=True)
    verify_command = commands.add_parser("verify", help="compare every entry with its checksum; exit 1 for damage")
    prune_command = commands.add_parser("prune", help="delete damaged shards and shards that no run has used recently")
    prune_command.add_argument(
        "--unused-days", type=_days, default=30.0, help="delete shards unused for more days than this (default: 30)"
    )
    prune_command.add_argument("--dry-run", action="store_true", help="only print what would be deleted")
    stats_command = commands.add_parser("stats", help="print the number and size of the shards of each encoder")
    for command in (verify_command, prune_command, stats_command):
        command.add_argument("folder", type=Path, metavar="DIR", help="the cache: `cache_dir`, or `cache` in output_dir")
    return parser.parse_args(arguments)


def _days(text: str) -> float:
    days = float(text)
    if not days >= 0:  # true for NaN as well
        raise argparse.ArgumentTypeError(f"must be 0 or more, is {text}")
    return days


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command; returns the exit code: 0, or 1 for damage and errors."""
    options = parse_arguments(arguments)
    if not options.folder.is_dir():
        print(f"{options.folder} is not a folder", file=sys.stderr)
        return 1
    if not is_cache(options.folder):  # for example a folder of models, whose files must not be deleted
        print(f"{options.folder} is not a cache: no run has used it as its cache_dir", file=sys.stderr)
        return 1
    try:
        return _run_command(options)
    except (CacheInUse, OSError) as error:
        print(error, file=sys.stderr)
        return 1


def _run_command(options: argparse.Namespace) -> int:
    """Returns the exit code."""
    if options.command == "verify":
        return 1 if verify(options.folder) else 0
    if options.command == "stats":
        stats(options.folder)
    else:
        prune(options.folder, unused_days=options.unused_days, dry_run=options.dry_run)
    return 0


if __name__ == "__main__":
    sys.exit(main())
