"""A second look at a directory opens only what has changed since the first, and finds what a first look would."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import pytest

from tests.tiny_model import make_tiny_dataset, write_image
from tests.utils.data.image_makers import left_half, quarters, read_size, save
from tests.utils.data.scanning import Scan, config_of, names
from tests.utils.data.sources.test_directory_index import SAMPLES, image, png, write_parquet, write_tar
from utils.data.dataset import Dataset
from utils.data.scan import scan
from utils.data.sources import caption_sources, directory_index
from utils.data.sources.archive_entries import ArchiveEntry
from utils.data.sources.decoding import BadFile
from utils.data.sources.directory_index import DirectoryIndexer
from utils.data.sources.image_files import ImageFile
from utils.data.sources.readers import Readers
from utils.files.file_index import FileIndex


class Counting:
    """Readers that note which images' sizes they are asked for, and which tables."""

    def __init__(self, readers: Readers) -> None:
        self._readers = readers
        self.asked: list[str] = []

    def sizes(self, files: Sequence[ImageFile]) -> Future[list[tuple[int, int] | str]]:
        self.asked += [str(file) for file in files]
        return self._readers.sizes(files)

    def parquet(self, path: Path, *columns: str | None) -> Future[tuple[list[ArchiveEntry], str, list[BadFile]]]:
        self.asked.append(str(path))
        return self._readers.parquet(path, *columns)


