"""The inputs of the encoders: how an item is read, its cache key, and which outputs are stored."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Any, Literal, NamedTuple

from torch import Tensor

from models.family import EncodedItem
from utils.data.encoding.encoded import caption_key, latents_key, mask_key
from utils.data.encoding.plan import CacheSettings
from utils.data.encoding.required import TEXTS, Item, is_control, is_flipped
from utils.data.encoding.stored_names import STORED_STD
from utils.data.encoding.text_storage import pack
from utils.data.examples import Example, ExampleTable
from utils.data.sources.readers import Readers

Kind = Literal["latents", "mask", "caption"]
"""The kinds of cache entries."""
CAPTIONS = "captions"
"""Group of all entries of text encoders, which have the same shapes."""


class InputSource(NamedTuple):
    """The inputs of one encoder. All functions may be called on any rank."""

    kind: Kind
    read: Callable[[Item], Future[Any]]
    """Starts reading an item; the result is an array or a string, or the future raises BadFile."""
    key: Callable[[Item], bytes]
    group: Callable[[Item], str]
    pack: Callable[[EncodedItem], dict[str, Tensor]]
    """Selects and converts the tensors that are stored."""


class EncoderInputs:
    """The images, masks and captions of a run's tables, as inputs of encoders."""

    def __init__(
        self, tables: Sequence[ExampleTable], texts: Sequence[str], settings: CacheSettings, readers: Readers, downscale: int
    ) -> None:
        self._tables, self._texts, self._settings, self._readers = tables, texts, settings, readers
        self._downscale = downscale

    def images(self) -> InputSource:
        def read(item: Item) -> Future[Any]:
            example = self._example(item)
            file = example.control if is_control(item) else example.image
            assert file is not None
            image_hash = example.control_hash if is_control(item) else example.image_hash
            return self._readers.pixels(file, example.box, flipped=is_flipped(item), expected_hash=image_hash)

        def key(item: Item) -> bytes:
            example = self._example(item)
            image_hash = example.control_hash if is_control(item) else example.image_hash
            return latents_key(image_hash, example.box.key(), flipped=is_flipped(item))

        def keep(entry: EncodedItem) -> dict[str, Tensor]:
            mean = {"latents": entry["latents"]}
            return {**mean, STORED_STD: entry["std"]} if self._settings.posterior else mean

        return InputSource("latents", read, key, self._bucket, keep)

    def masks(self) -> InputSource:
        def read(item: Item) -> Future[Any]:
            example = self._example(item)
            assert example.mask is not None
            return self._readers.mask(example.mask, example.box, self._downscale, expected_hash=example.mask_hash)

        def key(item: Item) -> bytes:
            example = self._example(item)
            return mask_key(example.mask_hash, example.box.key())

        return InputSource("mask", read, key, self._bucket, dict)

    def captions(self) -> InputSource:
        def read(item: Item) -> Future[Any]:
            future: Future[Any] = Future()
            future.set_result(self.caption(item))
            return future

        def keep(entry: EncodedItem) -> dict[str, Tensor]:
            return pack(entry, self._settings.text_dtype)

        return InputSource("caption", read, lambda item: caption_key(self.caption(item)), lambda _item: CAPTIONS, keep)

    def caption(self, item: Item) -> str:
        """Returns the caption of an item, or the text that belongs to no image."""
        table, row, variant = item
        return self._texts[row] if table == TEXTS else self._example(item).caption(variant)

    def _example(self, item: Item) -> Example:
        table, row, _ = item
        return self._tables[table][row]

    def _bucket(self, item: Item) -> str:
        return str(self._example(item).bucket)
