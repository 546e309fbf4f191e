"""Plans the caching of a run's datasets: which entries the cache lacks, in which folders, and how much disk space they take.

One process makes the plan and sends it to all ranks.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from models.family import FrozenEncoder, ModelFamily, TextEncoder
from utils.console import format_bytes
from utils.data.cache.keys import content_key
from utils.data.cache.store import Store
from utils.data.encoding.encoded import CacheFolders
from utils.data.encoding.masks import MaskEncoder
from utils.data.encoding.required import RequiredEntries, required_captions, required_latents, required_masks
from utils.data.encoding.stored_names import POSTERIOR_MOMENTS
from utils.data.encoding.text_storage import TextCacheDtype, packed_bytes
from utils.data.examples import ExampleTable
from utils.files.file_index import FileIndex

_KEY_AND_CHECKSUM_BYTES = 24
_FLOAT_BYTES, _LENGTH_BYTES = 4, 8


@dataclass(frozen=True)
class CacheSettings:
    """The folder of the cache and the tensors that are stored in it."""

    folder: Path
    posterior: bool
    """Whether the std of the latents is stored as well as their mean."""
    text_dtype: TextCacheDtype | None


@dataclass(frozen=True)
class Work:
    """The entries that one encoder has to encode."""

    folder: Path
    items: np.ndarray
    """(n, 3) int32: table, example, variant; one item per missing entry, the largest first."""
    num_bytes: int
    """Size of the missing entries in the cache."""
    num_cached: int
    """Required entries that are in the cache already."""


@dataclass(frozen=True)
class CachePlan:
    """The work of all encoders; identical on every rank."""

    folders: CacheFolders
    latents: Work
    masks: Work
    texts: Mapping[str, Work]

    def all_work(self) -> dict[str, Work]:
        """Encoder name -> work, in the order in which the encoders run."""
        return {"latents": self.latents, "masks": self.masks, **self.texts}

    @property
    def num_bytes(self) -> int:
        return sum(work.num_bytes for work in self.all_work().values())

    def describe(self) -> str:
        """Returns the log line: what will be encoded, its size, and the free disk space."""
        missing = {name: work for name, work in self.all_work().items() if len(work.items)}
        parts = [f"{len(work.items):,} {name} ({format_bytes(work.num_bytes)})" for name, work in missing.items()]
        counts = {name: work.num_cached for name, work in self.all_work().items()}
        cached = ", ".join(f"{count:,} {name}" for name, count in counts.items() if count)
        folder = self.folders.cache
        if not parts:
            return f"caching: all entries are in {folder} ({cached})"
        free = format_bytes(shutil.disk_usage(folder).free)
        already = f"; already cached: {cached}" if cached else ""
        return f"caching: {', '.join(parts)}; {format_bytes(self.num_bytes)} in total, {free} free in {folder}{already}"

    def disk_space_error(self) -> str | None:
        """Returns a message when the missing entries take more than the free disk space."""
        free = shutil.disk_usage(self.folders.cache).free
        if self.num_bytes <= free:
            return None
        return (
            f"{self.folders.cache} has {format_bytes(free)} of free disk space and caching takes "
            f"{format_bytes(self.num_bytes)}; set another cache_dir, free disk space (`python -m utils.data.cache prune` "
            'deletes unused entries), or set text_cache_dtype = "float8_e4m3fn"'
        )


def max_cache_bytes(family: ModelFamily, tables: Sequence[ExampleTable], settings: CacheSettings) -> int:
    """Returns an upper bound of the size of all entries a run reads: duplicates are counted each time."""
    total = 0
    channels = family.latent.channels * (2 if settings.posterior else 1)
    for table in tables:
        has_mask, has_control = bool(len(table.masks.paths)), bool(len(table.controls.paths))
        flips = np.array([2 if directory.may_flip else 1 for directory in table.directories], np.int64)
        pixels = np.array([bucket.width * bucket.height for bucket in table.buckets], np.int64)[table.rows[:, 2]]
        latents = int((pixels * flips[table.images.directory[table.rows[:, 0]]]).sum()) * channels * (1 + has_control)
        total += (latents + int(pixels.sum()) * has_mask) * _FLOAT_BYTES // family.latent.downscale**2
        num_captions = sum(
            int(np.diff(table.images.first_caption)[chosen].sum())
            * (directory.shuffle.num_orders if directory.shuffle else 1)
            for number, directory in enumerate(table.directories)
            for chosen in [np.unique(table.rows[table.images.directory[table.rows[:, 0]] == number, 0])]
        )
        total += num_captions * sum(_caption_bytes(encoder, settings) for encoder in family.text_encoders)
    return total


def _caption_bytes(encoder: TextEncoder, settings: CacheSettings) -> int:
    """Returns the size of one caption's entry."""
    return packed_bytes(encoder.shapes, settings.text_dtype, encoder.dtype) + _LENGTH_BYTES + _KEY_AND_CHECKSUM_BYTES


