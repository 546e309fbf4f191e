"""What is known of a dataset's images, in columns: one row an image. What a directory's images share is said once."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from utils.data.columns import FileBlock, Texts, tensor_place
from utils.data.sources.decoding import CONTENT_BYTES
from utils.data.sources.image_files import ImageFile
from utils.data.sources.image_rows import NO_ROW, PairedImages, group_offsets
from utils.data.sources.tags import TagShuffle

_NO_HASH = bytes(CONTENT_BYTES)


@dataclass(frozen=True)
class Directory:
    """What the examples of one [[directory]] share."""

    place: str
    """Its place in the file, "0"; of an evaluation set "eval/faces/0". Keys begin with it."""
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
    """Columns of what is known of each image; one row each."""

    directory: np.ndarray
    """Number of its directory."""
    names: Texts
    """Below the directory's path."""
    sizes: np.ndarray
    """(n, 2) int32: width and height in pixels, as it is to be looked at."""
    same: np.ndarray
    """Equal numbers: one file under several names."""
    content: np.ndarray
    """(n, 16) uint8, zeros where it is not known yet."""
    captions: Texts
    first_caption: np.ndarray
    """(n + 1): image i has captions first_caption[i] to first_caption[i + 1]."""
    container: np.ndarray
    """Number of the file it is in, or NO_ROW. Empty, as the next two, when no image is in a file with others."""
    start: np.ndarray
    length: np.ndarray
    mask: np.ndarray
    """Row of its mask, or NO_ROW. Empty when no image has one. So for control images."""
    control: np.ndarray

    def __len__(self) -> int:
        return len(self.directory)


def _or_empty(column: np.ndarray) -> np.ndarray:
    return column if (column != NO_ROW).any() else column[:0]


def joined_images(parts: Iterable[ImageTable]) -> ImageTable:
    """All rows of all parts, which have every column; those that say NO_ROW in every row are left away."""
    parts = list(parts)
    captions = Texts.joined(part.captions for part in parts)
    counts = np.concatenate([np.zeros(0, np.int64), *(np.diff(part.first_caption) for part in parts)])

    def column(name: str, dtype: type, width: tuple[int, ...] = ()) -> np.ndarray:
        return np.concatenate([np.zeros((0, *width), dtype), *(vars(part)[name] for part in parts)])

    container, mask, control = (column(name, np.int32) for name in ("container", "mask", "control"))
    is_contained = bool((container != NO_ROW).any())
    return ImageTable(
        directory=column("directory", np.int32),
        names=Texts.joined(part.names for part in parts),
        sizes=column("sizes", np.int32, (2,)),
        same=column("same", np.int64),
        content=column("content", np.uint8, (CONTENT_BYTES,)),
        captions=captions,
        first_caption=group_offsets(counts),
        container=_or_empty(container),
        start=column("start", np.int64) if is_contained else np.zeros(0, np.int64),
        length=column("length", np.int64) if is_contained else np.zeros(0, np.int64),
        mask=_or_empty(mask),
        control=_or_empty(control),
    )


# --- hashes ------------------------------------------------------------------------------------------------------------


def is_known(content: np.ndarray) -> np.ndarray:
    """Which of the hashes (n, 16) are no zeros: boolean, (n,)."""
    return np.asarray(content.any(axis=1))


def unknown(content: np.ndarray, rows: np.ndarray) -> np.ndarray:
    return rows[~is_known(content[rows])]


def hashes(content: np.ndarray) -> list[bytes]:
    """Rows (n, 16) as bytes; empty where a hash is not known."""
    block = content.tobytes()
    hashes = (block[start : start + CONTENT_BYTES] for start in range(0, len(block), CONTENT_BYTES))
    return [one if one != _NO_HASH else b"" for one in hashes]


def hashes_of_paired_images(column: np.ndarray, images: np.ndarray, paired_images: PairedImages) -> list[bytes]:
    """Of each image's mask, or control image; empty where it has none."""
    if not len(column):
        return [b""] * len(images)
    rows = column[images]
    return [
        one if row != NO_ROW else b"" for one, row in zip(hashes(paired_images.content[rows]), rows.tolist(), strict=True)
    ]


def paired_image_of(column: np.ndarray, image: int, paired_images: PairedImages) -> tuple[ImageFile | None, bytes]:
    row = int(column[image]) if len(column) else NO_ROW
    if row == NO_ROW:
        return None, b""
    return paired_images.file(row), hash_or_nothing(paired_images.content[row])


def hash_or_nothing(row: np.ndarray) -> bytes:
    content = row.tobytes()
    return content if content != _NO_HASH else b""


# --- files -------------------------------------------------------------------------------------------------------------


def directory_of_json(entry: Mapping[str, object]) -> Directory:
    shuffle = entry["shuffle"]
    values = {**entry, "resolutions": tuple(entry["resolutions"])}  # type: ignore[arg-type]
    values["shuffle"] = TagShuffle(**shuffle) if isinstance(shuffle, dict) else None
    return Directory(**values)  # type: ignore[arg-type]


def flat(prefix: str, table: ImageTable | PairedImages) -> dict[str, np.ndarray]:
    """Column name -> array; of strings two arrays."""
    columns: dict[str, np.ndarray] = {}
    for name, value in vars(table).items():
        if isinstance(value, Texts):
            is_short = len(value.block) < 2**32
            offsets = value.offsets.astype(np.uint32) if is_short else value.offsets
            columns |= {f"{prefix}.{name}.offsets": offsets, f"{prefix}.{name}.block": value.block[:]}
        else:
            columns[f"{prefix}.{name}"] = value
    return columns


def unflat(prefix: str, columns: Mapping[str, np.ndarray], path: Path) -> dict[str, np.ndarray | Texts]:
    """The other way; letters stay in the file."""
    table: dict[str, np.ndarray | Texts] = {}
    for key, value in columns.items():
        owner, _, name = key.partition(".")
        if owner == prefix and name.endswith(".offsets"):
            name = name.removesuffix(".offsets")
            table[name] = Texts(value, FileBlock(path, *tensor_place(path, f"{prefix}.{name}.block")))
        elif owner == prefix and not name.endswith(".block"):
            table[name] = value
    return table
