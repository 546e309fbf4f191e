"""Cache keys of latents, masks and captions, and reading the entries for training.

The key of an entry is computed from its input: the hash of the image file and the crop, or the text of the caption. No
index of examples is stored or sent between processes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from models.family import LENGTH
from utils.data.cache.keys import content_key
from utils.data.cache.locks import SharedLock
from utils.data.cache.store import Store
from utils.data.encoding.stored_names import FLIPPED_SUFFIX, STORED_STD
from utils.data.encoding.text_storage import unpack
from utils.data.examples import Example
from utils.data.sources.decoding import PIXELS_VERSION


def latents_key(file_hash: bytes, geometry: str, *, flipped: bool = False) -> bytes:
    """The key of the latents of an image or control image. geometry: CropBox.key(). file_hash: of the file's bytes."""
    return content_key(file_hash.hex(), geometry + FLIPPED_SUFFIX if flipped else geometry, f"pixels {PIXELS_VERSION}")


def mask_key(file_hash: bytes, geometry: str) -> bytes:
    return content_key(file_hash.hex(), geometry)


def caption_key(caption: str) -> bytes:
    return content_key(caption)


@dataclass(frozen=True)
class CacheFolders:
    """The folder of each encoder's entries."""

    cache: Path
    latents: Path
    masks: Path
    texts: Mapping[str, Path]
    """Encoder name -> folder."""


class EncodedData:
    """Read access to the cache, which is locked against pruning for the lifetime of the object.

    Returned tensors are views of mapped files and must not be written to.
    """

    def __init__(self, folders: CacheFolders) -> None:
        self.folders = folders
        self._use = SharedLock(folders.cache)
        self._latents = Store(folders.latents)
        self._masks = Store(folders.masks)
        self._texts = {name: Store(folder) for name, folder in folders.texts.items()}

    def content_keys(self, example: Example) -> list[str]:
        """Returns a string "folder/key" for each tensor of the example: latents, mask, and first caption by each encoder."""
        geometry = example.box.key()
        keys = [(self.folders.latents, latents_key(example.image_hash, geometry))]
        keys += [(self.folders.masks, mask_key(example.mask_hash, geometry))] if example.mask is not None else []
        keys += [(folder, caption_key(example.caption())) for folder in self.folders.texts.values()]
        return [f"{folder.name}/{key.hex()}" for folder, key in keys]

    def latents(self, example: Example, *, flipped: bool = False) -> Tensor:
        """Returns the posterior's mean, (C, H, W) float32. Raises KeyError if the flipped image is not cached."""
        return self._entry(example.image_hash, example, flipped)["latents"]

    def std(self, example: Example, *, flipped: bool = False) -> Tensor | None:
        """Returns the posterior's std, (C, H, W) float32; None if the cache holds means only."""
        return self._entry(example.image_hash, example, flipped).get(STORED_STD)

    def control(self, example: Example, *, flipped: bool = False) -> Tensor | None:
        """Returns the control image's latents, (C, H, W) float32; None for an example without control image."""
        if example.control is None:
            return None
        return self._entry(example.control_hash, example, flipped)["latents"]

    def _entry(self, file_hash: bytes, example: Example, flipped: bool) -> dict[str, Tensor]:
        return self._latents.get(latents_key(file_hash, example.box.key(), flipped=flipped))

    def mask(self, example: Example, *, flipped: bool = False) -> Tensor | None:
        """Returns the loss weight of each latent pixel, (1, H, W) float32 in [0, 1]; None for an example without mask."""
        if example.mask is None:
            return None
        mask = self._masks.get(mask_key(example.mask_hash, example.box.key()))["mask"]
        return mask.flip(-1) if flipped else mask

    def text(self, caption: str) -> dict[str, Tensor]:
        """Returns "encoder.tensor" -> tensor, without a batch dimension."""
        key, tensors = caption_key(caption), {}
        for name, store in self._texts.items():
            for tensor_name, value in unpack(store.get(key)).items():
                if tensor_name != LENGTH:
                    tensors[f"{name}.{tensor_name}"] = value
        return tensors

    def length(self, encoder: str, caption: str) -> tuple[int, int]:
        """Returns (tokens of the caption before truncation, characters that the encoder reads)."""
        tokens, characters = self._texts[encoder].get(caption_key(caption))[LENGTH].tolist()
        return tokens, characters
