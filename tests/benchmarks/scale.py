"""Measures time and memory by size of the dataset:  python -m tests.benchmarks.scale [--images 1000 10000 100000 1000000]

For each number of invented images (names of 30 letters, captions of 90, shards with tiny tensors of four encoders) a new
process opens what a rank opens, and reads the latents and text of 300 steps of 32 examples. Printed are the time of a step
other than the first of an epoch, the time of that first step, the resident memory relative to the smallest dataset, and the
peak memory of rank 0 while it scans and plans.
"""

from __future__ import annotations

import argparse
import gc
import json
import re
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from models.family import LENGTH
from utils.config.schema.dataset import DatasetConfig
from utils.data.batches import BatchOrder
from utils.data.cache.shards import ShardWriter
from utils.data.encoding.encoded import CacheFolders, EncodedData
from utils.data.encoding.required import required_captions, required_latents
from utils.data.examples import ExampleTable
from utils.data.scan import scan
from utils.data.sources.directory_index import DirectoryIndex, DirectoryIndexer, IndexPart, IndexSettings
from utils.data.sources.image_rows import set_captions, unread_rows
from utils.files.columns import Texts
from utils.files.file_index import FileTable

ROOT = Path(__file__).resolve().parents[2]
GLOBAL_BATCH, NUM_STEPS = 32, 300
ENCODERS = ("clip_l", "clip_g", "t5xxl")


class MadeUp(DirectoryIndexer):
    """Indexes images that do not exist."""

    def __init__(self, count: int) -> None:
        self._count = count

    def index(self, path: Path, settings: IndexSettings, excluded: Sequence[Path] = ()) -> DirectoryIndex:
        count = self._count
        names = Texts.of(f"folder_{index // 10_000:03d}/image_{index:08d}.jpg" for index in range(count))
        stamps = np.zeros((count, 3), np.int64)
        rows = unread_rows(names, stamps, stamps, np.arange(count))
        shapes = np.array([(1024, 1024), (1344, 768), (768, 1344), (1152, 896)], np.int32)
        rows.sizes = shapes[np.arange(count) % len(shapes)]
        rows.hashes[:, :8] = np.arange(1, count + 1, dtype="<u8")[:, None].view(np.uint8)
        caption = "image number {:08d}, with a caption about as long as people write them for their images"
        set_captions(rows, [[caption.format(index)] for index in range(count)])
        return DirectoryIndex([IndexPart(rows, None, FileTable(None, may_write=False), np.ones(count, bool))])


def make(folder: Path, count: int) -> dict[str, object]:
    """Writes the table of examples and a complete cache; returns what the measuring process needs."""
    config = DatasetConfig.model_validate({"resolutions": [1024], "directory": [{"path": str(folder)}]})
    began = time.monotonic()
    table = scan(config, 16, MadeUp(count)).examples
    file = table.save_in(folder / "datasets")
    planned, captions = required_latents([table]), required_captions([table], ())
    seconds, peak = time.monotonic() - began, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    latents = {"latents": torch.zeros(16, 1, 1)}
    text = {"sequence": torch.zeros(1, 8, dtype=torch.bfloat16), LENGTH: torch.zeros(2, dtype=torch.int32)}
    for name, keys, entry in (("vae", planned.keys, latents), *((name, captions.keys, text) for name in ENCODERS)):
        writer = ShardWriter(folder / name, "benchmark", max_bytes=2 * 2**20, max_seconds=1e9)
        for key in keys:
            writer.add("all", key.tobytes(), entry)
        writer.flush()
    return {"file": str(file), "folder": str(folder), "seconds": seconds, "peak_mib": peak}


def resident_bytes(table: Path) -> dict[str, float]:
    """Own memory, and mapped pages of the table's file. Mapped pages of shards are not counted: they are shared between
    processes, and released when memory is short."""
    gc.collect()
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    mapped, is_table = 0.0, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if re.match(r"[0-9a-f]+-[0-9a-f]+ ", line):
            is_table = line.endswith(str(table))
        elif is_table and line.startswith("Rss:"):
            mapped += float(line.split()[1]) * 1024
    return {"own": float(status["RssAnon"].split()[0]) * 1024, "table": mapped}


def train(file: Path, folder: Path) -> dict[str, float]:
    """Reads the steps as a rank does."""
    folders = CacheFolders(folder, folder / "vae", folder / "masks", {name: folder / name for name in ENCODERS})
    began = time.monotonic()
    table, data = ExampleTable.open(file), EncodedData(folders)
    order = BatchOrder(table, GLOBAL_BATCH, seed=0)
    order.steps_per_epoch  # noqa: B018  the buckets are sorted here
    opened = time.monotonic() - began
    firsts, others = [], []
    for step in range(NUM_STEPS):
        began = time.monotonic()
        for draw in order.global_batch(step):
            data.latents(draw.example)
            data.text(draw.example.caption())
        (firsts if step % order.steps_per_epoch == 0 else others).append(time.monotonic() - began)
    return {
        "opened": opened,
        "first_ms": 1e3 * max(firsts),
        "step_ms": 1e3 * statistics.median(others),
        **resident_bytes(file),
    }


def in_a_fresh_process(*arguments: str) -> dict[str, float]:
    command = [sys.executable, "-m", "tests.benchmarks.scale", *arguments]
    return dict(json.loads(subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True).stdout))


def main(counts: Sequence[int]) -> None:
    heads = ("images", "a step", "first step", "opening", "own bytes each", "table bytes each", "planning", "at its peak")
    print("  ".join(f"{head:>17}" for head in heads))
    smallest: dict[str, float] = {}
    for count in counts:
        with tempfile.TemporaryDirectory() as made:
            facts = in_a_fresh_process("--make", made, str(count))
            found = in_a_fresh_process("--train", str(facts["file"]), made)
        smallest = smallest or found
        cells = [f"{count:,}", f"{found['step_ms']:.2f} ms", f"{found['first_ms']:.1f} ms", f"{found['opened']:.2f} s"]
        cells += [f"{(found[name] - smallest[name]) / count:.0f}" for name in ("own", "table")]
        cells += [f"{facts['seconds']:.1f} s", f"{facts['peak_mib']:.0f} MiB"]
        print("  ".join(f"{cell:>17}" for cell in cells), flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=int, nargs="+", default=[1_000, 10_000, 100_000, 1_000_000])
    parser.add_argument("--make", nargs=2, help=argparse.SUPPRESS)
    parser.add_argument("--train", nargs=2, help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    if chosen.make:
        print(json.dumps(make(Path(chosen.make[0]), int(chosen.make[1]))))
    elif chosen.train:
        print(json.dumps(train(Path(chosen.train[0]), Path(chosen.train[1]))))
    else:
        main(chosen.images)
