"""Indexing a directory: captions from text files, tables and archives, bad files and warnings."""

from __future__ import annotations

import csv
import io
import json
import os
import tarfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pytest
from pyarrow import parquet

from tests.tiny_model import make_tiny_dataset, write_image
from tests.utils.data.image_makers import noise, quarters, save
from tests.utils.data.scanning import Scan, names
from utils.data.dataset import Dataset
from utils.data.sources.decoding import read_pixels
from utils.data.sources.image_files import ImageFile


def write_captioned_image(folder: Path, name: str, caption: str | None = None) -> Path:
    """Writes an image, and a text file if a caption is given."""
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    save(quarters(), path)
    if caption is not None:
        path.with_suffix(".txt").write_text(caption)
    return path


def captions_by_name(dataset: Dataset) -> dict[str, tuple[str, ...]]:
    return dict(zip(names(dataset), (example.captions for example in dataset.examples), strict=True))


def bad_names_and_reasons(dataset: Dataset) -> list[tuple[str, str]]:
    """Returns (name, reason) of each bad file."""
    return [(bad.path.name, bad.reason) for bad in dataset.bad_files]


# --- text files --------------------------------------------------------------------------------------------------------


def test_image_without_a_caption_file_is_bad_and_the_reason_names_the_missing_file(
    scan_folders: Scan, tmp_path: Path
) -> None:
    path = write_image(tmp_path, 0)
    path.with_suffix(".txt").unlink()
    (bad_file,) = scan_folders(tmp_path).bad_files
    assert bad_file.path == path
    assert bad_file.reason == "has no caption: image_000.txt is missing (an empty file is an empty caption)"


def test_an_empty_file_is_an_empty_caption(scan_folders: Scan, tmp_path: Path) -> None:
    write_captioned_image(tmp_path, "fox.png", "")
    assert captions_by_name(scan_folders(tmp_path)) == {"fox.png": ("",)}


def test_caption_in_another_encoding_is_reported_with_its_first_bad_byte(scan_folders: Scan, tmp_path: Path) -> None:
    path = write_image(tmp_path, 0)
    path.with_suffix(".txt").write_bytes("ein Füchslein".encode("latin-1"))
    (bad_file,) = scan_folders(tmp_path).bad_files
    assert bad_file.path == path.with_suffix(".txt")
    assert bad_file.reason == "is not UTF-8: byte 5 is 0xfc"


def test_folder_with_the_name_of_a_caption_file_is_not_a_caption(scan_folders: Scan, tmp_path: Path) -> None:
    path = write_image(tmp_path, 0).with_suffix(".txt")
    path.unlink()
    path.mkdir()
    dataset = scan_folders(tmp_path)
    assert [name for name, _ in bad_names_and_reasons(dataset)] == ["image_000.png"]
    assert any("subfolders are skipped" in text and "image_000.txt" in text for text in dataset.warnings)


@pytest.mark.skipif(os.geteuid() == 0, reason="root can read everything")
def test_unreadable_caption_is_reported(scan_folders: Scan, tmp_path: Path) -> None:
    write_image(tmp_path, 0).with_suffix(".txt").chmod(0)
    assert bad_names_and_reasons(scan_folders(tmp_path)) == [("image_000.txt", "cannot be read: Permission denied")]


def test_captions_in_subfolders_belong_to_the_images_beside_them(scan_folders: Scan, tmp_path: Path) -> None:
    write_captioned_image(tmp_path, "fox.png", "outside")
    write_captioned_image(tmp_path, "a/fox.png", "inside")
    assert captions_by_name(scan_folders(tmp_path, recursive=True)) == {"a/fox.png": ("inside",), "fox.png": ("outside",)}


# --- warnings ------------------------------------------------------------------------------------------------------


def test_skipped_subfolders_give_a_warning(scan_folders: Scan, tmp_path: Path) -> None:
    make_tiny_dataset(tmp_path, 1)
    make_tiny_dataset(tmp_path / "more", 1)
    (warning,) = scan_folders(tmp_path).warnings
    assert warning == f"{tmp_path}: subfolders are skipped (set recursive = true to include them): more"


def test_unused_files_give_a_warning(scan_folders: Scan, tmp_path: Path) -> None:
    make_tiny_dataset(tmp_path, 1)
    (tmp_path / "image_009.txt").write_text("a caption whose image is gone")
    (tmp_path / "notes.md").write_text("")
    (tmp_path / ".hidden").write_text("")
    assert scan_folders(tmp_path).warnings == [
        f"{tmp_path}: 1 caption files belong to no image: image_009.txt",
        f"{tmp_path}: 1 files are neither images nor captions: notes.md",
    ]


