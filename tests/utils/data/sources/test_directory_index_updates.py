"""A second scan of a directory opens only changed files and gives the same result as a first scan."""

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
from tests.utils.data.sources.test_directory_index import SAMPLES, png, write_captioned_image, write_parquet, write_tar
from utils.data.dataset import Dataset
from utils.data.scan import scan
from utils.data.sources import caption_sources, directory_index
from utils.data.sources.archive_entries import ArchiveEntry
from utils.data.sources.decoding import BadFile
from utils.data.sources.directory_index import DirectoryIndexer
from utils.data.sources.image_files import ImageFile
from utils.data.sources.readers import Readers
from utils.files.file_index import FileIndex, FileTable


class RecordingReaders:
    """Readers that record the requested image sizes and .parquet files."""

    def __init__(self, readers: Readers) -> None:
        self._readers = readers
        self.requested: list[str] = []

    def sizes(self, files: Sequence[ImageFile]) -> Future[list[tuple[int, int] | str]]:
        self.requested += [str(file) for file in files]
        return self._readers.sizes(files)

    def parquet(self, path: Path, *columns: str | None) -> Future[tuple[list[ArchiveEntry], str, list[BadFile]]]:
        self.requested.append(str(path))
        return self._readers.parquet(path, *columns)


class Rescanner:
    """Scans one folder repeatedly and records the opened files."""

    def __init__(self, readers: Readers, folder: Path, patch: pytest.MonkeyPatch) -> None:
        self.folder, self._recording = folder, RecordingReaders(readers)
        self.images = folder / "images"
        any_readers: Any = self._recording
        self.scan, self._scan_without_index = Scan(any_readers, folder / "index"), Scan(readers)
        self._opened: list[str] = []
        for module, name in (
            (caption_sources, "read_caption"),
            (directory_index, "read_caption_table"),
            (directory_index, "list_tar"),
        ):
            patch.setattr(module, name, self._recorded(getattr(module, name)))

    def _recorded(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def recorded(path: Path, *arguments: Any, **keywords: Any) -> Any:
            self._opened.append(str(path))
            return function(path, *arguments, **keywords)

        return recorded

    def rescan(self, **changes: Any) -> tuple[Dataset, list[str]]:
        """Scans, compares the result with a scan without file index, and returns it with the names of the opened files."""
        given = changes or {"directory": [{"path": self.images}]}
        self._recording.requested, self._opened = [], []
        dataset = self.scan(**given)
        opened = sorted(path.removeprefix(f"{self.images}/") for path in self._recording.requested + self._opened)
        expected = self._scan_without_index(**given)
        assert list(dataset.examples) == list(expected.examples)
        assert [str(bad) for bad in dataset.bad_files] == [str(bad) for bad in expected.bad_files]
        assert dataset.warnings == expected.warnings
        return dataset, opened

    def opened(self, **changes: Any) -> list[str]:
        return self.rescan(**changes)[1]


@pytest.fixture
def rescanner(readers: Readers, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Rescanner:
    make_tiny_dataset(tmp_path / "images", 3)
    return Rescanner(readers, tmp_path, monkeypatch)


EVERYTHING = sorted(f"image_00{index}{suffix}" for index in range(3) for suffix in (".png", ".txt"))


def test_second_scan_of_unchanged_files_opens_nothing(rescanner: Rescanner) -> None:
    assert rescanner.opened() == EVERYTHING
    assert rescanner.opened() == []
    assert rescanner.opened(directory=[{"path": rescanner.images}], resolutions=[64], upscale="never") == [], (
        "also at other resolutions"
    )


def test_only_a_changed_image_is_read_again(rescanner: Rescanner) -> None:
    rescanner.rescan()
    save(quarters(96, 32), rescanner.images / "image_001.png")
    dataset, opened = rescanner.rescan()
    assert opened == ["image_001.png"]
    assert dataset.examples.images.sizes.tolist() == [[40, 40], [96, 32], [32, 64]]
    assert rescanner.opened() == []


def test_replaced_image_of_the_same_size_and_mtime_is_read_again(rescanner: Rescanner) -> None:
    rescanner.rescan()
    path = rescanner.images / "image_001.png"
    status = path.stat()
    (rescanner.folder / "new").write_bytes(path.read_bytes())
    os.utime(rescanner.folder / "new", ns=(status.st_atime_ns, status.st_mtime_ns))
    (rescanner.folder / "new").replace(path)
    assert rescanner.opened() == ["image_001.png"]


def test_only_a_changed_caption_is_read_again(rescanner: Rescanner) -> None:
    rescanner.rescan()
    (rescanner.images / "image_002.txt").write_text("another")
    dataset, opened = rescanner.rescan()
    assert opened == ["image_002.txt"]
    assert [example.caption() for example in dataset.examples][2] == "another"
    assert rescanner.opened() == []


def test_only_an_added_image_is_read_wherever_it_sorts(rescanner: Rescanner) -> None:
    rescanner.rescan()
    write_captioned_image(rescanner.images, "a_first.png", "added")
    write_captioned_image(rescanner.images, "image_001b.png", "added")
    dataset, opened = rescanner.rescan()
    assert opened == ["a_first.png", "a_first.txt", "image_001b.png", "image_001b.txt"]
    assert names(dataset)[::3] == ["a_first.png", "image_001b.png"]
    assert rescanner.opened() == []


@pytest.mark.parametrize("index", range(3))
def test_removing_an_image_reads_nothing(rescanner: Rescanner, index: int) -> None:
    rescanner.rescan()
    for suffix in (".png", ".txt"):
        (rescanner.images / f"image_00{index}{suffix}").unlink()
    dataset, opened = rescanner.rescan()
    assert (opened, len(dataset.examples)) == ([], 2)
    assert rescanner.opened() == []


def test_simultaneous_removal_and_addition_reads_only_the_added_image(rescanner: Rescanner) -> None:
    rescanner.rescan()
    for suffix in (".png", ".txt"):
        (rescanner.images / f"image_000{suffix}").unlink()
    write_image(rescanner.images, 7)
    assert rescanner.opened() == ["image_007.png", "image_007.txt"]


def test_all_images_can_be_removed_and_restored(rescanner: Rescanner) -> None:
    rescanner.rescan()
    for path in rescanner.images.iterdir():
        path.unlink()
    assert rescanner.opened() == []
    make_tiny_dataset(rescanner.images, 3)
    assert rescanner.opened() == EVERYTHING


def test_unusable_files_are_tried_again_and_usable_ones_are_not(rescanner: Rescanner) -> None:
    """The cause may have been a network failure."""
    (rescanner.images / "image_000.png").write_bytes(b"no image")
    (rescanner.images / "image_001.txt").write_bytes(b"\xff")
    (rescanner.images / "image_002.txt").unlink()
    rescanner.rescan()
    dataset, opened = rescanner.rescan()
    assert opened == ["image_000.png", "image_001.txt"]
    assert (len(dataset.examples), len(dataset.bad_files)) == (0, 3)
    (rescanner.images / "image_002.txt").write_text("a caption")
    dataset, opened = rescanner.rescan()
    assert opened == ["image_000.png", "image_001.txt", "image_002.txt"]
    assert names(dataset) == ["image_002.png"]


@pytest.mark.parametrize("content", [b"", b"no such file", None])
def test_damaged_file_index_only_costs_a_rescan(rescanner: Rescanner, content: bytes | None) -> None:
    rescanner.rescan()
    (index_file,) = (rescanner.folder / "index" / "files").iterdir()
    index_file.write_bytes(content if content is not None else index_file.read_bytes()[:-40])
    assert rescanner.opened() == EVERYTHING
    assert rescanner.opened() == []


def test_flipped_bit_in_a_stored_caption_is_detected(rescanner: Rescanner) -> None:
    rescanner.rescan()
    (index_file,) = (rescanner.folder / "index" / "files").iterdir()
    content = index_file.read_bytes()
    index_file.write_bytes(content.replace(b"number 1", b"number 3"))
    assert index_file.read_bytes() != content
    assert rescanner.opened() == EVERYTHING


def test_captions_per_line_and_whole_captions_are_indexed_separately(rescanner: Rescanner) -> None:
    (rescanner.images / "image_000.txt").write_text("one\ntwo")
    plain, by_line = ({"directory": [{"path": rescanner.images, "caption_per_line": value}]} for value in (False, True))
    counts = [rescanner.rescan(**changes)[0].examples[0].num_captions for changes in (plain, by_line, plain)]
    assert counts == [1, 2, 1]
    assert rescanner.opened(**by_line) == []


def test_read_only_index_stores_nothing_and_uses_the_stored_index(rescanner: Rescanner, tmp_path: Path) -> None:
    config, recording = config_of(rescanner.images), rescanner.scan.readers
    scan(config, 16, DirectoryIndexer(recording, FileIndex(tmp_path / "index", may_write=False)))
    assert not (tmp_path / "index").exists()
    rescanner.rescan(directory=[{"path": rescanner.images}])
    recording.requested = []  # type: ignore[attr-defined]
    scan(config, 16, DirectoryIndexer(recording, FileIndex(tmp_path / "index", may_write=False)))
    assert recording.requested == []  # type: ignore[attr-defined]


# --- tables ------------------------------------------------------------------------------------------------------------


def write_captions(folder: Path, table: dict[str, str]) -> None:
    (folder / "captions.json").write_text(json.dumps(table))


def test_only_an_edited_caption_table_is_read_again(rescanner: Rescanner) -> None:
    for index in (0, 1):
        (rescanner.images / f"image_00{index}.txt").unlink()
    table = {"image_000.png": "zero", "image_001.png": "one"}
    write_captions(rescanner.images, table)
    rescanner.rescan()
    assert rescanner.opened() == []
    write_captions(rescanner.images, {**table, "image_001.png": "edited"})
    dataset, opened = rescanner.rescan()
    assert opened == ["captions.json"]
    assert [example.caption() for example in dataset.examples] == ["zero", "edited", "a blue circle, number 2"]
    assert rescanner.opened() == []


def test_image_outside_the_folder_named_by_a_table_is_indexed(rescanner: Rescanner) -> None:
    write_captioned_image(rescanner.images, "deep/fox.png")
    write_captions(rescanner.images, {"deep/fox.png": "a fox", "gone.png": "nothing"})
    rescanner.rescan()
    assert rescanner.opened() == []
    save(quarters(96, 32), rescanner.images / "deep" / "fox.png")
    assert rescanner.opened() == ["deep/fox.png"]
    (rescanner.images / "deep" / "fox.png").unlink()
    assert len(rescanner.rescan()[0].examples) == 3
    write_captioned_image(rescanner.images, "deep/fox.png")
    dataset, opened = rescanner.rescan()
    assert (len(dataset.examples), opened) == (4, ["captions.json", "deep/fox.png"])


def test_adding_or_removing_a_text_file_beside_a_table_takes_effect(rescanner: Rescanner) -> None:
    write_captions(rescanner.images, {f"image_00{index}.png": "of the table" for index in range(3)})
    rescanner.rescan()
    (rescanner.images / "image_000.txt").unlink()
    dataset, opened = rescanner.rescan()
    assert opened == ["captions.json"]
    assert dataset.examples[0].caption() == "of the table"
    (rescanner.images / "image_000.txt").write_text("of the text file")
    dataset, opened = rescanner.rescan()
    assert opened == ["image_000.txt"]
    assert dataset.examples[0].caption() == "of the text file"


def test_removing_a_table_removes_its_captions(rescanner: Rescanner) -> None:
    (rescanner.images / "image_000.txt").unlink()
    write_captions(rescanner.images, {"image_000.png": "zero"})
    rescanner.rescan()
    (rescanner.images / "captions.json").unlink()
    dataset, opened = rescanner.rescan()
    assert (opened, names(dataset)) == ([], ["image_001.png", "image_002.png"])


def test_unreadable_table_is_tried_again(rescanner: Rescanner) -> None:
    (rescanner.images / "image_000.txt").unlink()
    (rescanner.images / "captions.json").write_text("{")
    rescanner.rescan()
    dataset, opened = rescanner.rescan()
    assert opened == ["captions.json"]
    assert len(dataset.bad_files) == 2


def test_images_outside_the_folder_are_found_once_their_table_is_readable(
    rescanner: Rescanner, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The table itself has not changed; its disk was temporarily unavailable."""
    write_captioned_image(rescanner.images, "deep/fox.png")
    write_captions(rescanner.images, {"deep/fox.png": "a fox"})
    with monkeypatch.context() as broken:
        broken.setattr(directory_index, "read_caption_table", lambda path: _raise(BadFile(path, "cannot be read")))
        assert len(rescanner.rescan()[0].examples) == 3
    assert "deep/fox.png" in names(rescanner.rescan()[0])


def _raise(error: Exception) -> NoReturn:
    raise error


# --- archives, masks ---------------------------------------------------------------------------------------------------


def test_unchanged_archives_are_listed_once(rescanner: Rescanner) -> None:
    write_tar(rescanner.images / "a.tar", SAMPLES)
    write_parquet(rescanner.images / "b.parquet", {"image": [png(0)], "text": ["first"]})
    write_parquet(rescanner.images / "c.parquet", {"path": ["deep/fox.png"], "text": ["a fox"]})
    write_captioned_image(rescanner.images, "deep/fox.png")
    _, opened = rescanner.rescan()
    archives = ["a.tar", "a.tar/000/fox.png", "a.tar/000/owl.png", "b.parquet", "b.parquet/row 0", "c.parquet"]
    assert opened == sorted([*EVERYTHING, *archives, "deep/fox.png"])
    assert rescanner.opened() == []
    write_tar(rescanner.images / "a.tar", {**SAMPLES, "new.png": png(1), "new.txt": b"new"})
    assert [name for name in rescanner.opened() if not name.startswith("a.tar")] == []
    assert rescanner.opened() == []


def test_bad_archive_members_are_reported_at_every_scan(rescanner: Rescanner) -> None:
    write_tar(rescanner.images / "a.tar", {**SAMPLES, "bad.png": png(1), "bad.txt": b"\xff"})
    rescanner.rescan()
    dataset, opened = rescanner.rescan()
    assert opened == []
    assert [bad.path.name for bad in dataset.bad_files] == ["bad.txt"]


def test_masks_and_control_images_are_indexed(rescanner: Rescanner, tmp_path: Path) -> None:
    for kind in ("masks", "control"):
        (tmp_path / kind).mkdir()
        for path in rescanner.images.glob("*.png"):
            save(left_half(*read_size(path)), tmp_path / kind / path.name)
    given = {"path": rescanner.images, "mask_path": tmp_path / "masks", "control_path": tmp_path / "control"}
    assert len(rescanner.opened(directory=[given])) == 4 * 3
    assert rescanner.opened(directory=[given]) == []
    save(left_half(80, 80), tmp_path / "masks" / "image_000.png")
    assert rescanner.opened(directory=[given]) == [str(tmp_path / "masks" / "image_000.png")]


# --- hashes ------------------------------------------------------------------------------------------------------------


def fill_in_hashes(dataset: Dataset) -> None:
    for number, (column, row, _) in enumerate(list(dataset.examples.unhashed())):
        column[row] = np.full(16, number + 1, np.uint8)
    for stored in dataset.stored_hashes:
        stored.save()


def test_hashes_of_images_masks_and_archives_are_stored_until_the_file_changes(rescanner: Rescanner, tmp_path: Path) -> None:
    write_tar(rescanner.images / "a.tar", {"000/x.png": SAMPLES["000/fox.png"], "000/x.txt": b"x"})
    (tmp_path / "masks" / "a.tar" / "000").mkdir(parents=True)
    for path in rescanner.images.glob("*.png"):
        save(left_half(*read_size(path)), tmp_path / "masks" / path.name)
    save(left_half(40, 40), tmp_path / "masks" / "a.tar" / "000" / "x.png")
    # One unusable image lies between usable ones, so rows of the index are not rows of the table.
    (rescanner.images / "image_000.txt").write_bytes(b"\xff")
    given: dict[str, Any] = {"directory": [{"path": rescanner.images, "mask_path": tmp_path / "masks"}], "recursive": True}
    first = rescanner.scan(**given)
    assert first.examples.num_unhashed() == 2 * 3
    fill_in_hashes(first)
    second = rescanner.scan(**given)
    assert second.examples.num_unhashed() == 0
    hashes = [(example.image_hash, example.mask_hash) for example in second.examples]
    assert hashes == [(example.image_hash, example.mask_hash) for example in first.examples]
    assert len({digest for pair in hashes for digest in pair} - {b""}) == 2 * 3
    save(quarters(64, 32), rescanner.images / "image_001.png")
    save(left_half(32, 64), tmp_path / "masks" / "image_002.png")
    third = rescanner.scan(**given)
    assert sorted(file.path.name for _, _, file in third.examples.unhashed()) == ["image_001.png", "image_002.png"]


def test_names_of_stored_columns_do_not_change(rescanner: Rescanner) -> None:
    """Otherwise the indexes of existing caches would be read as damaged, and every file would be opened again."""
    rescanner.rescan()
    (path,) = (rescanner.folder / "index" / "files").iterdir()
    loaded = FileTable(path, may_write=False).load()
    assert loaded is not None
    columns, header = loaded
    names = ["names", "stamps", "caption_stamps", "same", "sizes", "content", "start", "length", "captions", "first_caption"]
    assert sorted(columns) == sorted(names)
    assert sorted(header) == ["elsewhere", "nameless", "tables"]
