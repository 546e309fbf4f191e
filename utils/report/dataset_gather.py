"""Collects the content of the dataset page from the example table and the cache, and writes the list of skipped files.

Counts cover all images; images, truncated captions and duplicates are listed up to a limit. Nothing here knows HTML.
"""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from models.family import LENGTH, DecodeFunction, ModelFamily
from utils.console import format_bytes, print_line
from utils.data.batches import BatchOrder
from utils.data.cache.shards import SHARD_FILES
from utils.data.cache.store import Store
from utils.data.dataset import Dataset
from utils.data.encoding.encoded import EncodedData
from utils.data.encoding.required import RequiredEntries, required_captions
from utils.data.examples import Example, ExampleTable
from utils.data.sources.decoding import BadFile, read_thumbnail
from utils.data.sources.image_files import ImageFile
from utils.files.atomic import write_text
from utils.randomness import permutation
from utils.report.dataset_facts import BucketFacts, CutCaption, DatasetFacts, EncoderFacts, Thumbnail
from utils.report.dataset_page import render

DATASET_REPORT = "dataset_report.html"
BAD_FILES = "bad_files.jsonl"
NUM_THUMBNAILS = 48
THUMBNAIL_PIXELS = 256
"""Longest side of a thumbnail."""
JPEG_QUALITY = 80
MAX_CUT_CAPTIONS, MAX_DUPLICATES, MAX_FILES = 50, 300, 300
MAX_SHOWN_IN_LOG = 20


def write_bad_files(folder: Path, dataset: Dataset, unusable: Sequence[BadFile]) -> None:
    """Writes every skipped file and the reason to BAD_FILES, and prints how many; removes the list when there are none."""
    entries = [("bad", bad) for bad in (*dataset.bad_files, *unusable)] + [("skipped", bad) for bad in dataset.skipped]
    path = folder / BAD_FILES
    if not entries:
        path.unlink(missing_ok=True)
        return
    folder.mkdir(parents=True, exist_ok=True)
    lines = (json.dumps({"path": str(bad.path), "kind": kind, "reason": bad.reason}) for kind, bad in entries)
    write_text(path, "".join(f"{line}\n" for line in lines))
    num_skipped = len(dataset.skipped)
    print_line(
        f"{len(entries) - num_skipped} bad files, {num_skipped} skipped by configuration; listed with reasons in {path}"
    )


