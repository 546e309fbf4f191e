"""Measures the encoder utilisation of caching:  python -m tests.benchmarks.caching [--images 96] [--resolution 128]

Two processes encode JPEG photographs with an autoencoder of SD3's real size (random weights; 34 M parameters in the
encoder) and captions with small text encoders, twice: with `train.py --cache-only`, and by calling the encoders alone on
images that are already decoded, half of them in each process. The benchmark compares the wall time of caching without the
loading of weights, the time inside the encoders, and the time of the encoders alone.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from skimage import data as photographs

import train
from models.family import EncodedItem, EncodeFunction
from models.sd3.text_encoders import SD3TextEncoder
from models.sd3.vae import SD3ImageEncoder
from tests.distributed.launch import start_ranks
from tests.tiny_model import make_tiny_model, write_experiment
from utils.data.encoding.encoder_loop import EncoderLoop
from utils.data.sources.decoding import read_pixels
from utils.distributed.world import World
from utils.run.prepare import prepare

RANKS = 2
PLACE, ALONE = "BENCHMARK_FOLDER", "BENCHMARK_ALONE"
NAMES = ("astronaut", "chelsea", "coffee", "rocket")
LIMIT_SECONDS = 3000.0

_seconds_inside: dict[str, float] = {}
_seconds_of_caching: dict[str, float] = {}


# --- the ranks ---------------------------------------------------------------------------------------------------------


def _timed(load: Callable[[Any, torch.device], EncodeFunction]) -> Callable[[Any, torch.device], EncodeFunction]:
    def load_timed(encoder: Any, device: torch.device) -> EncodeFunction:
        encode = load(encoder, device)

        def encode_timed(items: Sequence[Any]) -> list[EncodedItem]:
            start = time.perf_counter()
            encoded = encode(items)
            _seconds_inside[encoder.name] = _seconds_inside.get(encoder.name, 0.0) + time.perf_counter() - start
            return encoded

        return encode_timed

    return load_timed


def _write(folder: Path, rank: int) -> None:
    text = json.dumps({"inside": _seconds_inside, "caching": _seconds_of_caching})
    (folder / f"rank_{rank}_{os.environ[ALONE]}.json").write_text(text)


def main() -> None:
    """Runs one rank: `train.py --cache-only`, or the encoders alone."""
    SD3ImageEncoder.load = _timed(SD3ImageEncoder.load)  # type: ignore[method-assign]
    SD3TextEncoder.load = _timed(SD3TextEncoder.load)  # type: ignore[method-assign]
    folder, rank = Path(os.environ[PLACE]), int(os.environ["RANK"])
    if os.environ[ALONE] == "1":
        _encode_alone(folder, rank)
        os._exit(0)
    report = EncoderLoop._report

    def report_and_keep(self: EncoderLoop, seconds: float) -> None:
        _seconds_of_caching[self._encoder.name] = seconds
        report(self, seconds)
        _write(folder, rank)

    EncoderLoop._report = report_and_keep  # type: ignore[method-assign]
    train.main()


def _encode_alone(folder: Path, rank: int) -> None:
    torch.set_num_threads(1)
    experiment = prepare(folder / "experiment.toml", [], None, World(0, 0, 1, 1), check_only=True)
    family, table = experiment.family, experiment.dataset.examples
    examples = [table[row] for row in range(rank, len(table), RANKS)]
    pixels = [torch.from_numpy(read_pixels(example.image, example.box)) for example in examples]
    captions = [example.caption() for example in examples]
    jobs: list[tuple[Any, Sequence[Any]]] = [(family.image_encoder, pixels)]
    jobs += [(encoder, captions) for encoder in family.text_encoders]
    for encoder, items in jobs:
        encode = encoder.load(torch.device("cpu"))
        (folder / f"ready_{encoder.name}_{rank}").touch()
        while not all((folder / f"ready_{encoder.name}_{other}").exists() for other in range(RANKS)):
            time.sleep(0.001)
        for item in items:
            encode([item])
    _write(folder, rank)


# --- measurement -------------------------------------------------------------------------------------------------------


def write_real_size_vae(folder: Path) -> None:
    from diffusers import AutoencoderKL

    AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(128, 256, 512, 512),
        layers_per_block=2,
        latent_channels=16,
        scaling_factor=1.5305,
        shift_factor=0.0609,
        use_quant_conv=False,
        use_post_quant_conv=False,
    ).save_pretrained(folder)


def make_photographs(folder: Path, count: int) -> None:
    """Writes distinct crops (600 x 450 pixels) of photographs as JPEG files of about 60 kB, with captions."""
    folder.mkdir()
    images = [Image.fromarray(getattr(photographs, name)()).convert("RGB").resize((800, 600)) for name in NAMES]
    for index in range(count):
        left, top = index * 7 % 200, index * 5 % 150
        crop = images[index % len(images)].crop((left, top, left + 600, top + 450))
        crop.save(folder / f"{index:04d}.jpg", quality=90)
        (folder / f"{index:04d}.txt").write_text(f"photograph number {index} of {NAMES[index % len(NAMES)]}")


def run(folder: Path, experiment: Path, alone: bool) -> tuple[list[dict[str, dict[str, float]]], str]:
    flag = "1" if alone else "0"
    ranks = start_ranks(
        RANKS,
        ["--config", str(experiment), "--cache-only"],
        folder / f"log_{flag}.txt",
        "tests.benchmarks.caching",
        {PLACE: str(folder), ALONE: flag},
    )
    finished = ranks.wait(LIMIT_SECONDS)
    assert finished.exit_code == 0, finished.output
    return [json.loads((folder / f"rank_{rank}_{flag}.json").read_text()) for rank in range(RANKS)], finished.output


def measure(num_images: int, resolution: int) -> None:
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made)
        model = make_tiny_model(folder / "model")
        write_real_size_vae(model / "vae")
        make_photographs(folder / "images", num_images)
        changes = {"resolutions": [resolution], "num_ar_buckets": 1}
        experiment = write_experiment(folder, model, folder / "images", dataset_file=changes)
        bare, _ = run(folder, experiment, alone=True)
        ranks, output = run(folder, experiment, alone=False)
    print("".join(f"{line}\n" for line in output.splitlines() if "encoder utilisation" in line), end="")
    total_wall, total_inside, total_bare = 0.0, 0.0, 0.0
    for name in ranks[0]["caching"]:
        wall = max(rank["caching"][name] for rank in ranks)
        inside = sum(rank["inside"].get(name, 0.0) for rank in ranks) / RANKS
        alone = max(rank["inside"][name] for rank in bare)
        print(f"{name:>8}: wall {wall:7.2f} s, inside the encoder {inside:7.2f} s per process, encoder alone {alone:7.2f} s")
        total_wall, total_inside, total_bare = total_wall + wall, total_inside + inside, total_bare + alone
    print(f"wall / time in the encoders: {total_wall / total_inside:.3f}")
    print(f"wall / encoders alone: {total_wall / total_bare:.3f}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=int, default=96)
    parser.add_argument("--resolution", type=int, default=128)
    chosen = parser.parse_args()
    measure(chosen.images, chosen.resolution)
