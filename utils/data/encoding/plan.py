"""What the cache lacks of a run's datasets: decided by one process, then known to all.

An item of work is three numbers, so that a million of them can be sent to every rank: which table, which example of it, and
which variant of the example. Texts that belong to no example, such as prompts, are in a list of their own.
"""

from __future__ import annotations

import itertools
import shutil
from array import array
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, TypeVar

import numpy as np
from tqdm import tqdm

from models.family import FrozenEncoder, ModelFamily, TextEncoder
from utils.data.cache.keys import KEY_BYTES, FileHashes, content_key
from utils.data.cache.store import Store
from utils.data.encoding.encoded import CacheFolders, caption_key, latents_key, mask_key
from utils.data.encoding.masks import MaskEncoder
from utils.data.encoding.stored_names import POSTERIOR_MOMENTS
from utils.data.encoding.text_storage import TextCacheDtype, packed_bytes
from utils.data.examples import ExampleTable
from utils.data.sources.rows import NONE
from utils.tracking.metrics import bar_seconds, bytes_in_words

T = TypeVar("T")
TEXTS = -1
"""In place of a table's number: the texts of no example."""
PLAIN, MIRRORED, CONTROL, CONTROL_MIRRORED = range(4)
"""Variants of an example's image. Of an example's captions, a variant is the caption's number."""
_BESIDES = 24
"""Bytes of an entry's key and checksum."""
_FLOAT_BYTES, _LENGTH_BYTES = 4, 8


@dataclass(frozen=True)
class CacheSettings:
    """Where the cache is, and what is kept."""

    folder: Path
    posterior: bool
    """Whether standard deviations of latents are kept too."""
    text_dtype: TextCacheDtype | None


@dataclass(frozen=True)
class Work:
    """What one encoder is to encode."""

    folder: Path
    items: np.ndarray
    """(n, 3) int32: table, example, variant; one for each entry that is missing, the largest first."""
    num_bytes: int
    """What the entries will take in the cache."""
    num_there: int
    """Entries that are wanted and there."""


@dataclass(frozen=True)
class CachePlan:
    """The same on every rank."""

    folders: CacheFolders
    latents: Work
    masks: Work
    texts: Mapping[str, Work]

    def all_work(self) -> dict[str, Work]:
        """By the encoder's name, in the order in which it is done."""
        return {"latents": self.latents, "masks": self.masks, **self.texts}

    @property
    def num_bytes(self) -> int:
        return sum(work.num_bytes for work in self.all_work().values())

    def describe(self) -> str:
        """What is to be encoded, what it takes, and where there is how much room."""
        missing = {name: work for name, work in self.all_work().items() if len(work.items)}
        parts = [f"{len(work.items):,} {name} ({bytes_in_words(work.num_bytes)})" for name, work in missing.items()]
        counts = {name: work.num_there for name, work in self.all_work().items()}
        there = ", ".join(f"{count:,} {name}" for name, count in counts.items() if count)
        if not parts:
            return f"cache: everything is there ({there}); {self.folders.cache}"
        free = bytes_in_words(shutil.disk_usage(self.folders.cache).free)
        total = bytes_in_words(self.num_bytes)
        reused = f"; there are {there}" if there else ""
        return f"cache: to encode are {', '.join(parts)}, {total} in all; {self.folders.cache} has {free} left{reused}"

    def room_error(self) -> str | None:
        """What is to be said when the disk has less room than what is missing takes."""
        free = shutil.disk_usage(self.folders.cache).free
        if self.num_bytes <= free:
            return None
        return (
            f"{self.folders.cache} has {bytes_in_words(free)} left, and what is to be encoded takes "
            f"{bytes_in_words(self.num_bytes)}; give another cache_dir, make room (`python -m utils.data.cache prune`), or "
            'set text_cache_dtype = "float8_e4m3fn"'
        )


