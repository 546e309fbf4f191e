"""The cache entries that a run reads, as items of work and keys.

An item is three integers (table, example, variant), so that the items of a million examples can be sent to every rank.
"""

from __future__ import annotations

import itertools
from array import array
from collections.abc import Iterable, Sequence
from typing import NamedTuple, TypeVar

import numpy as np
from tqdm import tqdm

from utils.console import bar_interval_seconds
from utils.data.cache.keys import KEY_BYTES
from utils.data.encoding.encoded import caption_key, latents_key, mask_key
from utils.data.examples import ExampleTable
from utils.data.sources.image_rows import NO_ROW

T = TypeVar("T")
Item = tuple[int, int, int]
"""(table, example, variant)."""
TEXTS = -1
"""Table number of texts that belong to no example, such as prompts."""
PLAIN, FLIPPED, CONTROL, CONTROL_FLIPPED = range(4)
"""Variants of an example's images. For captions, the variant is the number of the caption."""


def is_flipped(item: Item) -> bool:
    return item[2] in (FLIPPED, CONTROL_FLIPPED)


def is_control(item: Item) -> bool:
    return item[2] in (CONTROL, CONTROL_FLIPPED)


class RequiredEntries(NamedTuple):
    """Entries that a run reads; several items may share an entry."""

    items: np.ndarray
    """(n, 3) int32."""
    keys: np.ndarray
    """(n, 16) uint8."""


class _Collector:
    """Collects items and their keys."""

    def __init__(self) -> None:
        self._numbers, self._keys = array("i"), bytearray()

    def add(self, table: int, row: int, variant: int, key: bytes) -> None:
        self._numbers.extend((table, row, variant))
        self._keys += key

    def entries(self) -> RequiredEntries:
        items = np.array(self._numbers, dtype=np.int32).reshape(-1, 3)
        return RequiredEntries(items, np.frombuffer(bytes(self._keys), dtype=np.uint8).reshape(-1, KEY_BYTES))


def required_latents(tables: Sequence[ExampleTable]) -> RequiredEntries:
    """Returns the latents of images and control images, also flipped where the directory requests flips.

    Images whose hash is unknown are skipped, here and in `required_masks`.
    """
    collector = _Collector()
    for number, table in enumerate(tables):
        for row, inputs in enumerate(_with_bar(table.cache_inputs(), len(table))):
            for source, plain in ((inputs.image_hash, PLAIN), (inputs.control_hash, CONTROL)):
                if source:
                    collector.add(number, row, plain, latents_key(source, inputs.geometry))
                if source and inputs.may_flip:
                    collector.add(number, row, plain + FLIPPED, latents_key(source, inputs.geometry, flipped=True))
    return collector.entries()


def required_masks(tables: Sequence[ExampleTable]) -> RequiredEntries:
    """Returns the masks. They are cached unflipped only."""
    collector = _Collector()
    for number, table in enumerate(tables):
        if not len(table.masks.paths):
            continue
        for row, inputs in enumerate(_with_bar(table.cache_inputs(), len(table))):
            if inputs.mask_hash:
                collector.add(number, row, PLAIN, mask_key(inputs.mask_hash, inputs.geometry))
    return collector.entries()


def required_captions(tables: Sequence[ExampleTable], texts: Sequence[str]) -> RequiredEntries:
    """Returns the texts, and all captions of every image in every order of their tags."""
    collector = _Collector()
    for index, text in enumerate(texts):
        collector.add(TEXTS, index, 0, caption_key(text))
    for number, table in enumerate(tables):
        counts = np.diff(table.images.first_caption)
        first_row = np.full(len(counts), NO_ROW, np.int32)  # the first example of each image that has any
        first_row[table.rows[::-1, 0]] = np.arange(len(table) - 1, -1, -1)
        captions = iter(table.images.captions)
        for row, count in _with_bar(zip(first_row.tolist(), counts.tolist(), strict=True), len(counts)):
            own = list(itertools.islice(captions, count))
            if row == NO_ROW:
                continue
            shuffle = table.directory_of(row).shuffle
            if shuffle is not None:  # numbered as in Example.caption
                own = [shuffle.order(caption, order) for order in range(shuffle.num_orders) for caption in own]
            for variant, caption in enumerate(own):
                collector.add(number, row, variant, caption_key(caption))
    return collector.entries()


def _with_bar(items: Iterable[T], count: int) -> Iterable[T]:
    return tqdm(items, total=count, desc="planning", leave=False, delay=2.0, mininterval=bar_interval_seconds())
