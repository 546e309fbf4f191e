"""Caching with encoders that count their inputs, in a process group of one rank."""

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
from tests.utils.data.image_makers import noise, save
from tests.utils.data.scanning import Scan
from utils.data.buckets import CropBox
from utils.data.dataset import Dataset
from utils.data.encoding import precompute
from utils.data.encoding.plan import CacheSettings
from utils.data.encoding.precompute import CachedDataset, RunData, cache_dataset
from utils.data.examples import ExampleTable
from utils.data.sources.image_files import ImageFile
from utils.data.sources.readers import Readers
from utils.files.file_index import StoredHashes

CPU = torch.device("cpu")
NUM_TOKENS, TEXT_WIDTH = 4, 2


def cache_alone(
    family: Any,
    tables: Sequence[ExampleTable],
    texts: Sequence[str],
    settings: CacheSettings,
    stored: Sequence[StoredHashes] = (),
) -> CachedDataset:
    """Calls cache_dataset in a new process group of one rank, as in a run without launcher."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        return cache_dataset(family, RunData(tables, texts, stored), settings, CPU, 1)
    finally:
        dist.destroy_process_group()


class CountingEncoder(FrozenEncoder):
    """An encoder that records its inputs. The input `nan_input` is encoded to NaN."""

    name: str
    files: tuple[Path, ...]

    def __init__(self) -> None:
        self.encoded: list[Any] = []
        self.num_loads = 0
        self.nan_input: Any = None

    def load(self, device: torch.device) -> EncodeFunction:
        self.num_loads += 1

        def encode(items: Sequence[Any]) -> list[EncodedItem]:
            self.encoded += items
            return [self.value(item) for item in items]

        return encode

    @abstractmethod
    def value(self, item: Any) -> EncodedItem:
        """Returns the encoded item."""


class CountingImages(CountingEncoder, ImageEncoder):
    """Encodes an image to the mean of each colour, or to its pixels."""

    def __init__(self, files: tuple[Path, ...], *, keep_pixels: bool = False) -> None:
        super().__init__()
        self.name, self.files, self.settings, self._keep_pixels = "vae", files, {"version": 1}, keep_pixels

    def value(self, item: Tensor) -> EncodedItem:
        latents = item.float() if self._keep_pixels else item.float().mean((1, 2))
        return {"latents": latents, "std": latents / 8}


class CountingTexts(CountingEncoder, TextEncoder):
    """Encodes a text to the code points of its first letters."""

    def __init__(self, name: str, files: tuple[Path, ...], num_tokens: int = 8, dtype: str = "float32") -> None:
        super().__init__()
        self.name, self.files = name, files
        self.settings = {"num_tokens": num_tokens, "dtype": dtype}
        self.num_tokens, self.dtype = NUM_TOKENS, torch.float32
        self.shapes = {"sequence": (NUM_TOKENS, TEXT_WIDTH), "pooled": (TEXT_WIDTH,)}

    def value(self, item: str) -> EncodedItem:
        letters = torch.tensor([float(ord(letter)) for letter in item.ljust(NUM_TOKENS)[:NUM_TOKENS]])
        sequence = letters[:, None].repeat(1, TEXT_WIDTH)
        if item == self.nan_input:
            sequence[0] = float("nan")
        length = torch.tensor([len(item), min(len(item), NUM_TOKENS)], dtype=torch.int32)
        return {"sequence": sequence, "pooled": sequence.sum(0), LENGTH: length}


class FakeFamily:
    """The part of a model family that caching uses."""

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
        """Returns a decoder of latents that are pixels."""
        self.tile_pixels = tile_pixels
        return lambda latents: latents.to(torch.uint8)

    @property
    def counts(self) -> tuple[int, int, int]:
        return len(self.image_encoder.encoded), len(self.clip.encoded), len(self.t5.encoded)

    @property
    def num_loads(self) -> int:
        return self.image_encoder.num_loads + self.clip.num_loads + self.t5.num_loads


class RecordingReaders:
    """Readers that record their requests: (task, name of the file)."""

    def __init__(self, readers: Readers) -> None:
        self._readers = readers
        self.requests: list[tuple[str, str]] = []

    def pixels(
        self, file: ImageFile, box: CropBox, *, flipped: bool = False, expected_hash: bytes = b""
    ) -> Future[np.ndarray]:
        self.requests.append(("pixels", file.path.name))
        return self._readers.pixels(file, box, flipped=flipped, expected_hash=expected_hash)

    def mask(self, file: ImageFile, box: CropBox, downscale: int, *, expected_hash: bytes = b"") -> Future[np.ndarray]:
        self.requests.append(("mask", file.path.name))
        return self._readers.mask(file, box, downscale, expected_hash=expected_hash)

    def hashes(self, files: Sequence[ImageFile]) -> Future[list[bytes | str]]:
        self.requests += [("hash", file.path.name) for file in files]
        return self._readers.hashes(files)


class CachingSetup:
    """A folder with images and a cache, which tests fill by running one family after another."""

    def __init__(self, folder: Path, readers: Readers, patch: pytest.MonkeyPatch) -> None:
        self.folder = folder
        self.images = make_tiny_dataset(folder / "images", 4)
        self.settings = CacheSettings(folder / "cache", posterior=False, text_dtype=None)
        self._scan, self._recording = Scan(readers, folder / "cache"), RecordingReaders(readers)
        patch.setattr(precompute, "Readers", lambda num_workers: nullcontext(self._recording))  # one pool for all tests
        patch.setattr(precompute.group, "free_memory", lambda: None)  # garbage collection is most of a test's time

    @property
    def requests(self) -> list[tuple[str, str]]:
        """The requests to the readers since `clear_requests`."""
        return self._recording.requests

    def clear_requests(self) -> None:
        self._recording.requests = []

    def scan(self, **changes: Any) -> Dataset:
        return self._scan(**{"directory": [{"path": self.images}], **changes})

    def examples(self, **changes: Any) -> ExampleTable:
        return self.scan(**changes).examples

    def run(self, family: FakeFamily, *, settings: dict[str, Any] | None = None, **changes: Any) -> CachedDataset:
        dataset = self.scan(**changes)
        settings_used = replace(self.settings, **(settings or {}))
        return cache_alone(family, [dataset.examples], [""], settings_used, dataset.stored_hashes)

    def encode(self, **settings: Any) -> tuple[int, int, int]:
        """Returns how many images and captions a new family had to encode."""
        family = FakeFamily(self.folder, **settings)
        self.run(family)
        return family.counts

    def flipped(self) -> dict[str, Any]:
        """The change of the dataset that requests horizontal flips."""
        return {"directory": [{"path": self.images, "horizontal_flip": True}]}


def bad_paths(cached: CachedDataset) -> list[Path]:
    return sorted(bad.path for bad in cached.unusable.bad_files)


def unusable_keys(cached: CachedDataset) -> list[list[str]]:
    """Returns the keys of each table's unusable examples."""
    return [
        [example.key for example in table.where(chosen)]
        for table, chosen in zip(cached.tables, cached.unusable.examples, strict=True)
    ]


def damage_image(path: Path) -> Path:
    """Writes an image whose pixels cannot be decoded, although its header and its end are valid."""
    save(noise(), path)
    content = bytearray(path.read_bytes())
    middle = len(content) // 2
    content[middle : middle + 64] = b"\x00" * 64
    path.write_bytes(bytes(content))
    return path