class Looks:
    """Looks at one folder again and again, and tells what was opened."""

    def __init__(self, readers: Readers, folder: Path, patch: pytest.MonkeyPatch) -> None:
        self.folder, self._counting = folder, Counting(readers)
        self.images = folder / "images"
        any_readers: Any = self._counting
        self.scan, self._first = Scan(any_readers, folder / "memory"), Scan(readers)
        self._opened: list[str] = []
        for module, name in (
            (caption_sources, "read_caption"),
            (directory_index, "read_caption_table"),
            (directory_index, "list_tar"),
        ):
            patch.setattr(module, name, self._noting(getattr(module, name)))

    def _noting(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def noted(path: Path, *arguments: Any, **keywords: Any) -> Any:
            self._opened.append(str(path))
            return function(path, *arguments, **keywords)

        return noted

    def look(self, **changes: Any) -> tuple[Dataset, list[str]]:
        """What was found, as a look without memory finds it too; and names of what was opened for it."""
        given = changes or {"directory": [{"path": self.images}]}
        self._counting.asked, self._opened = [], []
        found = self.scan(**given)
        opened = sorted(path.removeprefix(f"{self.images}/") for path in self._counting.asked + self._opened)
        expected = self._first(**given)
        assert list(found.examples) == list(expected.examples)
        assert [str(bad) for bad in found.bad_files] == [str(bad) for bad in expected.bad_files]
        assert found.warnings == expected.warnings
        return found, opened

    def opened(self, **changes: Any) -> list[str]:
        return self.look(**changes)[1]


@pytest.fixture
def looks(readers: Readers, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Looks:
    make_tiny_dataset(tmp_path / "images", 3)
    return Looks(readers, tmp_path, monkeypatch)


EVERYTHING = sorted(f"image_00{index}{suffix}" for index in range(3) for suffix in (".png", ".txt"))


def test_a_second_look_opens_nothing(looks: Looks) -> None:
    assert looks.opened() == EVERYTHING
    assert looks.opened() == []
    assert looks.opened(directory=[{"path": looks.images}], resolutions=[64], upscale="never") == [], "nor at other sizes"


def test_a_changed_image_is_read_again_alone(looks: Looks) -> None:
    looks.look()
    save(quarters(96, 32), looks.images / "image_001.png")
    found, opened = looks.look()
    assert opened == ["image_001.png"]
    assert found.examples.images.sizes.tolist() == [[40, 40], [96, 32], [32, 64]]
    assert looks.opened() == []


def test_a_image_of_the_same_size_and_time_but_replaced_is_read_again(looks: Looks) -> None:
    looks.look()
    path = looks.images / "image_001.png"
    status = path.stat()
    (looks.folder / "new").write_bytes(path.read_bytes())
    os.utime(looks.folder / "new", ns=(status.st_atime_ns, status.st_mtime_ns))
    (looks.folder / "new").replace(path)
    assert looks.opened() == ["image_001.png"]


def test_a_changed_caption_is_read_again_alone(looks: Looks) -> None:
    looks.look()
    (looks.images / "image_002.txt").write_text("another")
    found, opened = looks.look()
    assert opened == ["image_002.txt"]
    assert [example.caption() for example in found.examples][2] == "another"
    assert looks.opened() == []


def test_an_added_image_is_read_alone_wherever_it_stands(looks: Looks) -> None:
    looks.look()
    image(looks.images, "a_first.png", "added")
    image(looks.images, "image_001b.png", "added")
    found, opened = looks.look()
    assert opened == ["a_first.png", "a_first.txt", "image_001b.png", "image_001b.txt"]
    assert names(found)[::3] == ["a_first.png", "image_001b.png"]
    assert looks.opened() == []


@pytest.mark.parametrize("index", range(3))
def test_a_removed_image_makes_nothing_be_read(looks: Looks, index: int) -> None:
    looks.look()
    for suffix in (".png", ".txt"):
        (looks.images / f"image_00{index}{suffix}").unlink()
    found, opened = looks.look()
    assert (opened, len(found.examples)) == ([], 2)
    assert looks.opened() == []


def test_one_removed_and_one_added_at_once(looks: Looks) -> None:
    looks.look()
    for suffix in (".png", ".txt"):
        (looks.images / f"image_000{suffix}").unlink()
    write_image(looks.images, 7)
    assert looks.opened() == ["image_007.png", "image_007.txt"]


def test_all_images_may_go_and_come_back(looks: Looks) -> None:
    looks.look()
    for path in looks.images.iterdir():
        path.unlink()
    assert looks.opened() == []
    make_tiny_dataset(looks.images, 3)
    assert looks.opened() == EVERYTHING


def test_what_cannot_be_used_is_tried_anew_and_the_rest_is_not(looks: Looks) -> None:
    """It may have been the network that failed."""
    (looks.images / "image_000.png").write_bytes(b"no image")
    (looks.images / "image_001.txt").write_bytes(b"\xff")
    (looks.images / "image_002.txt").unlink()
    looks.look()
    found, opened = looks.look()
    assert opened == ["image_000.png", "image_001.txt"]
    assert (len(found.examples), len(found.bad_files)) == (0, 3)
    (looks.images / "image_002.txt").write_text("a caption")
    found, opened = looks.look()
    assert opened == ["image_000.png", "image_001.txt", "image_002.txt"]
    assert names(found) == ["image_002.png"]


@pytest.mark.parametrize("content", [b"", b"no such file", None])
def test_a_damaged_memory_costs_a_look_and_nothing_else(looks: Looks, content: bytes | None) -> None:
    looks.look()
    (memory,) = (looks.folder / "memory" / "files").iterdir()
    memory.write_bytes(content if content is not None else memory.read_bytes()[:-40])
    assert looks.opened() == EVERYTHING
    assert looks.opened() == []


def test_a_flipped_bit_in_a_remembered_caption_is_not_trained_on(looks: Looks) -> None:
    looks.look()
    (memory,) = (looks.folder / "memory" / "files").iterdir()
    content = memory.read_bytes()
    memory.write_bytes(content.replace(b"number 1", b"number 3"))
    assert memory.read_bytes() != content
    assert looks.opened() == EVERYTHING


def test_captions_by_line_are_not_taken_for_whole_ones(looks: Looks) -> None:
    (looks.images / "image_000.txt").write_text("one\ntwo")
    plain, by_line = ({"directory": [{"path": looks.images, "caption_per_line": value}]} for value in (False, True))
    counts = [looks.look(**changes)[0].examples[0].num_captions for changes in (plain, by_line, plain)]
    assert counts == [1, 2, 1]
    assert looks.opened(**by_line) == []


def test_a_look_that_may_not_write_remembers_nothing_and_reads_what_others_remembered(looks: Looks, tmp_path: Path) -> None:
    config, counting = config_of(looks.images), looks.scan.readers
    scan(config, 16, DirectoryIndexer(counting, FileIndex(tmp_path / "memory", may_write=False)))
    assert not (tmp_path / "memory").exists()
    looks.look(directory=[{"path": looks.images}])
    counting.asked = []  # type: ignore[attr-defined]
    scan(config, 16, DirectoryIndexer(counting, FileIndex(tmp_path / "memory", may_write=False)))
    assert counting.asked == []  # type: ignore[attr-defined]


# --- tables ------------------------------------------------------------------------------------------------------------


def write_captions(folder: Path, table: dict[str, str]) -> None:
    (folder / "captions.json").write_text(json.dumps(table))


def test_an_edited_table_is_read_again_and_no_image_is(looks: Looks) -> None:
    for index in (0, 1):
        (looks.images / f"image_00{index}.txt").unlink()
    table = {"image_000.png": "zero", "image_001.png": "one"}
    write_captions(looks.images, table)
    looks.look()
    assert looks.opened() == []
    write_captions(looks.images, {**table, "image_001.png": "edited"})
    found, opened = looks.look()
    assert opened == ["captions.json"]
    assert [example.caption() for example in found.examples] == ["zero", "edited", "a blue circle, number 2"]
    assert looks.opened() == []


def test_a_image_elsewhere_that_a_table_names_is_remembered_too(looks: Looks) -> None:
    image(looks.images, "deep/fox.png")
    write_captions(looks.images, {"deep/fox.png": "a fox", "gone.png": "nothing"})
    looks.look()
    assert looks.opened() == []
    save(quarters(96, 32), looks.images / "deep" / "fox.png")
    assert looks.opened() == ["deep/fox.png"]
    (looks.images / "deep" / "fox.png").unlink()
    assert len(looks.look()[0].examples) == 3
    image(looks.images, "deep/fox.png")
    found, opened = looks.look()
    assert (len(found.examples), opened) == (4, ["captions.json", "deep/fox.png"])


def test_a_text_file_that_comes_or_goes_beside_a_table_counts_at_once(looks: Looks) -> None:
    write_captions(looks.images, {f"image_00{index}.png": "of the table" for index in range(3)})
    looks.look()
    (looks.images / "image_000.txt").unlink()
    found, opened = looks.look()
    assert opened == ["captions.json"]
    assert found.examples[0].caption() == "of the table"
    (looks.images / "image_000.txt").write_text("of the text file")
    found, opened = looks.look()
    assert opened == ["image_000.txt"]
    assert found.examples[0].caption() == "of the text file"


def test_a_removed_table_takes_its_captions_with_it(looks: Looks) -> None:
    (looks.images / "image_000.txt").unlink()
    write_captions(looks.images, {"image_000.png": "zero"})
    looks.look()
    (looks.images / "captions.json").unlink()
    found, opened = looks.look()
    assert (opened, names(found)) == ([], ["image_001.png", "image_002.png"])


def test_a_table_that_cannot_be_read_is_tried_anew(looks: Looks) -> None:
    (looks.images / "image_000.txt").unlink()
    (looks.images / "captions.json").write_text("{")
    looks.look()
    found, opened = looks.look()
    assert opened == ["captions.json"]
    assert len(found.bad_files) == 2


def test_images_elsewhere_are_found_once_their_table_can_be_read(looks: Looks, monkeypatch: pytest.MonkeyPatch) -> None:
    """The table itself has not changed: the disk it is on was away."""
    image(looks.images, "deep/fox.png")
    write_captions(looks.images, {"deep/fox.png": "a fox"})
    with monkeypatch.context() as broken:
        broken.setattr(directory_index, "read_caption_table", lambda path: _raise(BadFile(path, "cannot be read")))
        assert len(looks.look()[0].examples) == 3
    assert "deep/fox.png" in names(looks.look()[0])


def _raise(error: Exception) -> NoReturn:
    raise error


# --- archives, masks ---------------------------------------------------------------------------------------------------


def test_archives_are_listed_once(looks: Looks) -> None:
    write_tar(looks.images / "a.tar", SAMPLES)
    write_parquet(looks.images / "b.parquet", {"image": [png(0)], "text": ["first"]})
    write_parquet(looks.images / "c.parquet", {"path": ["deep/fox.png"], "text": ["a fox"]})
    image(looks.images, "deep/fox.png")
    _, opened = looks.look()
    archives = ["a.tar", "a.tar/000/fox.png", "a.tar/000/owl.png", "b.parquet", "b.parquet/row 0", "c.parquet"]
    assert opened == sorted([*EVERYTHING, *archives, "deep/fox.png"])
    assert looks.opened() == []
    write_tar(looks.images / "a.tar", {**SAMPLES, "new.png": png(1), "new.txt": b"new"})
    assert [name for name in looks.opened() if not name.startswith("a.tar")] == []
    assert looks.opened() == []


def test_bad_members_of_an_archive_are_told_at_every_look(looks: Looks) -> None:
    write_tar(looks.images / "a.tar", {**SAMPLES, "bad.png": png(1), "bad.txt": b"\xff"})
    looks.look()
    found, opened = looks.look()
    assert opened == []
    assert [bad.path.name for bad in found.bad_files] == ["bad.txt"]


def test_masks_and_control_images_are_remembered(looks: Looks, tmp_path: Path) -> None:
    for kind in ("masks", "control"):
        (tmp_path / kind).mkdir()
        for path in looks.images.glob("*.png"):
            save(left_half(*read_size(path)), tmp_path / kind / path.name)
    given = {"path": looks.images, "mask_path": tmp_path / "masks", "control_path": tmp_path / "control"}
    assert len(looks.opened(directory=[given])) == 4 * 3
    assert looks.opened(directory=[given]) == []
    save(left_half(80, 80), tmp_path / "masks" / "image_000.png")
    assert looks.opened(directory=[given]) == [str(tmp_path / "masks" / "image_000.png")]


# --- hashes ------------------------------------------------------------------------------------------------------------


def fill_in_hashes(found: Dataset) -> None:
    for number, (column, row, _) in enumerate(list(found.examples.unhashed())):
        column[row] = np.full(16, number + 1, np.uint8)
    for stored in found.stored_hashes:
        stored.save()


def test_hashes_of_images_masks_and_archives_are_remembered_until_the_file_changes(looks: Looks, tmp_path: Path) -> None:
    write_tar(looks.images / "a.tar", {"000/x.png": SAMPLES["000/fox.png"], "000/x.txt": b"x"})
    (tmp_path / "masks" / "a.tar" / "000").mkdir(parents=True)
    for path in looks.images.glob("*.png"):
        save(left_half(*read_size(path)), tmp_path / "masks" / path.name)
    save(left_half(40, 40), tmp_path / "masks" / "a.tar" / "000" / "x.png")
    # Between used ones there is one that cannot be used: rows of the memory are not rows of the table.
    (looks.images / "image_000.txt").write_bytes(b"\xff")
    given: dict[str, Any] = {"directory": [{"path": looks.images, "mask_path": tmp_path / "masks"}], "recursive": True}
    first = looks.scan(**given)
    assert first.examples.num_unhashed() == 2 * 3
    fill_in_hashes(first)
    second = looks.scan(**given)
    assert second.examples.num_unhashed() == 0
    contents = [(example.content, example.mask_content) for example in second.examples]
    assert contents == [(example.content, example.mask_content) for example in first.examples]
    assert len({content for pair in contents for content in pair} - {b""}) == 2 * 3
    save(quarters(64, 32), looks.images / "image_001.png")
    save(left_half(32, 64), tmp_path / "masks" / "image_002.png")
    third = looks.scan(**given)
    assert sorted(file.path.name for _, _, file in third.examples.unhashed()) == ["image_001.png", "image_002.png"]