def test_two_images_sharing_a_caption_file_give_a_warning(scan_folders: Scan, tmp_path: Path) -> None:
    path = write_image(tmp_path, 0)
    save(quarters(), path.with_suffix(".jpg"))
    dataset = scan_folders(tmp_path)
    assert len(dataset.examples) == 2
    assert any("share one caption file: image_000.txt" in text for text in dataset.warnings)


def test_suffixes_in_capitals_are_images(scan_folders: Scan, tmp_path: Path) -> None:
    path = write_image(tmp_path, 0)
    path.rename(tmp_path / "image_000.PNG")
    assert len(scan_folders(tmp_path).examples) == 1


def test_long_list_of_names_is_shortened_with_a_count(scan_folders: Scan, tmp_path: Path) -> None:
    for index in range(9):
        (tmp_path / f"{index}.md").write_text("")
    assert scan_folders(tmp_path).warnings[0].endswith("0.md, 1.md, 2.md, 3.md, 4.md and 4 more")


# --- tables ------------------------------------------------------------------------------------------------------------


def write_table(path: Path, table: Mapping[str, str]) -> None:
    """Writes a caption table in the format given by the file's suffix."""
    rows = [{"file_name": name, "text": caption} for name, caption in table.items()]
    if path.suffix == ".json":
        path.write_text(json.dumps(table))
    elif path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    else:
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, ["file_name", "text"])
            writer.writeheader()
            writer.writerows(rows)


TABLES = ["captions.json", "metadata.jsonl", "metadata.csv"]


@pytest.mark.parametrize("table", TABLES)
def test_caption_table_in_the_folder_is_read(scan_folders: Scan, tmp_path: Path, table: str) -> None:
    write_captioned_image(tmp_path, "fox.png")
    write_captioned_image(tmp_path, "owl.jpg")
    write_table(tmp_path / table, {"fox.png": "a fox", "owl.jpg": "an owl"})
    dataset = scan_folders(tmp_path)
    assert captions_by_name(dataset) == {"fox.png": ("a fox",), "owl.jpg": ("an owl",)}
    assert (dataset.bad_files, dataset.warnings) == ([], [])


@pytest.mark.parametrize("table", TABLES)
@pytest.mark.parametrize("recursive", [False, True])
def test_caption_table_may_name_images_in_subfolders(
    scan_folders: Scan, tmp_path: Path, table: str, recursive: bool
) -> None:
    """As in Hugging Face imagefolder: they are used whether or not subfolders are scanned."""
    write_captioned_image(tmp_path, "a/fox.png")
    write_captioned_image(tmp_path, "b/c/owl.png")
    write_table(tmp_path / table, {"a/fox.png": "a fox", "b/c/owl.png": "an owl", "b/gone.png": "nothing"})
    dataset = scan_folders(tmp_path, recursive=recursive)
    assert captions_by_name(dataset) == {"a/fox.png": ("a fox",), "b/c/owl.png": ("an owl",)}
    assert f"{tmp_path}: 1 entries of caption tables match no image: b/gone.png" in dataset.warnings


@pytest.mark.parametrize("table", TABLES)
def test_caption_table_in_a_subfolder_names_images_beside_it(scan_folders: Scan, tmp_path: Path, table: str) -> None:
    for name in ("fox.png", "a/fox.png", "b/fox.png"):
        write_captioned_image(tmp_path, name)
        write_table((tmp_path / name).with_name(table), {"fox.png": f"of {name}"})
    dataset = scan_folders(tmp_path, recursive=True)
    assert captions_by_name(dataset) == {name: (f"of {name}",) for name in ("a/fox.png", "b/fox.png", "fox.png")}


def test_caption_table_may_name_images_without_suffix(scan_folders: Scan, tmp_path: Path) -> None:
    """As sd-scripts does."""
    write_captioned_image(tmp_path, "fox.png")
    write_table(tmp_path / "captions.json", {"fox": "a fox"})
    dataset = scan_folders(tmp_path)
    assert (captions_by_name(dataset), dataset.warnings) == ({"fox.png": ("a fox",)}, [])


@pytest.mark.parametrize("form", ["./{}", "a/../{}", "{folder}/{}"])
def test_names_in_a_caption_table_are_normalized(
    scan_folders: Scan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, form: str
) -> None:
    write_captioned_image(tmp_path, "fox.png")
    write_captioned_image(tmp_path, "a/owl.png")
    table = {"fox.png": "a fox", "a/owl.png": "an owl"}
    write_table(tmp_path / "captions.json", {form.format(name, folder=tmp_path): table[name] for name in table})
    monkeypatch.chdir(tmp_path.parent)
    for folder in (tmp_path, Path(tmp_path.name)):
        dataset = scan_folders(folder, recursive=True)
        assert captions_by_name(dataset) == {"a/owl.png": ("an owl",), "fox.png": ("a fox",)}
        assert (dataset.bad_files, dataset.warnings) == ([], [])