def make_plan(
    family: ModelFamily, tables: Sequence[ExampleTable], texts: Sequence[str], settings: CacheSettings
) -> CachePlan:
    """Finds the missing entries. Images whose hash is unknown are skipped. Raises OSError for an unreadable encoder file."""
    files = FileIndex(settings.folder)

    def folder_of(encoder: FrozenEncoder, stored: str) -> Path:
        return settings.folder / f"{encoder.name}-{_identity(encoder, stored, files).hex()[:16]}"

    folders = CacheFolders(
        settings.folder,
        latents=folder_of(family.image_encoder, POSTERIOR_MOMENTS if settings.posterior else "mean"),
        masks=folder_of(MaskEncoder(family.latent.downscale), ""),
        texts={encoder.name: folder_of(encoder, str(settings.text_dtype)) for encoder in family.text_encoders},
    )
    files.save()
    per_pixel = _FLOAT_BYTES / family.latent.downscale**2
    channels = family.latent.channels * (2 if settings.posterior else 1)
    captions = required_captions(tables, texts)
    return CachePlan(
        folders,
        _images_work(folders.latents, required_latents(tables), tables, per_pixel * channels),
        _images_work(folders.masks, required_masks(tables), tables, per_pixel),
        {
            encoder.name: _captions_work(folders.texts[encoder.name], captions, encoder, settings)
            for encoder in family.text_encoders
        },
    )


def _identity(encoder: FrozenEncoder, stored: str, files: FileIndex) -> bytes:
    """Returns the hash of everything that an encoder's entries depend on, except the input.

    stored: which of the encoder's tensors are stored, or their dtype.
    """
    settings = [f"{key}={value}" for key, value in sorted(encoder.settings.items())]
    return content_key(encoder.name, stored, *settings, *(f"{path.name}:{files.hash_of(path)}" for path in encoder.files))


# --- missing entries ---------------------------------------------------------------------------------------------------


def _missing(folder: Path, required: RequiredEntries) -> tuple[np.ndarray, int]:
    """Returns (items of the missing entries, one per entry; number of cached entries). Marks the cached ones as used."""
    store = Store(folder)
    # Sorting by the two halves of the 16-byte keys, as integers, makes equal keys neighbours.
    numbers = np.ascontiguousarray(required.keys).view("<u8").reshape(-1, 2)
    order = np.lexsort((numbers[:, 1], numbers[:, 0]))
    is_first = np.ones(len(order), bool)
    is_first[1:] = (numbers[order[1:]] != numbers[order[:-1]]).any(axis=1)
    unique = np.sort(order[is_first])
    found = store.find(required.keys[unique])
    store.mark_used(found[found >= 0])
    return required.items[unique[found < 0]], int((found >= 0).sum())


def _images_work(folder: Path, required: RequiredEntries, tables: Sequence[ExampleTable], bytes_per_pixel: float) -> Work:
    """Orders the work by bucket, the largest bucket first: the last items are small, so all ranks finish together."""
    items, num_cached = _missing(folder, required)
    sides = np.zeros((len(items), 2), np.int64)
    for number, table in enumerate(tables):
        bucket_sides = np.array([(bucket.width, bucket.height) for bucket in table.buckets], np.int64).reshape(-1, 2)
        chosen = items[:, 0] == number
        sides[chosen] = bucket_sides[table.rows[items[chosen, 1], 2]]
    pixels = sides.prod(axis=1)
    order = np.lexsort((sides[:, 1], sides[:, 0], -pixels))  # stable: keeps the order within a bucket
    num_bytes = int(pixels.sum() * bytes_per_pixel) + _KEY_AND_CHECKSUM_BYTES * len(items)
    return Work(folder, items[order], num_bytes, num_cached)


def _captions_work(folder: Path, required: RequiredEntries, encoder: TextEncoder, settings: CacheSettings) -> Work:
    items, num_cached = _missing(folder, required)
    return Work(folder, items, _caption_bytes(encoder, settings) * len(items), num_cached)
