"""A caching pass with encoders that count what they are given, in a process group of one."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from concurrent.futures import Future
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from models.family import (
    LENGTH,
    DecodeFunction,
    EncodedItem,
    EncodeFunction,
    FrozenEncoder,
    ImageEncoder,
    LatentSpec,
    TextEncoder,
)
from tests.tiny_model import make_tiny_dataset
from tests.utils.data.scanning import Scan
from utils.data.buckets import CropBox
from utils.data.dataset import ContentMemory, Dataset
from utils.data.encoding import precompute
from utils.data.encoding.plan import CacheSettings
from utils.data.encoding.precompute import Cached, RunData, cache_dataset
from utils.data.examples import ExampleTable
from utils.data.sources.image_files import ImageFile
from utils.data.sources.readers import Readers

CPU = torch.device("cpu")
NUM_TOKENS, TEXT_WIDTH = 4, 2


def cache_alone(
    adapter: Any, tables: Sequence[ExampleTable], texts: Sequence[str], settings: CacheSettings, *memories: ContentMemory
) -> Cached:
    """cache_dataset in a process group of one, a new one each time, as in a run without launcher."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        return cache_dataset(adapter, RunData(tables, texts, memories), settings, CPU, 1)
    finally:
        dist.destroy_process_group()


class Counting(FrozenEncoder):
    """Counts what it encodes."""

    name: str
    files: tuple[Path, ...]

    def __init__(self) -> None:
        self.encoded: list[Any] = []
        self.num_loads = 0
        self.poison: Any = None

    def load(self, device: torch.device) -> EncodeFunction:
        self.num_loads += 1

        def encode(items: Sequence[Any]) -> list[EncodedItem]:
            self.encoded += items
            return [self.value(item) for item in items]

        return encode

    @abstractmethod
    def value(self, item: Any) -> EncodedItem:
        """What one item is encoded to."""


class CountingImages(Counting, ImageEncoder):
    """Latents are the mean of each colour, or the image itself."""

    def __init__(self, files: tuple[Path, ...], *, keep_pixels: bool = False) -> None:
        super().__init__()
        self.name, self.files, self.settings, self._keep_pixels = "vae", files, {"version": 1}, keep_pixels

    def value(self, item: Tensor) -> EncodedItem:
        latents = item.float() if self._keep_pixels else item.float().mean((1, 2))
        return {"latents": latents, "std": latents / 8}


class CountingTexts(Counting, TextEncoder):
    """The first letters' numbers, twice; `poison` becomes no numbers."""

    def __init__(self, name: str, files: tuple[Path, ...], num_tokens: int = 8, dtype: str = "float32") -> None:
        super().__init__()
        self.name, self.files = name, files
        self.settings = {"num_tokens": num_tokens, "dtype": dtype}
        self.num_tokens, self.dtype = NUM_TOKENS, torch.float32
        self.shapes = {"sequence": (NUM_TOKENS, TEXT_WIDTH), "pooled": (TEXT_WIDTH,)}

    def value(self, item: str) -> EncodedItem:
        letters = torch.tensor([float(ord(letter)) for letter in item.ljust(NUM_TOKENS)[:NUM_TOKENS]])
        sequence = letters[:, None].repeat(1, TEXT_WIDTH)
        if item == self.poison:
            sequence[0] = float("nan")
        length = torch.tensor([len(item), min(len(item), NUM_TOKENS)], dtype=torch.int32)
        return {"sequence": sequence, "pooled": sequence.sum(0), LENGTH: length}


class Adapter:
    """As much of a model family as the caching pass asks for."""

    latent = LatentSpec(channels=16, downscale=8, patch=2, max_side_pixels=256)

    def __init__(self, folder: Path, *, keep_pixels: bool = False, **settings: Any) -> None:
        weights = folder / "weights.safetensors"
        if not weights.exists():
            weights.write_bytes(b"weights")
        self.image_encoder = CountingImages((weights,), keep_pixels=keep_pixels)
        self.clip = CountingTexts("clip_l", (weights,), **settings)
        self.t5 = CountingTexts("t5xxl", (weights,))
        self.text_encoders = (self.clip, self.t5)
        self.tile_pixels = 0

    def load_decoder(self, device: torch.device, tile_pixels: int) -> DecodeFunction:
        """Of latents that are pixels."""
        self.tile_pixels = tile_pixels
        return lambda latents: latents.to(torch.uint8)

    @property
    def counts(self) -> tuple[int, int, int]:
        return len(self.image_encoder.encoded), len(self.clip.encoded), len(self.t5.encoded)

    @property
    def num_loads(self) -> int:
        return self.image_encoder.num_loads + self.clip.num_loads + self.t5.num_loads


class NotingReaders:
    """Readers that note what they are asked for: (task, name of the file)."""

    def __init__(self, readers: Readers) -> None:
        self._readers = readers
        self.asked: list[tuple[str, str]] = []

    def pixels(self, file: ImageFile, box: CropBox, *, flipped: bool = False, content: bytes = b"") -> Future[np.ndarray]:
        self.asked.append(("pixels", file.path.name))
        return self._readers.pixels(file, box, flipped=flipped, content=content)

    def mask(self, file: ImageFile, box: CropBox, downscale: int, *, content: bytes = b"") -> Future[np.ndarray]:
        self.asked.append(("mask", file.path.name))
        return self._readers.mask(file, box, downscale, content=content)

    def hashes(self, files: Sequence[ImageFile]) -> Future[list[bytes | str]]:
        self.asked += [("hash", file.path.name) for file in files]
        return self._readers.hashes(files)


class Workshop:
    """A folder with images and a cache, gone over by one adapter after another."""

    def __init__(self, folder: Path, readers: Readers, patch: pytest.MonkeyPatch) -> None:
        self.folder = folder
        self.images = make_tiny_dataset(folder / "images", 4)
        self.settings = CacheSettings(folder / "cache", posterior=False, text_dtype=None)
        self._scan, self._noting = Scan(readers, folder / "cache" / "files"), NotingReaders(readers)
        patch.setattr(precompute, "Readers", lambda num_workers: nullcontext(self._noting))  # one for all tests
        patch.setattr(precompute.group, "free_memory", lambda: None)  # garbage collection is most of a test's time

    @property
    def asked(self) -> list[tuple[str, str]]:
        """What was read since `forget`."""
        return self._noting.asked

    def forget(self) -> None:
        self._noting.asked = []

    def scan(self, **changes: Any) -> Dataset:
        return self._scan(**{"directory": [{"path": self.images}], **changes})

    def examples(self, **changes: Any) -> ExampleTable:
        return self.scan(**changes).examples

    def run(self, adapter: Adapter, *, settings: dict[str, Any] | None = None, **changes: Any) -> Cached:
        found = self.scan(**changes)
        return cache_alone(adapter, [found.examples], [""], replace(self.settings, **(settings or {})), found.memory)

    def encode(self, **settings: Any) -> tuple[int, int, int]:
        """How many images and captions a fresh adapter had to encode."""
        adapter = Adapter(self.folder, **settings)
        self.run(adapter)
        return adapter.counts
