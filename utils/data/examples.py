"""Training examples: an image at one resolution, with its captions. A table stores millions of them as columns.

An example is three numbers: its image, its resolution and its bucket; everything else belongs to the image or its directory.
`Example` objects are created on access. The table can be written to a file that other processes map, so that one process
scans the directories and all processes use the same examples.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import NamedTuple, overload

import numpy as np

from utils.data.buckets import Bucket, CropBox, crop_box
from utils.data.image_table import (
    Directory,
    ImageTable,
    concatenate_images,
    directory_from_json,
    from_columns,
    hashes_as_bytes,
    hashes_of_paired_images,
    is_known,
    known_hash,
    paired_image_of,
    rows_without_hash,
    to_columns,
)
from utils.data.sources.decoding import HASH_BYTES
from utils.data.sources.image_files import ImageFile
from utils.data.sources.image_rows import NO_ROW, Container, PairedImages, empty_paired_images
from utils.data.sources.tags import TagShuffle
from utils.files.columns import is_intact, map_columns, save_columns
from utils.randomness import fraction

CHUNK_ROWS = 65536
"""Rows converted to Python objects at a time while iterating over a table."""
Unhashed = tuple[np.ndarray, int, ImageFile]
"""(Hash column, row to be filled in, file to hash)."""


@dataclass(frozen=True, slots=True)
class Example:
    """One image at one resolution, with its captions."""

    key: str
    """Identifies the example in every random draw: directory number, image name and resolution ("0/fox.png@512")."""
    image: ImageFile
    captions: tuple[str, ...]
    """As written in the dataset; `caption` also returns their shuffled tag orders."""
    box: CropBox
    repeats: float = 1
    mask: ImageFile | None = None
    control: ImageFile | None = None
    loss_weight: float = 1.0
    may_flip: bool = False
    """Whether some draws of it are flipped horizontally."""
    shuffle: TagShuffle | None = None
    image_hash: bytes = b""
    """Hash of the image file's bytes; empty until it is known. Likewise for the mask and the control image below."""
    mask_hash: bytes = b""
    control_hash: bytes = b""

    @property
    def bucket(self) -> Bucket:
        return self.box.bucket

    @property
    def num_captions(self) -> int:
        """Number of captions a draw may select: captions times tag orders."""
        return len(self.captions) * (self.shuffle.num_orders if self.shuffle is not None else 1)

    def caption(self, number: int = 0) -> str:
        """Returns caption `number` (0 to num_captions - 1). Number 0 is the first caption as written."""
        if self.shuffle is None:
            return self.captions[number]
        order, index = divmod(number, len(self.captions))
        return self.shuffle.order(self.captions[index], order)


class CacheInputs(NamedTuple):
    """The facts of an example that determine the keys of its cache entries."""

    geometry: str
    """Scaling and crop: the `key` of its crop box."""
    image_hash: bytes
    """Hash of the image file's bytes; empty if it is not known. The next two are also empty if there is no such file."""
    mask_hash: bytes
    control_hash: bytes
    may_flip: bool


