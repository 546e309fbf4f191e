"""Examples: each image at one size with its captions. A million of them as columns; each made an object when asked for.

An example is an image's number, a resolution's and a bucket's; all else is the image's and its directory's. The table can
be written to a file that other processes map, so that one process lists the files and all see the same examples.
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
from utils.data.columns import is_whole, map_columns, save_columns
from utils.data.image_table import (
    Directory,
    ImageTable,
    directory_of_json,
    flat,
    hash_or_nothing,
    hashes,
    hashes_of_paired_images,
    is_known,
    joined_images,
    paired_image_of,
    unflat,
    unknown,
)
from utils.data.sources.decoding import CONTENT_BYTES
from utils.data.sources.image_files import ImageFile
from utils.data.sources.image_rows import NO_ROW, Container, PairedImages, empty_paired_images
from utils.data.sources.tags import TagShuffle
from utils.randomness import fraction

CHUNK_ROWS = 65536
"""Of a table, taken out of the columns at once when all are gone through."""
Unhashed = tuple[np.ndarray, int, ImageFile]
"""A column of hashes, the row in it that is to be filled in, and the file."""


@dataclass(frozen=True, slots=True)
class Example:
    """One image at one size with its captions."""

    key: str
    """Names the example in every random draw: its directory's place in the file, name, resolution ("0/fox.png@512")."""
    image: ImageFile
    captions: tuple[str, ...]
    """As they are written; `caption` has the other orders of their tags too."""
    box: CropBox
    repeats: float = 1
    mask: ImageFile | None = None
    control: ImageFile | None = None
    loss_weight: float = 1.0
    may_flip: bool = False
    """Whether it is shown flipped at some of its draws."""
    shuffle: TagShuffle | None = None
    content: bytes = b""
    """Hash of the image's bytes; empty until it is known. So for mask and control image."""
    mask_content: bytes = b""
    control_content: bytes = b""

    @property
    def bucket(self) -> Bucket:
        return self.box.bucket

    @property
    def num_captions(self) -> int:
        """Captions a draw may show: each in each order of its tags."""
        return len(self.captions) * (self.shuffle.num_orders if self.shuffle is not None else 1)

    def caption(self, number: int = 0) -> str:
        """One of them. Number 0 is the first as it is written."""
        if self.shuffle is None:
            return self.captions[number]
        order, index = divmod(number, len(self.captions))
        return self.shuffle.order(self.captions[index], order)


class Outline(NamedTuple):
    """What of an example decides which entries of the cache are its own."""

    geometry: str
    """How it is cut out of its image: the `key` of its box."""
    content: bytes
    """Hash of the image's bytes; empty when it is not known. So for mask and control image, and when there is none."""
    mask_content: bytes
    control_content: bytes
    may_flip: bool


