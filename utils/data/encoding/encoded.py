"""The cache as training reads it: an example's latents, mask and control latents, a caption's text tensors.

Where an entry is follows from what it is of: the hash of an image's bytes with its crop, the text of a caption. So nothing
need be kept for each example, and no process need tell another where anything is.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from models.family import LENGTH
from utils.data.cache.keys import content_key
from utils.data.cache.locks import SharedUse
from utils.data.cache.store import Store
from utils.data.encoding.stored_names import STORED_STD
from utils.data.encoding.text_storage import unpack
from utils.data.examples import Example
from utils.data.sources.decoding import PIXELS_VERSION


def latents_key(content: bytes, geometry: str, *, flipped: bool = False) -> bytes:
    """Of an image's, or control image's, bytes, cut out like this."""
    return content_key(content.hex(), f"{geometry} mirrored" if flipped else geometry, f"pixels {PIXELS_VERSION}")


def mask_key(content: bytes, geometry: str) -> bytes:
    return content_key(content.hex(), geometry)


def caption_key(caption: str) -> bytes:
    return content_key(caption)


@dataclass(frozen=True)
class CacheFolders:
    """Where the entries of each encoder are."""

    cache: Path
    latents: Path
    masks: Path
    texts: Mapping[str, Path]
    """By the encoder's name."""


class EncodedData:
    """Reads the cache, and says that it is in use as long as the object lives. Tensors share the files' memory."""

    def __init__(self, folders: CacheFolders) -> None:
        self.folders = folders
        self._use = SharedUse(folders.cache)
        self._latents = Store(folders.latents)
        self._masks = Store(folders.masks)
        self._texts = {name: Store(folder) for name, folder in folders.texts.items()}

    def content_keys(self, example: Example) -> list[str]:
        """What the example's tensors depend on, as names: of image, mask and first caption, each with its encoder's."""
        geometry = example.box.key()
        keys = [(self.folders.latents, latents_key(example.content, geometry))]
        keys += [(self.folders.masks, mask_key(example.mask_content, geometry))] if example.mask is not None else []
        keys += [(folder, caption_key(example.caption())) for folder in self.folders.texts.values()]
        return [f"{folder.name}/{key.hex()}" for folder, key in keys]

    def latents(self, example: Example, *, flipped: bool = False) -> Tensor:
        """The posterior's mean, (C, H, W) float32; flipped: of the flipped image, which only some examples have."""
        return self._entry(example.content, example, flipped)["latents"]

    def std(self, example: Example, *, flipped: bool = False) -> Tensor | None:
        """The posterior's standard deviation, (C, H, W) float32, if the cache has it."""
        return self._entry(example.content, example, flipped).get(STORED_STD)

    def control(self, example: Example, *, flipped: bool = False) -> Tensor | None:
        """The control image's latents, (C, H, W) float32; None for an example without one."""
        if example.control is None:
            return None
        return self._entry(example.control_content, example, flipped)["latents"]

    def _entry(self, content: bytes, example: Example, flipped: bool) -> dict[str, Tensor]:
        return self._latents.get(latents_key(content, example.box.key(), flipped=flipped))

    def mask(self, example: Example, *, flipped: bool = False) -> Tensor | None:
        """How much each latent pixel counts: (1, H, W) float32 in [0, 1]; None for an example without mask."""
        if example.mask is None:
            return None
        mask = self._masks.get(mask_key(example.mask_content, example.box.key()))["mask"]
        return mask.flip(-1) if flipped else mask

    def text(self, caption: str) -> dict[str, Tensor]:
        """ "encoder.tensor" -> tensor, without a batch axis."""
        key, tensors = caption_key(caption), {}
        for name, store in self._texts.items():
            for tensor_name, value in unpack(store.get(key)).items():
                if tensor_name != LENGTH:
                    tensors[f"{name}.{tensor_name}"] = value
        return tensors

    def length(self, encoder: str, caption: str) -> tuple[int, int]:
        """Tokens the caption would take in an encoder if it were not cut, and how many characters of it are read."""
        tokens, characters = self._texts[encoder].get(caption_key(caption))[LENGTH].tolist()
        return tokens, characters