def room_for(family: ModelFamily, tables: Sequence[ExampleTable], settings: CacheSettings) -> int:
    """Bytes that everything a run reads would take at most: captions and images that are equal are counted each."""
    total = 0
    kept = family.latent.channels * (2 if settings.posterior else 1)
    for table in tables:
        has_mask, has_control = bool(len(table.masks.paths)), bool(len(table.controls.paths))
        flips = np.array([2 if directory.may_flip else 1 for directory in table.directories], np.int64)
        pixels = np.array([bucket.width * bucket.height for bucket in table.buckets], np.int64)[table.rows[:, 2]]
        of_latents = int((pixels * flips[table.images.directory[table.rows[:, 0]]]).sum()) * kept * (1 + has_control)
        total += (of_latents + int(pixels.sum()) * has_mask) * _FLOAT_BYTES // family.latent.downscale**2
        num_captions = sum(
            int(np.diff(table.images.first_caption)[chosen].sum()) * (one.shuffle.num_orders if one.shuffle else 1)
            for number, one in enumerate(table.directories)
            for chosen in [np.unique(table.rows[table.images.directory[table.rows[:, 0]] == number, 0])]
        )
        total += num_captions * sum(_caption_bytes(encoder, settings) for encoder in family.text_encoders)
    return total


def _caption_bytes(encoder: TextEncoder, settings: CacheSettings) -> int:
    """Of one entry."""
    return packed_bytes(encoder.shapes, settings.text_dtype, encoder.dtype) + _LENGTH_BYTES + _BESIDES


def make_plan(
    family: ModelFamily, tables: Sequence[ExampleTable], texts: Sequence[str], settings: CacheSettings
) -> CachePlan:
    """What is cached where and what is missing. An example whose image's hash is not known is left out."""
    hashes = FileHashes(settings.folder / "files.json")

    def folder_of(encoder: FrozenEncoder, kept: str) -> Path:
        return settings.folder / f"{encoder.name}-{_identity(encoder, kept, hashes).hex()[:16]}"

    folders = CacheFolders(
        settings.folder,
        latents=folder_of(family.image_encoder, POSTERIOR_MOMENTS if settings.posterior else "mean"),
        masks=folder_of(MaskEncoder(family.latent.downscale), ""),
        texts={encoder.name: folder_of(encoder, str(settings.text_dtype)) for encoder in family.text_encoders},
    )
    hashes.save()
    per_pixel = _FLOAT_BYTES / family.latent.downscale**2
    kept = family.latent.channels * (2 if settings.posterior else 1)
    captions = wanted_captions(tables, texts)
    return CachePlan(
        folders,
        _images_work(folders.latents, wanted_latents(tables), tables, per_pixel * kept),
        _images_work(folders.masks, wanted_masks(tables), tables, per_pixel),
        {
            encoder.name: _captions_work(folders.texts[encoder.name], captions, encoder, settings)
            for encoder in family.text_encoders
        },
    )


def _identity(encoder: FrozenEncoder, kept: str, hashes: FileHashes) -> bytes:
    """Everything an encoder's entries depend on besides what is encoded, as one name."""
    settings = [f"{key}={value}" for key, value in sorted(encoder.settings.items())]
    return content_key(encoder.name, kept, *settings, *(f"{path.name}:{hashes.hash_of(path)}" for path in encoder.files))


# --- what is wanted ----------------------------------------------------------------------------------------------------


class Wanted(NamedTuple):
    """Entries that a run reads; some may be the same."""

    items: np.ndarray
    """(n, 3) int32, as in Work."""
    keys: np.ndarray
    """(n, 16) uint8."""


class _Wanting:
    """Collects items and their keys."""

    def __init__(self) -> None:
        self._numbers, self._keys = array("i"), bytearray()

    def add(self, table: int, row: int, variant: int, key: bytes) -> None:
        self._numbers.extend((table, row, variant))
        self._keys += key

    def all(self) -> Wanted:
        items = np.array(self._numbers, dtype=np.int32).reshape(-1, 3)
        return Wanted(items, np.frombuffer(bytes(self._keys), dtype=np.uint8).reshape(-1, KEY_BYTES))


