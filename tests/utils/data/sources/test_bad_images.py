"""Reader processes report each of two hundred bad images with a reason, and read all unusual ones."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.utils.data.image_makers import uncropped
from tests.utils.data.sources.bad_images import UNUSUAL_SIZE, make_bad_images, make_unusual_images
from utils.data.sources.decoding import BadFile
from utils.data.sources.image_files import ImageFile
from utils.data.sources.readers import Readers

LIMIT_SECONDS = 10.0


@pytest.fixture(scope="module")
def readers() -> Iterator[Readers]:
    with Readers(2, limit_seconds=LIMIT_SECONDS) as pool:
        yield pool


@pytest.fixture(scope="module")
def bad(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, str]]:
    folder = tmp_path_factory.mktemp("bad")
    return folder, make_bad_images(folder)


def is_reason(text: str) -> bool:
    """Returns whether the text is one line that does not concern the reader process."""
    return bool(text.strip()) and "\n" not in text and "process" not in text and "took longer" not in text


def test_at_least_twenty_kinds_of_bad_images_exist_and_each_has_a_caption(bad: tuple[Path, dict[str, str]]) -> None:
    folder, kinds = bad
    assert len(kinds) == 200
    assert len(set(kinds.values())) >= 20
    assert all((folder / name).with_suffix(".txt").is_file() for name in kinds)


def test_bad_images_are_reproducible(tmp_path: Path, bad: tuple[Path, dict[str, str]]) -> None:
    folder, kinds = bad
    assert make_bad_images(tmp_path) == kinds
    files = [name for name in kinds if (folder / name).is_file()]
    assert len(files) > 150
    assert all((folder / name).read_bytes() == (tmp_path / name).read_bytes() for name in files)


def test_every_bad_image_is_reported_with_a_reason(readers: Readers, bad: tuple[Path, dict[str, str]]) -> None:
    """By reading its size or, where only decoding detects the defect, its pixels."""
    folder, kinds = bad
    files = [ImageFile(folder / name) for name in kinds]
    started_at = time.monotonic()
    sizes = readers.sizes(files).result()
    pixels = [readers.pixels(file, uncropped(64, 48)) for file in files]
    for file, size, future in zip(files, sizes, pixels, strict=True):
        with pytest.raises(BadFile) as caught:
            future.result()
        assert caught.value.path == file.path
        assert is_reason(caught.value.reason), kinds[file.path.name]
        assert isinstance(size, tuple) or is_reason(size), kinds[file.path.name]
    assert time.monotonic() - started_at < 15


EXPECTED = {
    "empty": "is empty (0 bytes)",
    "truncated": "is truncated",
    "text": "is not an image Pillow can read",
    "a web page": "is not an image Pillow can read",
    "a folder": "cannot be read: Is a directory",
    "a pipe": "cannot be read: Not a regular file",
    "a broken link": "cannot be read: No such file or directory",
    "a link to itself": "cannot be read: Too many levels of symbolic links",
    "no permission": "cannot be read: Permission denied",
    "declares 60000x60000 pixels": "has 3,600,000,000 pixels; the limit is 178,000,000",
    "one pixel high": "is 400x1 pixels: no bucket has a similar aspect ratio",
    "PostScript": "is PostScript, a program, which is not executed",
}


def test_reasons_describe_the_defect(readers: Readers, bad: tuple[Path, dict[str, str]]) -> None:
    folder, kinds = bad
    names = [name for name, kind in kinds.items() if kind in EXPECTED and not name.endswith(".avif")]
    reasons = readers.sizes([ImageFile(folder / name) for name in names]).result()
    assert reasons == [EXPECTED[kinds[name]] for name in names]


def test_almost_every_bad_image_is_detected_by_reading_its_size(readers: Readers, bad: tuple[Path, dict[str, str]]) -> None:
    """That is before anything is encoded; only damage between an intact header and an intact end requires decoding."""
    folder, kinds = bad
    sizes = readers.sizes([ImageFile(folder / name) for name in kinds]).result()
    passed = {kind for kind, size in zip(kinds.values(), sizes, strict=True) if isinstance(size, tuple)}
    assert passed == {"damaged in the middle", "floating point", "no pixels"}


def test_unusual_images_are_read(tmp_path: Path, readers: Readers) -> None:
    unusual = make_unusual_images(tmp_path)
    files = [ImageFile(tmp_path / name) for name in unusual]
    assert readers.sizes(files).result() == [UNUSUAL_SIZE] * len(unusual)
    for file in files:
        pixels = readers.pixels(file, uncropped(*UNUSUAL_SIZE)).result()
        assert pixels.shape == (3, UNUSUAL_SIZE[1], UNUSUAL_SIZE[0])
        assert pixels.min() < 100 < 200 < pixels.max(), f"{unusual[file.path.name]}: the image is decoded"
