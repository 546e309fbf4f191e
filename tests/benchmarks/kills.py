"""kill -9 at random moments of a caching pass of two ranks:  python -m tests.benchmarks.kills [--times 30] [--seed 0]

After each kill the pass is started again, and must end with the entries of an undisturbed pass, bit for bit, having encoded
nothing that a whole shard had. Shards are of three entries here, so that there are many.
"""

from __future__ import annotations

import argparse
import random
import tempfile
from pathlib import Path

from tests.distributed.kills import assert_nothing_was_lost, kill_and_go_on, make_pass, undisturbed
from tests.tiny_model import make_tiny_dataset, make_tiny_model


def main(times: int, seed: int) -> None:
    moments = random.Random(seed)
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made)
        work = make_pass(folder / "pass", make_tiny_model(folder / "model"), make_tiny_dataset(folder / "images", 24))
        whole = undisturbed(work)
        print(f"undisturbed: {len(whole.entries)} entries in {whole.seconds:.1f} s", flush=True)
        for number in range(1, times + 1):
            seconds = moments.uniform(0, whole.seconds)
            outcome = kill_and_go_on(work, seconds)
            assert_nothing_was_lost(outcome, whole)
            print(f"{number:2}: killed after {seconds:.2f} s: {outcome.describe()}", flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--times", type=int, default=30)
    parser.add_argument("--seed", type=int, default=0)
    chosen = parser.parse_args()
    main(chosen.times, chosen.seed)
