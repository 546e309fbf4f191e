"""Kills caching of two ranks at random times:  python -m tests.benchmarks.kills [--times 30] [--seed 0]

After each kill (SIGKILL) caching is started again. It must produce the entries of an uninterrupted start, bit for bit, and
encode no entry of a complete shard again. Shards have three entries here, so that there are many.
"""

from __future__ import annotations

import argparse
import random
import tempfile
from pathlib import Path

from tests.distributed.kills import assert_nothing_was_lost, kill_and_restart, make_experiment, run_uninterrupted
from tests.tiny_model import make_tiny_dataset, make_tiny_model


def main(times: int, seed: int) -> None:
    generator = random.Random(seed)
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made)
        work = make_experiment(
            folder / "experiment", make_tiny_model(folder / "model"), make_tiny_dataset(folder / "images", 24)
        )
        expected = run_uninterrupted(work)
        print(f"uninterrupted: {len(expected.entries)} entries in {expected.seconds:.1f} s", flush=True)
        for number in range(1, times + 1):
            seconds = generator.uniform(0, expected.seconds)
            outcome = kill_and_restart(work, seconds)
            assert_nothing_was_lost(outcome, expected)
            print(f"{number:2}: killed after {seconds:.2f} s: {outcome.describe()}", flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--times", type=int, default=30)
    parser.add_argument("--seed", type=int, default=0)
    chosen = parser.parse_args()
    main(chosen.times, chosen.seed)
