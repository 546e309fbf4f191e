"""The images of a dataset as columns, one row per image, and the settings shared by the images of a directory."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from utils.data.sources.decoding import HASH_BYTES
from utils.data.sources.image_files import ImageFile
from utils.data.sources.image_rows import NO_ROW, PairedImages, group_offsets
from utils.data.sources.tags import TagShuffle
from utils.files.columns import FileBlock, Texts, tensor_place

_NO_HASH = bytes(HASH_BYTES)


@dataclass(frozen=True)
class Directory:
    """The settings shared by all examples of one [[directory]]."""

    key_prefix: str
    """First part of its examples' keys: its number in the dataset file ("0"), in an evaluation set "eval/faces/0"."""
    path: str
    resolutions: tuple[int, ...]
    repeats: float
    loss_weight: float
    may_flip: bool
    random_crop: bool
    skip_bad: bool
    shuffle: TagShuffle | None


@dataclass(frozen=True)
class ImageTable:
    """Columns of image properties, one row per image. (n,) unless stated otherwise."""

    directory: np.ndarray
    """Index of the image's directory."""
    names: Texts
    """Path relative to the directory."""
    sizes: np.ndarray
    """(n, 2) int32: width and height in pixels, after EXIF rotation."""
    file_ids: np.ndarray
    """File identity, equal for several names of one file."""
    hashes: np.ndarray
    """(n, 16) uint8: hash of the image file's bytes; zeros where it is not known yet."""
    captions: Texts
    first_caption: np.ndarray
    """(n + 1,): image i has captions first_caption[i]:first_caption[i + 1]."""
    container: np.ndarray
    """Index of the image's archive, or NO_ROW. Empty, like the next two, if no image is in an archive."""
    start: np.ndarray
    length: np.ndarray
    mask: np.ndarray
    """Row of the image's mask, or NO_ROW. Empty if no image has one. Likewise for control images below."""
    control: np.ndarray

    def __len__(self) -> int:
        return len(self.directory)


def _drop_if_unused(column: np.ndarray) -> np.ndarray:
    return column if (column != NO_ROW).any() else column[:0]


def concatenate_images(parts: Iterable[ImageTable]) -> ImageTable:
    """Concatenates parts that have all columns; drops the columns that are NO_ROW in every row."""
    parts = list(parts)
    captions = Texts.concatenate(part.captions for part in parts)
    counts = np.concatenate([np.zeros(0, np.int64), *(np.diff(part.first_caption) for part in parts)])

    def column(name: str, dtype: type, width: tuple[int, ...] = ()) -> np.ndarray:
        return np.concatenate([np.zeros((0, *width), dtype), *(vars(part)[name] for part in parts)])

    container, mask, control = (column(name, np.int32) for name in ("container", "mask", "control"))
    is_contained = bool((container != NO_ROW).any())
    return ImageTable(
        directory=column("directory", np.int32),
        names=Texts.concatenate(part.names for part in parts),
        sizes=column("sizes", np.int32, (2,)),
        file_ids=column("file_ids", np.int64),
        hashes=column("hashes", np.uint8, (HASH_BYTES,)),
        captions=captions,
        first_caption=group_offsets(counts),
        container=_drop_if_unused(container),
        start=column("start", np.int64) if is_contained else np.zeros(0, np.int64),
        length=column("length", np.int64) if is_contained else np.zeros(0, np.int64),
        mask=_drop_if_unused(mask),
        control=_drop_if_unused(control),
    )


# --- hashes ------------------------------------------------------------------------------------------------------------


def is_known(hashes: np.ndarray) -> np.ndarray:
    """Returns which of the hashes (n, 16) are known, that is not zero: bool, (n,)."""
    return np.asarray(hashes.any(axis=1))


def rows_without_hash(hashes: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """Returns those of the rows whose hash is not known."""
    return rows[~is_known(hashes[rows])]


def hashes_as_bytes(hashes: np.ndarray) -> list[bytes]:
    """Converts hashes (n, 16) to bytes objects; empty where a hash is not known."""
    block = hashes.tobytes()
    digests = (block[start : start + HASH_BYTES] for start in range(0, len(block), HASH_BYTES))
    return [digest if digest != _NO_HASH else b"" for digest in digests]


def hashes_of_paired_images(column: np.ndarray, images: np.ndarray, paired_images: PairedImages) -> list[bytes]:
    """Returns the hash of each image's mask, or control image; empty where the image has none or the hash is unknown."""
    if not len(column):
        return [b""] * len(images)
    rows = column[images]
    return [
        digest if row != NO_ROW else b""
        for digest, row in zip(hashes_as_bytes(paired_images.hashes[rows]), rows.tolist(), strict=True)
    ]


def paired_image_of(column: np.ndarray, image: int, paired_images: PairedImages) -> tuple[ImageFile | None, bytes]:
    """Returns the mask, or control image, of an image, and its hash; (None, b"") if it has none."""
    row = int(column[image]) if len(column) else NO_ROW
    if row == NO_ROW:
        return None, b""
    return paired_images.file(row), known_hash(paired_images.hashes[row])


def known_hash(row: np.ndarray) -> bytes:
    """Converts one hash (16,) to bytes; empty if it is not known."""
    digest = row.tobytes()
    return digest if digest != _NO_HASH else b""


# --- files -------------------------------------------------------------------------------------------------------------


def directory_from_json(entry: Mapping[str, object]) -> Directory:
    """Restores a directory from its JSON object."""
    shuffle = entry["shuffle"]
    values = {**entry, "resolutions": tuple(entry["resolutions"])}  # type: ignore[arg-type]
    values["shuffle"] = TagShuffle(**shuffle) if isinstance(shuffle, dict) else None
    return Directory(**values)  # type: ignore[arg-type]


def to_columns(prefix: str, table: ImageTable | PairedImages) -> dict[str, np.ndarray]:
    """Converts a table to columns by prefixed name; a column of strings becomes two arrays, `.offsets` and `.block`."""
    columns: dict[str, np.ndarray] = {}
    for name, value in vars(table).items():
        if isinstance(value, Texts):
            is_short = len(value.block) < 2**32
            offsets = value.offsets.astype(np.uint32) if is_short else value.offsets
            columns |= {f"{prefix}.{name}.offsets": offsets, f"{prefix}.{name}.block": value.block[:]}
        else:
            columns[f"{prefix}.{name}"] = value
    return columns


def from_columns(prefix: str, columns: Mapping[str, np.ndarray], path: Path) -> dict[str, np.ndarray | Texts]:
    """Restores a table's fields from the columns of a file; the characters of strings are read from the file on access."""
    table: dict[str, np.ndarray | Texts] = {}
    for key, value in columns.items():
        owner, _, name = key.partition(".")
        if owner == prefix and name.endswith(".offsets"):
            name = name.removesuffix(".offsets")
            table[name] = Texts(value, FileBlock(path, *tensor_place(path, f"{prefix}.{name}.block")))
        elif owner == prefix and not name.endswith(".block"):
            table[name] = value
    return table
