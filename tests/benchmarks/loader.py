"""Measures how long training waits for data:  python -m tests.benchmarks.loader [--steps 60]   (after `make quickstart`)

Two stages train the quickstart's model from a complete cache. Printed is, for each rank, the fraction of a step's time in
which the network waits for micro-batches that are not ready.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from collections.abc import Generator, Iterable
from pathlib import Path
from typing import Any, NoReturn

import train
from tests.distributed.launch import start_ranks
from utils import background
from utils.distributed import group
from utils.distributed.world import world
from utils.pipeline import feed

RANKS = 2
PLACE = "BENCHMARK_FOLDER"
CONFIG = "examples/quickstart.toml"
FIRST_STEPS = 5
"""Steps that are not counted, because the first ones are slower."""

_waits: list[float] = []
_moments: list[float] = []


def _timed_prefetch(items: Iterable[Any], depth: int) -> Generator[Any, None, None]:
    ready = background.prefetch(items, depth)
    while True:
        began = time.perf_counter()
        try:
            item = next(ready)
        except StopIteration:
            return
        finally:
            _waits.append(time.perf_counter() - began)
            _moments.append(began)
        yield item


def main() -> None:
    """Runs one rank."""
    feed.prefetch = _timed_prefetch
    finish = group.finish

    def write_and_finish(exit_code: int = 0) -> NoReturn:
        path = Path(os.environ[PLACE]) / f"rank_{world().rank}.json"
        path.write_text(json.dumps({"waits": _waits, "moments": _moments}))
        finish(exit_code)

    group.finish = write_and_finish
    train.main()


def measure(num_steps: int) -> None:
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made)
        changes = [f"max_steps={num_steps}", f"output_dir={folder / 'output'}", "sampling.prompts=[]"]
        overrides = [part for change in changes for part in ("--set", change)]
        arguments = ["--config", CONFIG, *overrides]
        finished = start_ranks(RANKS, arguments, folder / "log.txt", "tests.benchmarks.loader", {PLACE: made}).wait(600)
        assert finished.exit_code == 0, finished.output
        for rank in range(RANKS):
            facts = json.loads((folder / f"rank_{rank}.json").read_text())
            first = FIRST_STEPS * len(facts["waits"]) // num_steps
            waited, spent = sum(facts["waits"][first:]), facts["moments"][-1] - facts["moments"][first]
            steps = num_steps - FIRST_STEPS
            each, of_it = 1e3 * spent / steps, 1e3 * waited / steps
            print(f"rank {rank}: {each:.1f} ms per step, of which {of_it:.3f} ms waiting: {waited / spent:.2%}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=60)
    measure(parser.parse_args().steps)