def wanted_latents(tables: Sequence[ExampleTable]) -> Wanted:
    """Of images and control images, each flipped too where its directory asks for it."""
    wanting = _Wanting()
    for number, table in enumerate(tables):
        for row, outline in enumerate(_with_bar(table.outlines(), len(table))):
            for source, plain in ((outline.content, PLAIN), (outline.control_content, CONTROL)):
                if source:
                    wanting.add(number, row, plain, latents_key(source, outline.geometry))
                if source and outline.may_flip:
                    wanting.add(number, row, plain + MIRRORED, latents_key(source, outline.geometry, flipped=True))
    return wanting.all()


def wanted_masks(tables: Sequence[ExampleTable]) -> Wanted:
    wanting = _Wanting()
    for number, table in enumerate(tables):
        if not len(table.masks.paths):
            continue
        for row, outline in enumerate(_with_bar(table.outlines(), len(table))):
            if outline.mask_content:
                wanting.add(number, row, PLAIN, mask_key(outline.mask_content, outline.geometry))
    return wanting.all()


def wanted_captions(tables: Sequence[ExampleTable], texts: Sequence[str]) -> Wanted:
    """Of every image's captions in every order of their tags, and the texts."""
    wanting = _Wanting()
    for index, text in enumerate(texts):
        wanting.add(TEXTS, index, 0, caption_key(text))
    for number, table in enumerate(tables):
        counts = np.diff(table.images.first_caption)
        first_row = np.full(len(counts), NONE, np.int32)  # the first example of each image that has any
        first_row[table.rows[::-1, 0]] = np.arange(len(table) - 1, -1, -1)
        captions = iter(table.images.captions)
        for row, count in _with_bar(zip(first_row.tolist(), counts.tolist(), strict=True), len(counts)):
            own = list(itertools.islice(captions, count))
            if row == NONE:
                continue
            shuffle = table.directory_of(row).shuffle
            if shuffle is not None:  # in the order of their numbers, as Example.caption has them
                own = [shuffle.order(caption, order) for order in range(shuffle.num_orders) for caption in own]
            for variant, caption in enumerate(own):
                wanting.add(number, row, variant, caption_key(caption))
    return wanting.all()


def _with_bar(items: Iterable[T], count: int) -> Iterable[T]:
    return tqdm(items, total=count, desc="planning", leave=False, delay=2.0, mininterval=bar_seconds())


# --- what is missing ---------------------------------------------------------------------------------------------------


def _missing(folder: Path, wanted: Wanted) -> tuple[np.ndarray, int]:
    """(Items of the entries that are not there, each entry once; how many are there). Marks those as used."""
    store = Store(folder)
    # A key is two numbers; equal ones are neighbours once they are sorted by both.
    numbers = np.ascontiguousarray(wanted.keys).view("<u8").reshape(-1, 2)
    order = np.lexsort((numbers[:, 1], numbers[:, 0]))
    is_first = np.ones(len(order), bool)
    is_first[1:] = (numbers[order[1:]] != numbers[order[:-1]]).any(axis=1)
    once = np.sort(order[is_first])
    found = store.find(wanted.keys[once])
    store.mark_used(found[found >= 0])
    return wanted.items[once[found < 0]], int((found >= 0).sum())


def _images_work(folder: Path, wanted: Wanted, tables: Sequence[ExampleTable], bytes_per_pixel: float) -> Work:
    """One bucket after the other, the largest first: what is left for the end is small, so that ranks end together."""
    items, num_there = _missing(folder, wanted)
    sides = np.zeros((len(items), 2), np.int64)
    for number, table in enumerate(tables):
        of_bucket = np.array([(bucket.width, bucket.height) for bucket in table.buckets], np.int64).reshape(-1, 2)
        chosen = items[:, 0] == number
        sides[chosen] = of_bucket[table.rows[items[chosen, 1], 2]]
    pixels = sides.prod(axis=1)
    order = np.lexsort((sides[:, 1], sides[:, 0], -pixels))  # stable: those of one bucket stay in their order
    num_bytes = int(pixels.sum() * bytes_per_pixel) + _BESIDES * len(items)
    return Work(folder, items[order], num_bytes, num_there)


def _captions_work(folder: Path, wanted: Wanted, encoder: TextEncoder, settings: CacheSettings) -> Work:
    items, num_there = _missing(folder, wanted)
    return Work(folder, items, _caption_bytes(encoder, settings) * len(items), num_there)
