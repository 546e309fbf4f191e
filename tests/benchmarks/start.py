"""Measures the start of a run with a complete cache:  python -m tests.benchmarks.start [--images 100000]

Makes that many different images and captions, and a complete cache of tensors with the right shapes; then measures the whole
command `train.py --cache-only`: imports, directory scan, planning, opening the cache. The first start reads every header,
caption and byte; the second one detects that nothing has changed. The same command with 12 images serves as a baseline.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from tests.tiny_model import make_tiny_dataset, make_tiny_model, write_experiment
from utils.data.cache.shards import ShardWriter
from utils.data.encoding.encoded import caption_key, latents_key
from utils.data.encoding.plan import CacheSettings, make_plan
from utils.data.examples import ExampleTable
from utils.distributed.world import World
from utils.run.prepare import prepare

ROOT = Path(__file__).resolve().parents[2]
IMAGES_PER_FOLDER = 10_000


def make_images(folder: Path, count: int) -> None:
    """Writes different images of 16 x 16 pixels with captions into folders of ten thousand."""
    for index in range(count):
        inner = folder / f"{index // IMAGES_PER_FOLDER:03d}"
        if index % IMAGES_PER_FOLDER == 0:
            inner.mkdir(parents=True)
        colour = (index % 256, index // 256 % 256, index // 65536)
        Image.new("RGB", (16, 16), colour).save(inner / f"{index:07d}.png")
        (inner / f"{index:07d}.txt").write_text(f"image number {index}, of a colour that no other image has in this set")


def fill_cache(experiment_path: Path) -> None:
    """Fills the cache with zeros for all entries that a run would encode. An earlier start has hashed the images."""
    experiment = prepare(experiment_path, [], None, World(0, 0, 1, 1))
    config, family = experiment.config.experiment, experiment.family
    settings = CacheSettings(config.cache_folder, False, None)
    newest = max((config.cache_folder / "datasets").glob("*.safetensors"), key=lambda path: path.stat().st_mtime)
    table = ExampleTable.open(newest)
    plan = make_plan(family, [table], [""], settings)
    writer = ShardWriter(plan.latents.folder, "benchmark", max_seconds=1e9)
    for _, row, _ in plan.latents.items.tolist():
        example = table[row]
        latents = torch.zeros(family.latent.channels, example.bucket.height // 8, example.bucket.width // 8)
        writer.add(str(example.bucket), latents_key(example.image_hash, example.box.key()), {"latents": latents})
    writer.flush()
    for encoder in family.text_encoders:
        writer = ShardWriter(plan.texts[encoder.name].folder, "benchmark", max_seconds=1e9)
        entry: dict[str, Tensor] = {name: torch.zeros(shape, dtype=encoder.dtype) for name, shape in encoder.shapes.items()}
        entry["length"] = torch.tensor([5, 5], dtype=torch.int32)
        for table_number, row, number in plan.texts[encoder.name].items.tolist():
            writer.add("captions", caption_key("" if table_number < 0 else table[row].caption(number)), entry)
        writer.flush()


def seconds_of(experiment: Path, *arguments: str, stop_at: str = "") -> float:
    """The duration of the whole command, or until it prints `stop_at`."""
    began = time.monotonic()
    command = [sys.executable, "train.py", "--config", str(experiment), *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    process = subprocess.Popen(command, cwd=ROOT, env=environment, text=True, **pipes)
    assert process.stdout is not None
    output = []
    for line in process.stdout:
        output.append(line)
        if stop_at and stop_at in line:
            process.kill()
            return time.monotonic() - began
    if process.wait() or stop_at:
        raise RuntimeError("".join(output))
    return time.monotonic() - began


def measure(folder: Path, count: int) -> None:
    model = make_tiny_model(folder / "model")
    few = write_experiment(folder / "few", model, make_tiny_dataset(folder / "twelve"))
    seconds_of(few, "--cache-only")
    print(f"12 images, complete cache: {min(seconds_of(few, '--cache-only') for _ in range(3)):.2f} s")
    began = time.monotonic()
    make_images(folder / "images", count)
    print(f"(making {count:,} images: {time.monotonic() - began:.0f} s)")
    changes = {"resolutions": [16], "directory": [{"path": str(folder / "images"), "recursive": True}]}
    many = write_experiment(folder / "many", model, folder / "images", dataset_file=changes)
    first = seconds_of(many, "--cache-only", stop_at="caching: ")
    print(f"{count:,} images, first start, until encoding starts (headers, captions, hashes): {first:.2f} s")
    fill_cache(many)
    print(f"{count:,} images, complete cache, with the dataset report: {seconds_of(many, '--cache-only'):.2f} s")
    print(f"{count:,} images, complete cache: {min(seconds_of(many, '--cache-only') for _ in range(3)):.2f} s")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=int, default=100_000)
    with tempfile.TemporaryDirectory() as made:
        measure(Path(made), parser.parse_args().images)