class Gatherer:
    """Collects the facts of one dataset."""

    def __init__(
        self, family: ModelFamily, data: EncodedData, table: ExampleTable, order: BatchOrder, tile_pixels: int
    ) -> None:
        """`tile_pixels`: see ModelFamily.load_decoder."""
        self._family, self._data, self._table, self._order = family, data, table, order
        self._tile_pixels = tile_pixels
        self._captions = required_captions([table], ())

    def facts(
        self, title: str, dataset: Dataset, bad_files: Sequence[BadFile], num_steps: int, device: torch.device
    ) -> DatasetFacts:
        """The content of the page."""
        encoders = [self._encoder(encoder.name, encoder.num_tokens) for encoder in self._family.text_encoders]
        duplicates, num_duplicates = self._duplicates()
        return DatasetFacts(
            title=title,
            rows=self._rows(num_steps),
            buckets=self._buckets(),
            thumbnails=self._thumbnails(device),
            encoders=encoders,
            exposure=self._exposure(),
            bad_files=[(str(bad.path), bad.reason) for bad in bad_files[:MAX_FILES]],
            num_bad=len(bad_files),
            skipped=[(str(bad.path), bad.reason) for bad in dataset.skipped[:MAX_FILES]],
            num_skipped=len(dataset.skipped),
            duplicates=duplicates,
            num_duplicates=num_duplicates,
            warnings=dataset.warnings,
        )

    def _rows(self, num_steps: int) -> list[tuple[str, str]]:
        table, order = self._table, self._order
        epochs = num_steps / order.steps_per_epoch
        sizes = " and ".join(sorted({str(size) for one in table.directories for size in one.resolutions}, key=int))
        folder = self._data.folders.cache
        total = sum(path.stat().st_size for path in folder.glob(f"*/*/{SHARD_FILES}"))
        return [
            ("images", f"{table.num_images:,} files"),
            ("examples", f"{len(table):,}: every image at every resolution ({sizes})"),
            ("captions", f"{len(np.unique(_as_numbers(self._captions.keys), axis=0)):,} distinct"),
            ("epoch", f"{order.steps_per_epoch:,} steps; draws of examples: {order.epoch_draws()}"),
            ("run", f"{num_steps:,} steps: {epochs:,.2f} epochs"),
            ("cache", f"{folder}: {format_bytes(total)} in all"),
        ]

    def _buckets(self) -> list[BucketFacts]:
        table, counts = self._table, self._table.bucket_counts()
        sides = np.array([(bucket.width, bucket.height) for bucket in table.buckets], np.int64)[table.rows[:, 2]]
        enlarged = (sides > table.images.sizes[table.rows[:, 0]]).any(axis=1)
        facts = []
        for bucket, (shown, fillers) in self._order.bucket_draws().items():
            is_here = table.rows[:, 2] == table.buckets.index(bucket)
            facts.append(BucketFacts(str(bucket), counts[bucket], shown, fillers, int((enlarged & is_here).sum())))
        return facts

    def _exposure(self) -> list[tuple[float, int]]:
        """(Mean draws per epoch, number of images), with fillers distributed evenly over their bucket."""
        table = self._table
        factors = np.ones(len(table.buckets))
        for bucket, draws in self._order.bucket_draws().items():
            factors[table.buckets.index(bucket)] = draws.factor
        of_example = table.repeats * factors[table.rows[:, 2]]
        of_image = np.bincount(table.rows[:, 0], weights=of_example)
        values, counts = np.unique(of_image[of_image > 0].round(2), return_counts=True)
        return [(float(value), int(count)) for value, count in zip(values, counts, strict=True)]

    def _duplicates(self) -> tuple[list[list[str]], int]:
        """(The first groups of files with equal content, number of groups); two names of one file are not a group."""
        table = self._table
        images = np.unique(table.rows[:, 0])
        numbers = _as_numbers(table.images.hashes[images])
        _, groups, counts = np.unique(numbers, axis=0, return_inverse=True, return_counts=True)
        repeated = np.flatnonzero(counts > 1)
        order = np.argsort(groups.reshape(-1), kind="stable")
        ends = np.cumsum(counts)
        listed: list[list[str]] = []
        num_groups = 0
        for group in repeated.tolist():
            members = images[order[ends[group] - counts[group] : ends[group]]]
            files = {_identity(file): str(file) for file in map(table.file, members.tolist())}
            num_groups += len(files) > 1
            if len(files) > 1 and len(listed) < MAX_DUPLICATES:
                listed.append(list(files.values()))
        return listed, num_groups

    # --- captions ----------------------------------------------------------------------------------------------------

    def _encoder(self, name: str, max_tokens: int) -> EncoderFacts:
        lengths = _lengths(self._data.folders.texts[name], self._captions)
        values, counts = np.unique(lengths[:, 0], return_counts=True)
        is_cut = np.flatnonzero(lengths[:, 0] > max_tokens)
        cut = []
        for place in is_cut[:MAX_CUT_CAPTIONS].tolist():
            _, row, variant = self._captions.items[place].tolist()
            tokens, characters = lengths[place].tolist()
            example = self._table[row]
            caption = example.caption(variant)
            cut.append(CutCaption(str(example.image), caption[:characters], caption[characters:], tokens))
        histogram = [(int(value), int(count)) for value, count in zip(values, counts, strict=True)]
        return EncoderFacts(name, max_tokens, histogram, len(is_cut), cut)

    # --- images ----------------------------------------------------------------------------------------------------

    def _thumbnails(self, device: torch.device) -> list[Thumbnail]:
        """A fixed selection of images of each bucket."""
        table = self._table
        chosen: list[int] = []
        buckets = list(table.bucket_counts())
        each = max(1, NUM_THUMBNAILS // len(buckets))
        for bucket in buckets[:NUM_THUMBNAILS]:
            members = np.flatnonzero(table.rows[:, 2] == table.buckets.index(bucket))
            places = permutation(0, "thumbnails", str(bucket), length=len(members))[:each]
            chosen += np.sort(members[places]).tolist()
        decode = self._family.load_decoder(device, self._tile_pixels)
        found = (self._thumbnail(table[row], decode, prefer_flipped=place % 2 == 1) for place, row in enumerate(chosen))
        return [thumbnail for thumbnail in found if thumbnail is not None]

    def _thumbnail(self, example: Example, decode: DecodeFunction, *, prefer_flipped: bool) -> Thumbnail | None:
        """None for a file that was removed after it was encoded. Flipped if that is wanted and the example may be."""
        flipped = prefer_flipped and example.may_flip
        try:
            image, (width, height) = read_thumbnail(example.image, THUMBNAIL_PIXELS)
        except BadFile:
            return None
        pixels = decode(self._data.latents(example, flipped=flipped)[None])[0]
        box, bucket = example.box, example.bucket
        left, top = box.left / box.resized_width, box.top / box.resized_height
        right, bottom = left + bucket.width / box.resized_width, top + bucket.height / box.resized_height
        return Thumbnail(
            image=str(example.image),
            caption=example.caption(),
            bucket=str(bucket),
            width=width,
            height=height,
            crop=(left, top, right, bottom),
            original=_jpeg(image),
            encoded=_jpeg(Image.fromarray(pixels.permute(1, 2, 0).numpy())),
            flipped=flipped,
        )


def _identity(file: ImageFile) -> tuple[object, ...]:
    """A key that is equal for two names of one file."""
    try:
        status = file.path.stat()
    except OSError:
        return (file,)  # removed after it was encoded
    return status.st_dev, status.st_ino, file.start


def _as_numbers(keys: np.ndarray) -> np.ndarray:
    """(n, 16) uint8 -> (n, 2) uint64, which sort faster."""
    return np.ascontiguousarray(keys).view("<u8")


def _lengths(folder: Path, captions: RequiredEntries) -> np.ndarray:
    """For each caption its number of tokens before truncation and the number of characters that are used: (n, 2)."""
    return Store(folder).column(captions.keys, LENGTH)


def _jpeg(image: Image.Image) -> bytes:
    small = image.copy()
    small.thumbnail((THUMBNAIL_PIXELS, THUMBNAIL_PIXELS))
    buffer = io.BytesIO()
    small.save(buffer, "JPEG", quality=JPEG_QUALITY)
    return buffer.getvalue()


def write_page(folder: Path, facts: DatasetFacts) -> Path:
    """Writes the page into the folder; returns its path."""
    folder.mkdir(parents=True, exist_ok=True)
    write_text(folder / DATASET_REPORT, render(facts))
    return folder / DATASET_REPORT