class ExampleTable(Sequence[Example]):
    """A sequence of examples that stores columns and creates each `Example` on access."""

    def __init__(
        self,
        directories: Sequence[Directory],
        containers: Sequence[Container],
        buckets: Sequence[Bucket],
        images: ImageTable,
        masks: PairedImages,
        controls: PairedImages,
        rows: np.ndarray,
    ) -> None:
        """rows: (n, 3) int32, the indices of the image, of the resolution in its directory, and of the bucket."""
        self.directories, self.containers, self.buckets = list(directories), list(containers), list(buckets)
        self.images, self.masks, self.controls = images, masks, controls
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    @overload
    def __getitem__(self, index: int) -> Example: ...
    @overload
    def __getitem__(self, index: slice) -> list[Example]: ...

    def __getitem__(self, index: int | slice) -> Example | list[Example]:
        if isinstance(index, slice):
            return [self[position] for position in range(*index.indices(len(self)))]
        image, resolution, bucket = self.rows[index].tolist()
        images, directory = self.images, self.directories[self.images.directory[image]]
        name = f"{images.names[image]}@{directory.resolutions[resolution]}"
        mask, mask_hash = paired_image_of(images.mask, image, self.masks)
        control, control_hash = paired_image_of(images.control, image, self.controls)
        first, last = images.first_caption[image : image + 2].tolist()
        return Example(
            key=f"{directory.key_prefix}/{name}",
            image=self.file(image),
            captions=tuple(images.captions[number] for number in range(first, last)),
            box=self._box(image, self.buckets[bucket], directory, name),
            repeats=directory.repeats,
            mask=mask,
            control=control,
            loss_weight=directory.loss_weight,
            may_flip=directory.may_flip,
            shuffle=directory.shuffle,
            image_hash=known_hash(images.hashes[image]),
            mask_hash=mask_hash,
            control_hash=control_hash,
        )

    def __iter__(self) -> Iterator[Example]:
        return (self[index] for index in range(len(self)))

    def name_of(self, image: int) -> str:
        """Returns the part of an example's key before its resolution, for a row of `images`."""
        return f"{self.directories[self.images.directory[image]].key_prefix}/{self.images.names[image]}"

    def file(self, image: int) -> ImageFile:
        """Returns the location of an image's bytes, for a row of `images`."""
        images = self.images
        path = Path(self.directories[images.directory[image]].path) / images.names[image]
        number = int(images.container[image]) if len(images.container) else NO_ROW
        if number == NO_ROW:
            return ImageFile(path)
        container = self.containers[number]
        member = container.column or images.names[image].removeprefix(container.name).lstrip("/")
        return ImageFile(Path(container.path), member, int(images.start[image]), int(images.length[image]))

    def box(self, index: int) -> CropBox:
        """Returns the crop box of an example without creating the example."""
        image, resolution, bucket = self.rows[index].tolist()
        directory = self.directories[self.images.directory[image]]
        name = f"{self.images.names[image]}@{directory.resolutions[resolution]}" if directory.random_crop else ""
        return self._box(image, self.buckets[bucket], directory, name)

    def _box(self, image: int, bucket: Bucket, directory: Directory, name: str) -> CropBox:
        width, height = self.images.sizes[image].tolist()
        # Depends neither on the run's seed nor on the directory's number, so that changing these re-encodes nothing.
        place = fraction(0, "crop", name) if directory.random_crop else None
        return crop_box(width, height, bucket, place)

    def directory_of(self, index: int) -> Directory:
        """Returns the directory of an example."""
        return self.directories[self.images.directory[self.rows[index, 0]]]

    def cache_inputs(self) -> Iterator[CacheInputs]:
        """Yields the cache inputs of each example; four times as fast as iterating over the examples."""
        random_crop = np.array([directory.random_crop for directory in self.directories], bool)
        may_flip_in = np.array([directory.may_flip for directory in self.directories], bool)
        geometries: dict[tuple[int, int, int], str] = {}  # many images have the same size
        for start in range(0, len(self), CHUNK_ROWS):
            if len(geometries) > CHUNK_ROWS:
                geometries.clear()
            rows = self.rows[start : start + CHUNK_ROWS]
            images, directory = rows[:, 0], self.images.directory[rows[:, 0]]
            shapes = np.column_stack([self.images.sizes[images], rows[:, 2]]).tolist()
            columns = (
                hashes_as_bytes(self.images.hashes[images]),
                hashes_of_paired_images(self.images.mask, images, self.masks),
                hashes_of_paired_images(self.images.control, images, self.controls),
                may_flip_in[directory].tolist(),
                random_crop[directory].tolist(),
            )
            for offset, (shape, image_hash, mask_hash, control_hash, may_flip, is_random) in enumerate(
                zip(shapes, *columns, strict=True)
            ):
                width, height, bucket = shape
                if is_random:
                    geometry = self.box(start + offset).key()
                elif (geometry := geometries.get((width, height, bucket), "")) == "":
                    geometry = geometries[width, height, bucket] = crop_box(width, height, self.buckets[bucket]).key()
                yield CacheInputs(geometry, image_hash, mask_hash, control_hash, may_flip)

    @property
    def repeats(self) -> np.ndarray:
        """How many times each example is shown per epoch, (n,) float64."""
        by_directory = np.array([directory.repeats for directory in self.directories], dtype=np.float64)
        return by_directory[self.images.directory[self.rows[:, 0]]]

    @property
    def num_images(self) -> int:
        return len(np.unique(self.rows[:, 0]))

    def bucket_counts(self) -> dict[Bucket, int]:
        """Returns the number of examples of each bucket that is used."""
        counts = np.bincount(self.rows[:, 2], minlength=len(self.buckets))
        return dict(sorted((bucket, int(count)) for bucket, count in zip(self.buckets, counts, strict=True) if count))

    def where(self, chosen: np.ndarray, *, never_flipped: bool = False) -> ExampleTable:
        """Returns the examples for which `chosen` (bool, (n,)) is true, in their order."""
        directories = [replace(entry, may_flip=entry.may_flip and not never_flipped) for entry in self.directories]
        return ExampleTable(
            directories, self.containers, self.buckets, self.images, self.masks, self.controls, self.rows[chosen]
        )

    # --- hashes of bytes ---------------------------------------------------------------------------------------------

    def _unhashed_rows(self) -> Iterator[tuple[np.ndarray, np.ndarray, Callable[[int], ImageFile]]]:
        """Yields (hash column, used rows without a hash, row -> file) for the images, the masks and the control images."""
        images = np.unique(self.rows[:, 0])
        yield self.images.hashes, rows_without_hash(self.images.hashes, images), self.file
        for column, paired_images in ((self.images.mask, self.masks), (self.images.control, self.controls)):
            if len(column):
                rows = np.unique(column[images])
                yield (
                    paired_images.hashes,
                    rows_without_hash(paired_images.hashes, rows[rows != NO_ROW]),
                    paired_images.file,
                )

    def num_unhashed(self) -> int:
        """Returns the number of files that examples use and whose hash is not known."""
        return sum(len(rows) for _, rows, _ in self._unhashed_rows())

    def unhashed(self) -> Iterator[Unhashed]:
        """Yields each of these files."""
        for hashes, rows, file_of in self._unhashed_rows():
            yield from ((hashes, row, file_of(row)) for row in rows.tolist())

    def incomplete(self) -> np.ndarray:
        """Returns which examples use a file whose hash is not known: bool, (n,)."""
        image = self.rows[:, 0]
        missing = ~is_known(self.images.hashes)[image]
        for column, paired_images in ((self.images.mask, self.masks), (self.images.control, self.controls)):
            if len(column):
                row = column[image]
                missing |= (row != NO_ROW) & ~is_known(paired_images.hashes)[row]
        return missing

    # --- files -------------------------------------------------------------------------------------------------------

    def save_in(self, folder: Path) -> Path:
        """Writes the table to a file in the folder, named after the hash of its contents, and returns its path."""
        header = {
            "directories": [asdict(directory) for directory in self.directories],
            "containers": [asdict(container) for container in self.containers],
            "buckets": [(bucket.width, bucket.height) for bucket in self.buckets],
        }
        # File identities are needed only for choosing held-out images, which has been done by then.
        images = replace(self.images, file_ids=self.images.file_ids[:0])
        columns = {"rows": self.rows, **to_columns("images", images)}
        columns |= to_columns("masks", self.masks) | to_columns("controls", self.controls)
        text = json.dumps(header)
        digest = hashlib.blake2b(text.encode(), digest_size=HASH_BYTES)
        for name, column in columns.items():
            digest.update(f"{name} {column.shape}".encode())
            digest.update(np.ascontiguousarray(column).data)
        path = folder / f"{digest.hexdigest()}.safetensors"
        if not is_intact(path):
            save_columns(path, columns, text)
        return path

    @classmethod
    def open(cls, path: Path) -> ExampleTable:
        """Maps a table written by `save_in`."""
        columns, text = map_columns(path)
        header = json.loads(text)
        return cls(
            [directory_from_json(entry) for entry in header["directories"]],
            [Container(**entry) for entry in header["containers"]],
            [Bucket(*sides) for sides in header["buckets"]],
            ImageTable(**from_columns("images", columns, path)),  # type: ignore[arg-type]
            PairedImages(**from_columns("masks", columns, path)),  # type: ignore[arg-type]
            PairedImages(**from_columns("controls", columns, path)),  # type: ignore[arg-type]
            columns["rows"],
        )


def empty_table() -> ExampleTable:
    """Returns a table without examples."""
    return ExampleTable(
        [], [], [], concatenate_images([]), empty_paired_images(), empty_paired_images(), np.zeros((0, 3), np.int32)
    )