def test_text_file_takes_precedence_over_a_caption_table(scan_folders: Scan, tmp_path: Path) -> None:
    write_captioned_image(tmp_path, "fox.png", "of the text file")
    write_captioned_image(tmp_path, "owl.png")
    write_table(tmp_path / "captions.json", {"fox.png": "of the table", "owl.png": "an owl"})
    assert captions_by_name(scan_folders(tmp_path)) == {"fox.png": ("of the text file",), "owl.png": ("an owl",)}


def test_several_captions_of_an_image_in_a_table_are_kept(scan_folders: Scan, tmp_path: Path) -> None:
    write_captioned_image(tmp_path, "fox.png")
    (tmp_path / "captions.json").write_text(json.dumps({"fox.png": ["a fox", "an animal"]}))
    assert captions_by_name(scan_folders(tmp_path)) == {"fox.png": ("a fox", "an animal")}


def test_image_missing_from_every_table_is_bad_and_the_reason_names_the_table(scan_folders: Scan, tmp_path: Path) -> None:
    write_captioned_image(tmp_path, "fox.png")
    write_table(tmp_path / "captions.json", {})
    ((name, reason),) = bad_names_and_reasons(scan_folders(tmp_path))
    assert name == "fox.png"
    assert reason.startswith("has no caption: fox.txt is missing")
    assert reason.endswith(", and captions.json has no entry for it")


def test_unreadable_table_is_reported_before_the_images_without_captions(scan_folders: Scan, tmp_path: Path) -> None:
    write_captioned_image(tmp_path, "fox.png")
    write_captioned_image(tmp_path, "owl.png", "an owl")
    (tmp_path / "captions.json").write_text('{"fox.png": ')
    dataset = scan_folders(tmp_path)
    assert captions_by_name(dataset) == {"owl.png": ("an owl",)}
    (name, reason), (image_name, image_reason) = bad_names_and_reasons(dataset)
    assert (name, image_name) == ("captions.json", "fox.png"), "the table is reported first"
    assert "is not JSON" in reason
    assert image_reason.endswith(", and captions.json cannot be read")


@pytest.mark.parametrize("name", ["a\0b.png", "a/\0/b.png", "\ud800.png", "f" * 300 + ".png", "/dev/null/x.png"])
def test_impossible_file_name_in_a_table_matches_no_image(scan_folders: Scan, tmp_path: Path, name: str) -> None:
    write_captioned_image(tmp_path, "fox.png")
    (tmp_path / "captions.json").write_text(json.dumps({"fox.png": "a fox", name: "nothing"}))
    dataset = scan_folders(tmp_path)
    assert captions_by_name(dataset) == {"fox.png": ("a fox",)}
    assert dataset.bad_files == []
    assert len(dataset.warnings) == 1 and "1 entries of caption tables match no image" in dataset.warnings[0]


# --- archives ----------------------------------------------------------------------------------------------------------


def png(seed: int) -> bytes:
    buffer = io.BytesIO()
    noise(40 + seed, 40).save(buffer, "PNG")
    return buffer.getvalue()


