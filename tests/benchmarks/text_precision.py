"""Measures how `text_cache_dtype` changes the network's prediction:  python -m tests.benchmarks.text_precision

Needs the files of `make quickstart`.

The quickstart's trained network predicts the velocity of 64 images at 8 values of t, with text embeddings in float32 as the
encoders return them, and as the cache stores them. Printed are the root mean square of the change relative to that of the
prediction, and the change of the mean squared error. For comparison, each image is given the caption of another one.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from models.family import LENGTH
from models.sd3.family import SD3Family
from utils.config.load import load_config
from utils.data.encoding.text_storage import TextCacheDtype, pack, unpack
from utils.data.sources.decoding import read_pixels
from utils.distributed.world import World
from utils.objective import rectified_flow
from utils.run.prepare import prepare

CONFIG = Path("examples/quickstart_lora.toml")
"""Its network is the trained one of the quickstart."""
NUM_IMAGES, TIMES = 64, 8
DTYPES: tuple[TextCacheDtype, ...] = ("bfloat16", "float8_e4m3fn")


def stored(entry: dict[str, Tensor], dtype: TextCacheDtype | None) -> dict[str, Tensor]:
    return {name: value.float() for name, value in unpack(pack(entry, dtype)).items()}


@torch.no_grad()
def main() -> None:
    dataset = load_config(CONFIG).dataset_path
    experiment = prepare(CONFIG, [f"dataset={dataset}"], None, World(0, 0, 1, 1), check_only=True)
    family = experiment.family
    assert isinstance(family, SD3Family)
    table = experiment.dataset.examples
    examples = [table[row] for row in range(0, len(table), max(1, len(table) // NUM_IMAGES))][:NUM_IMAGES]
    encode = family.image_encoder.load(torch.device("cpu"))
    latents = torch.stack(
        [encode([torch.from_numpy(read_pixels(example.image, example.box))])[0]["latents"] for example in examples]
    )
    captions = [example.caption() for example in examples]
    entries = {}
    for encoder in family.text_encoders:
        encode_text = encoder.load(torch.device("cpu"))
        encoded = [encode_text([text])[0] for text in captions]
        entries[encoder.name] = [{name: value for name, value in item.items() if name != LENGTH} for item in encoded]
    layers = [layer.build() for layer in family.layers]
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn((TIMES, *latents.shape), generator=generator)
    sigmas = (torch.arange(TIMES) + 0.5) / TIMES

    def predict(text_of: Callable[[str, int], dict[str, Tensor]]) -> Tensor:
        text = {}
        for name in entries:
            rows = [text_of(name, index) for index in range(len(examples))]
            text |= {f"{name}.{tensor}": torch.stack([row[tensor] for row in rows]) for tensor in rows[0]}
        given = []
        for sigma, one in zip(sigmas, noise, strict=True):
            noisy = rectified_flow.add_noise(latents, one, sigma.expand(len(examples)))
            sample = family.sample(noisy, sigma.expand(len(examples)), text)
            value: Any = sample.tensors
            for layer in layers:
                value = layer(value)
            given.append(family.velocity(value, sample.shape))
        return torch.stack(given)

    exact = predict(lambda name, index: entries[name][index])
    velocity = noise - latents
    loss = (exact - velocity).square().mean()
    print(f"float32: error {loss:.5f}")
    others = {dtype: predict(lambda name, index, dtype=dtype: stored(entries[name][index], dtype)) for dtype in DTYPES}
    others["another caption"] = predict(lambda name, index: entries[name][(index + 7) % len(examples)])
    for name, other in others.items():
        change = float((other - exact).square().mean().sqrt() / exact.square().mean().sqrt())
        of_error = float((other - velocity).square().mean() / loss - 1)
        print(f"{name}: prediction changed by {change:.3%}, error by {of_error:+.3%}")


if __name__ == "__main__":
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    main()