class ExampleTable(Sequence[Example]):
    """A sequence of examples that holds no Example."""

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
        """rows (n, 3) int32: number of the image, of the resolution among its directory's, and of the bucket."""
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
            return [self[place] for place in range(*index.indices(len(self)))]
        image, resolution, bucket = self.rows[index].tolist()
        images, directory = self.images, self.directories[self.images.directory[image]]
        name = f"{images.names[image]}@{directory.resolutions[resolution]}"
        mask, mask_content = paired_image_of(images.mask, image, self.masks)
        control, control_content = paired_image_of(images.control, image, self.controls)
        first, last = images.first_caption[image : image + 2].tolist()
        return Example(
            key=f"{directory.place}/{name}",
            image=self.file(image),
            captions=tuple(images.captions[number] for number in range(first, last)),
            box=self._box(image, self.buckets[bucket], directory, name),
            repeats=directory.repeats,
            mask=mask,
            control=control,
            loss_weight=directory.loss_weight,
            may_flip=directory.may_flip,
            shuffle=directory.shuffle,
            content=hash_or_nothing(images.content[image]),
            mask_content=mask_content,
            control_content=control_content,
        )

    def __iter__(self) -> Iterator[Example]:
        return (self[index] for index in range(len(self)))

    def name_of(self, image: int) -> str:
        """What begins the keys of an image's examples, before their sizes; by its row in `images`."""
        return f"{self.directories[self.images.directory[image]].place}/{self.images.names[image]}"

    def file(self, image: int) -> ImageFile:
        """Where the bytes of an image are; by its row in `images`."""
        images = self.images
        path = Path(self.directories[images.directory[image]].path) / images.names[image]
        number = int(images.container[image]) if len(images.container) else NO_ROW
        if number == NO_ROW:
            return ImageFile(path)
        container = self.containers[number]
        member = container.column or images.names[image].removeprefix(container.name).lstrip("/")
        return ImageFile(Path(container.path), member, int(images.start[image]), int(images.length[image]))

    def box(self, index: int) -> CropBox:
        """That of an example, without the rest of it."""
        image, resolution, bucket = self.rows[index].tolist()
        directory = self.directories[self.images.directory[image]]
        name = f"{self.images.names[image]}@{directory.resolutions[resolution]}" if directory.random_crop else ""
        return self._box(image, self.buckets[bucket], directory, name)

    def _box(self, image: int, bucket: Bucket, directory: Directory, name: str) -> CropBox:
        width, height = self.images.sizes[image].tolist()
        # Not by the run's seed: another one would encode every image anew. Nor by the directory's place in the file.
        place = fraction(0, "crop", name) if directory.random_crop else None
        return crop_box(width, height, bucket, place)

    def directory_of(self, index: int) -> Directory:
        """An example's directory."""
        return self.directories[self.images.directory[self.rows[index, 0]]]

    def outlines(self) -> Iterator[Outline]:
        """What the cache's keys are made of, of each example in turn; four times as fast as the examples themselves."""
        drawn = np.array([directory.random_crop for directory in self.directories], bool)
        flipped = np.array([directory.may_flip for directory in self.directories], bool)
        known: dict[tuple[int, int, int], str] = {}  # images of one size are many
        for start in range(0, len(self), CHUNK_ROWS):
            if len(known) > CHUNK_ROWS:
                known.clear()
            rows = self.rows[start : start + CHUNK_ROWS]
            images, directory = rows[:, 0], self.images.directory[rows[:, 0]]
            shapes = np.column_stack([self.images.sizes[images], rows[:, 2]]).tolist()
            columns = (
                hashes(self.images.content[images]),
                hashes_of_paired_images(self.images.mask, images, self.masks),
                hashes_of_paired_images(self.images.control, images, self.controls),
                flipped[directory].tolist(),
                drawn[directory].tolist(),
            )
            for offset, (shape, content, mask, control, may_flip, is_drawn) in enumerate(zip(shapes, *columns, strict=True)):
                width, height, bucket = shape
                if is_drawn:
                    geometry = self.box(start + offset).key()
                elif (geometry := known.get((width, height, bucket), "")) == "":
                    geometry = known[width, height, bucket] = crop_box(width, height, self.buckets[bucket]).key()
                yield Outline(geometry, content, mask, control, may_flip)

    @property
    def repeats(self) -> np.ndarray:
        """Showings of each example in an epoch, (n,) float64."""
        of_directory = np.array([directory.repeats for directory in self.directories], dtype=np.float64)
        return of_directory[self.images.directory[self.rows[:, 0]]]

    @property
    def num_images(self) -> int:
        return len(np.unique(self.rows[:, 0]))

    def bucket_counts(self) -> dict[Bucket, int]:
        """Number of examples of each bucket that has any."""
        counts = np.bincount(self.rows[:, 2], minlength=len(self.buckets))
        return dict(sorted((bucket, int(count)) for bucket, count in zip(self.buckets, counts, strict=True) if count))

    def where(self, chosen: np.ndarray, *, never_flipped: bool = False) -> ExampleTable:
        """The examples for which `chosen`, a boolean for each, is true, in their order."""
        directories = [replace(one, may_flip=one.may_flip and not never_flipped) for one in self.directories]
        return ExampleTable(
            directories, self.containers, self.buckets, self.images, self.masks, self.controls, self.rows[chosen]
        )

    # --- hashes of bytes ---------------------------------------------------------------------------------------------

    def _unhashed_rows(self) -> Iterator[tuple[np.ndarray, np.ndarray, Callable[[int], ImageFile]]]:
        """(Hashes, rows of them that examples need and that are not known, row -> file) of images and companions."""
        images = np.unique(self.rows[:, 0])
        yield self.images.content, unknown(self.images.content, images), self.file
        for column, paired_images in ((self.images.mask, self.masks), (self.images.control, self.controls)):
            if len(column):
                rows = np.unique(column[images])
                yield paired_images.content, unknown(paired_images.content, rows[rows != NO_ROW]), paired_images.file

    def num_unhashed(self) -> int:
        """Files that examples need and whose hash is not known."""
        return sum(len(rows) for _, rows, _ in self._unhashed_rows())

    def unhashed(self) -> Iterator[Unhashed]:
        """Each of them."""
        for content, rows, file_of in self._unhashed_rows():
            yield from ((content, row, file_of(row)) for row in rows.tolist())

    def incomplete(self) -> np.ndarray:
        """Which examples need a file whose hash is not known: boolean."""
        image = self.rows[:, 0]
        missing = ~is_known(self.images.content)[image]
        for column, paired_images in ((self.images.mask, self.masks), (self.images.control, self.controls)):
            if len(column):
                row = column[image]
                missing |= (row != NO_ROW) & ~is_known(paired_images.content)[row]
        return missing

    # --- files -------------------------------------------------------------------------------------------------------

    def save_in(self, folder: Path) -> Path:
        """Write the table to a file that `open` maps, and return it; it is named after its contents."""
        header = {
            "directories": [asdict(directory) for directory in self.directories],
            "containers": [asdict(container) for container in self.containers],
            "buckets": [(bucket.width, bucket.height) for bucket in self.buckets],
        }
        # Names of one file are of use while images are held out, which is done.
        images = replace(self.images, same=self.images.same[:0])
        columns = {"rows": self.rows, **flat("images", images)}
        columns |= flat("masks", self.masks) | flat("controls", self.controls)
        text = json.dumps(header)
        digest = hashlib.blake2b(text.encode(), digest_size=CONTENT_BYTES)
        for name, column in columns.items():
            digest.update(f"{name} {column.shape}".encode())
            digest.update(np.ascontiguousarray(column).data)
        path = folder / f"{digest.hexdigest()}.safetensors"
        if not is_whole(path):
            save_columns(path, columns, text)
        return path

    @classmethod
    def open(cls, path: Path) -> ExampleTable:
        columns, text = map_columns(path)
        header = json.loads(text)
        return cls(
            [directory_of_json(entry) for entry in header["directories"]],
            [Container(**entry) for entry in header["containers"]],
            [Bucket(*sides) for sides in header["buckets"]],
            ImageTable(**unflat("images", columns, path)),  # type: ignore[arg-type]
            PairedImages(**unflat("masks", columns, path)),  # type: ignore[arg-type]
            PairedImages(**unflat("controls", columns, path)),  # type: ignore[arg-type]
            columns["rows"],
        )


def empty_table() -> ExampleTable:
    """No examples."""
    return ExampleTable(
        [], [], [], joined_images([]), empty_paired_images(), empty_paired_images(), np.zeros((0, 3), np.int32)
    )
