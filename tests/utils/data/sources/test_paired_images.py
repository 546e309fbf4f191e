"""Pairing of images with masks and control images, and warnings about unused files."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.utils.data.image_makers import left_half, quarters, save, save_turned
from utils.data.sources.decoding import BadFile
from utils.data.sources.directory_index import DirectoryIndex, DirectoryIndexer, IndexSettings
from utils.data.sources.image_rows import NO_ROW, ImageRows, unread_rows
from utils.data.sources.paired_images import CONTROL, MASK, PairedImageKind, PairedImageTable, have_same_aspect_ratio
from utils.data.sources.readers import Readers
from utils.files.columns import Texts
from utils.files.file_index import FileIndex

IMAGE_FOLDER = Path("elsewhere")
"""The folder of the images in messages; it does not exist."""


def image_rows(*names: str, size: tuple[int, int] = (48, 32)) -> ImageRows:
    """Returns the rows of indexed images, all of one size."""
    zeros = np.zeros((len(names), 3), np.int64)
    rows = unread_rows(Texts.of(names), zeros, zeros, np.arange(len(names)))
    rows.sizes[:] = size
    return rows


@pytest.fixture
def table(readers: Readers) -> PairedImageTable:
    return PairedImageTable(MASK, DirectoryIndexer(readers, FileIndex(None)))


def find(
    table: PairedImageTable, folder: Path, rows: ImageRows, *, recursive: bool = False
) -> tuple[list[Path | None], list[BadFile]]:
    """Returns the mask of each image, and the bad files."""
    paired_rows, bad_files = table.find(folder, recursive, rows, lambda row: IMAGE_FOLDER / rows.names[row])
    columns = table.columns()
    return [columns.file(row).path if row != NO_ROW else None for row in paired_rows.tolist()], bad_files


def reason_of(table: PairedImageTable, folder: Path, name: str) -> BadFile:
    """Returns the bad file that is reported for an image without a mask."""
    masks, (bad,) = find(table, folder, image_rows(name))
    assert masks == [None]
    return bad


@pytest.mark.parametrize("suffix", ["png", "jpg", "PNG", "webp", "bmp", "tif"])
def test_mask_has_the_name_of_its_image_with_any_suffix(tmp_path: Path, table: PairedImageTable, suffix: str) -> None:
    mask = save(left_half(), tmp_path / f"fox.{suffix}")
    save(left_half(), tmp_path / "owl.png")
    (tmp_path / "fox.txt").write_text("no image")
    assert find(table, tmp_path, image_rows("fox.jpeg")) == ([mask], [])


def test_each_image_has_its_own_mask_in_any_order(tmp_path: Path, table: PairedImageTable) -> None:
    masks = {name: save(left_half(), tmp_path / f"{name}.png") for name in ("owl", "fox", "a.fox", "hen")}
    found, bad_files = find(table, tmp_path, image_rows("hen.jpg", "a.fox.jpg", "cow.jpg", "fox.jpg"))
    assert found == [masks["hen"], masks["a.fox"], None, masks["fox"]]
    assert [bad.path for bad in bad_files] == [IMAGE_FOLDER / "cow.jpg"]


def test_image_without_mask_is_bad_and_the_reason_suggests_a_fix(tmp_path: Path, table: PairedImageTable) -> None:
    bad = reason_of(table, tmp_path, "fox.png")
    assert bad.path == IMAGE_FOLDER / "fox.png"
    assert bad.reason == "has no mask: no file in mask_path has its name (a white image as mask trains on all pixels)"


def test_missing_control_image_is_reported_as_control_image(tmp_path: Path, readers: Readers) -> None:
    bad = reason_of(PairedImageTable(CONTROL, DirectoryIndexer(readers, FileIndex(None))), tmp_path, "fox.png")
    assert bad.reason == "has no control image: no file in control_path has its name"


def test_two_masks_of_one_image_are_both_reported(tmp_path: Path, table: PairedImageTable) -> None:
    masks = [save(left_half(), tmp_path / name) for name in ("fox.jpg", "fox.png")]
    assert reason_of(table, tmp_path, "fox.png").reason == f"has several masks: {masks[0]}, {masks[1]}; keep one"
    assert table.warnings() == []


def test_mask_with_another_aspect_ratio_is_reported_with_both_sizes(tmp_path: Path, table: PairedImageTable) -> None:
    mask = save(left_half(32, 48), tmp_path / "fox.png")
    bad = reason_of(table, tmp_path, "fox.jpg")
    assert bad.path == mask
    assert bad.reason == "is 32x48 pixels, but its image fox.jpg is 48x32: the aspect ratios differ"


def test_smaller_mask_of_the_same_aspect_ratio_fits(tmp_path: Path, table: PairedImageTable) -> None:
    mask = save(left_half(24, 16), tmp_path / "fox.png")
    assert find(table, tmp_path, image_rows("fox.jpg")) == ([mask], [])


def test_aspect_ratios_are_compared_after_exif_rotation(tmp_path: Path, table: PairedImageTable) -> None:
    mask = save_turned(left_half(48, 32), tmp_path / "fox.png", 6)
    with Image.open(mask) as stored:
        assert stored.size == (32, 48)
    assert find(table, tmp_path, image_rows("fox.jpg")) == ([mask], [])


def test_damaged_mask_is_reported(tmp_path: Path, table: PairedImageTable) -> None:
    mask = save(quarters(), tmp_path / "fox.png")
    mask.write_bytes(mask.read_bytes()[:40])
    assert reason_of(table, tmp_path, "fox.jpg").path == mask
    assert table.warnings() == [], "it belongs to an image"


def test_masks_of_images_in_subfolders_are_in_subfolders_of_the_same_name(tmp_path: Path, table: PairedImageTable) -> None:
    (tmp_path / "wood").mkdir()
    (tmp_path / "yard").mkdir()
    masks = [save(left_half(), tmp_path / name / "fox.png") for name in ("wood", "yard")]
    found, bad_files = find(table, tmp_path, image_rows("fox.jpg", "wood/fox.jpg", "yard/fox.webp"), recursive=True)
    assert found == [None, *masks]
    assert [bad.path for bad in bad_files] == [IMAGE_FOLDER / "fox.jpg"]


def test_masks_of_images_in_an_archive_are_in_a_folder_of_the_archive_s_name(
    tmp_path: Path, table: PairedImageTable
) -> None:
    (tmp_path / "zoo.tar").mkdir()
    mask = save(left_half(), tmp_path / "zoo.tar" / "fox.png")
    assert find(table, tmp_path, image_rows("zoo.tar/fox.jpg"), recursive=True) == ([mask], [])


def test_unused_masks_give_a_warning_after_all_directories_are_added(tmp_path: Path, table: PairedImageTable) -> None:
    for name in ("fox.png", "owl.png", "hen.png"):
        save(left_half(), tmp_path / name)
    (tmp_path / "notes.md").write_text("about masks")
    (tmp_path / "cow.png").write_bytes(b"nothing")
    find(table, tmp_path, image_rows("fox.jpg"))
    find(table, tmp_path, image_rows("owl.jpg"))
    assert table.warnings() == [f"{tmp_path}: 3 files are not the mask of any image: cow.png, hen.png, notes.md"]


def test_mask_folder_shared_by_several_directories_is_indexed_once(
    tmp_path: Path, table: PairedImageTable, monkeypatch: pytest.MonkeyPatch
) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    for folder in (one, two):
        folder.mkdir()
        save(left_half(), folder / "fox.png")
        save(left_half(), folder / "owl.png")
    indexed: list[Path] = []
    real_index = DirectoryIndexer.index

    def index(self: DirectoryIndexer, folder: Path, settings: IndexSettings) -> DirectoryIndex:
        indexed.append(folder)
        return real_index(self, folder, settings)

    monkeypatch.setattr(DirectoryIndexer, "index", index)
    rows = image_rows("owl.jpg", "fox.jpg")
    assert find(table, one, rows)[0] == [one / "owl.png", one / "fox.png"]
    assert find(table, two, rows)[0] == [two / "owl.png", two / "fox.png"]
    assert find(table, one, rows)[0] == [one / "owl.png", one / "fox.png"]
    assert indexed == [one, two]
    assert len(table.columns().paths) == len(table.columns().hashes) == 4
    assert [stored.start for stored in table.stored_hashes(table.columns().hashes)] == [0, 2]


@pytest.mark.parametrize("kind", [MASK, CONTROL])
def test_without_folders_there_are_no_paired_images(readers: Readers, kind: PairedImageKind) -> None:
    table = PairedImageTable(kind, DirectoryIndexer(readers, FileIndex(None)))
    assert len(table.columns().paths) == len(table.columns().hashes) == 0
    assert table.warnings() == []


# --- aspect ratios -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(4000, 2667), (1023, 517), (640, 480), (3, 2), (100, 37)])
@pytest.mark.parametrize("scale", [0.05, 0.25, 0.333, 0.5, 0.9, 1.0, 2.0])
def test_scaling_and_rounding_keep_the_aspect_ratio(size: tuple[int, int], scale: float) -> None:
    for whole_number in (round, int):
        scaled = [max(1, whole_number(side * scale)) for side in size]
        assert have_same_aspect_ratio(scaled, size)
        assert have_same_aspect_ratio(size, scaled)


@pytest.mark.parametrize(
    ("size", "other"),
    [((4000, 2667), (2667, 4000)), ((512, 512), (512, 520)), ((640, 427), (320, 240)), ((90, 60), (60, 60))],
)
def test_different_aspect_ratios_are_distinguished(size: Sequence[int], other: Sequence[int]) -> None:
    assert not have_same_aspect_ratio(size, other)
    assert not have_same_aspect_ratio(other, size)