def write_tar(path: Path, members: Mapping[str, bytes]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, content in members.items():
            header = tarfile.TarInfo(name)
            header.size = len(content)
            tar.addfile(header, io.BytesIO(content))
    return path


def write_parquet(path: Path, columns: Mapping[str, Sequence[Any]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    parquet.write_table(pyarrow.table(dict(columns)), path)
    return path


def assert_pixels_equal(dataset: Dataset, contents: Sequence[bytes], folder: Path) -> None:
    """Compares the pixels of each example with those of the same bytes in a separate file."""
    for example, content in zip(dataset.examples, contents, strict=True):
        alone = folder / "alone.png"
        alone.write_bytes(content)
        expected = read_pixels(ImageFile(alone), example.box)
        assert np.array_equal(read_pixels(example.image, example.box), expected)


SAMPLES = {
    "000/fox.png": png(0),
    "000/fox.txt": b"a fox",
    "000/owl.png": png(1),
    "000/owl.json": b'{"caption": "an owl"}',
}


@pytest.mark.parametrize("alone", [False, True])
def test_images_in_a_tar_file_become_examples(scan_folders: Scan, tmp_path: Path, alone: bool) -> None:
    path = write_tar(tmp_path / "data" / "part.tar", SAMPLES)
    dataset = scan_folders(path if alone else path.parent)
    prefix = "" if alone else "part.tar/"
    assert captions_by_name(dataset) == {f"{prefix}000/fox.png": ("a fox",), f"{prefix}000/owl.png": ("an owl",)}
    assert (dataset.bad_files, dataset.warnings) == ([], [])
    assert str(dataset.examples[0].image) == f"{path}/000/fox.png"
    assert_pixels_equal(dataset, [SAMPLES["000/fox.png"], SAMPLES["000/owl.png"]], tmp_path)


@pytest.mark.parametrize("alone", [False, True])
def test_images_in_a_parquet_file_become_examples(scan_folders: Scan, tmp_path: Path, alone: bool) -> None:
    contents = [png(seed) for seed in range(3)]
    path = write_parquet(tmp_path / "data" / "x.parquet", {"image": contents, "text": ["a", "b", "c"]})
    dataset = scan_folders(path if alone else path.parent)
    prefix = "" if alone else "x.parquet/"
    assert captions_by_name(dataset) == {f"{prefix}{row}": (caption,) for row, caption in enumerate("abc")}
    assert_pixels_equal(dataset, contents, tmp_path)


def test_configured_columns_of_a_parquet_file_are_used(scan_folders: Scan, tmp_path: Path) -> None:
    columns: dict[str, Any] = {"image": [png(0)], "text": ["no"], "photo": [png(1)], "words": ["yes"]}
    path = write_parquet(tmp_path / "x.parquet", columns)
    directory = [{"path": path, "image_column": "photo", "caption_column": "words"}]
    dataset = scan_folders(directory=directory)
    assert captions_by_name(dataset) == {"0": ("yes",)}
    assert_pixels_equal(dataset, [png(1)], tmp_path)
    directory[0]["caption_column"] = "word"
    ((name, reason),) = bad_names_and_reasons(scan_folders(directory=directory))
    assert name == "x.parquet" and "has no column 'word'" in reason


def test_parquet_file_with_paths_is_a_caption_table(scan_folders: Scan, tmp_path: Path) -> None:
    write_captioned_image(tmp_path, "a/fox.png")
    write_captioned_image(tmp_path, "owl.png", "of the text file")
    write_parquet(tmp_path / "list.parquet", {"image_path": ["a/fox.png", "owl.png"], "text": ["a fox", "an owl"]})
    dataset = scan_folders(tmp_path)
    assert captions_by_name(dataset) == {"a/fox.png": ("a fox",), "owl.png": ("of the text file",)}
    assert dataset.bad_files == []


def test_archives_and_image_files_form_one_dataset(scan_folders: Scan, tmp_path: Path) -> None:
    write_captioned_image(tmp_path, "fox.png", "a fox")
    write_tar(tmp_path / "a" / "part.tar", SAMPLES)
    write_parquet(tmp_path / "b" / "x.parquet", {"image": [png(0)], "text": ["first"]})
    dataset = scan_folders(tmp_path, recursive=True)
    assert names(dataset) == ["a/part.tar/000/fox.png", "a/part.tar/000/owl.png", "b/x.parquet/0", "fox.png"]
    assert dataset.examples[3].image == ImageFile(tmp_path / "fox.png")
    assert dataset.bad_files == []


def test_parquet_logs_of_img2dataset_are_ignored(scan_folders: Scan, tmp_path: Path) -> None:
    write_tar(tmp_path / "00000.tar", SAMPLES)
    write_parquet(tmp_path / "00000.parquet", {"url": ["http://nowhere"], "status": ["success"]})
    dataset = scan_folders(tmp_path)
    assert (len(dataset.examples), dataset.bad_files) == (2, [])


def test_bad_archive_members_are_reported_and_the_others_are_used(scan_folders: Scan, tmp_path: Path) -> None:
    path = write_tar(tmp_path / "x.tar", {**SAMPLES, "a.png": png(2), "b.png": png(3)[:60], "b.txt": b"", "c.md": b""})
    dataset = scan_folders(tmp_path)
    assert names(dataset) == ["x.tar/000/fox.png", "x.tar/000/owl.png"]
    reasons = {str(bad.path): bad.reason for bad in dataset.bad_files}
    assert reasons.keys() == {f"{path}/a.png", f"{path}/b.png"}
    assert reasons[f"{path}/a.png"] == "has no caption in the archive"
    assert f"{path}: 1 members are neither images nor captions" in dataset.warnings


def test_bad_archive_is_reported_and_the_others_are_used(scan_folders: Scan, tmp_path: Path) -> None:
    write_tar(tmp_path / "good.tar", SAMPLES)
    (tmp_path / "bad.tar").write_bytes(b"nothing of the kind" * 100)
    (tmp_path / "bad.parquet").write_bytes(b"nor this")
    dataset = scan_folders(tmp_path)
    assert len(dataset.examples) == 2
    assert [name for name, _ in bad_names_and_reasons(dataset)] == ["bad.tar"], (
        "a .parquet file beside a .tar file of the same name is ignored"
    )
    (tmp_path / "bad.parquet").rename(tmp_path / "worse.parquet")
    assert sorted(name for name, _ in bad_names_and_reasons(scan_folders(tmp_path))) == ["bad.tar", "worse.parquet"]
