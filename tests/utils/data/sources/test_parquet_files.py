"""Listing .parquet files: rows, captions and errors."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from tests.tiny_model import make_tiny_dataset
from tests.utils.data.scanning import Scan
from utils.data.sources.archive_entries import NOT_INSIDE, ArchiveEntry
from utils.data.sources.decoding import BadFile
from utils.data.sources.parquet_files import list_parquet
from utils.data.sources.readers import Readers


def content_of(name: str) -> bytes:
    """Returns bytes that are no image and differ by name: listing must not read them."""
    return name.encode() * (1 + 7 * len(name))


def reasons(bad: Sequence[BadFile], path: Path) -> dict[str, str]:
    return {str(bad_file.path).removeprefix(f"{path}/"): bad_file.reason for bad_file in bad}


def write_table(path: Path, columns: Mapping[str, Any], **options: Any) -> Path:
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    parquet.write_table(pyarrow.table(dict(columns)), path, row_group_size=2, **options)
    return path


IMAGES = [{"bytes": content_of(str(row)), "path": f"{row}.png"} for row in range(5)]
TEXTS = ["zero", " one ", None, "", "four"]
CAPTIONS: list[list[str] | None] = [["zero"], ["one"], None, [""], ["four"]]


@pytest.mark.parametrize("form", ["struct", "only bytes", "plain"])
def test_every_row_is_an_image_with_its_caption(tmp_path: Path, form: str) -> None:
    forms: dict[str, list[Any]] = {
        "struct": IMAGES,
        "only bytes": [{"bytes": image["bytes"]} for image in IMAGES],
        "plain": [image["bytes"] for image in IMAGES],
    }
    path = write_table(tmp_path / "a.parquet", {"seed": range(5), "image": forms[form], "text": TEXTS})
    entries, column, bad = list_parquet(path, None, None)
    assert entries == [ArchiveEntry(str(row), row, 0, captions) for row, captions in enumerate(CAPTIONS)]
    assert column == "image" and bad == []


def test_configured_columns_or_the_first_usable_ones_are_read(tmp_path: Path) -> None:
    images = [b"x", b"y"]
    columns = {"path": ["p", "q"], "image": [1, 2], "bytes": images, "jpg": images, "prompt": ["a", "b"]}
    path = write_table(tmp_path / "a.parquet", {**columns, "caption": ["c", "d"], "mine": [["e", "f"], ["g"]]})
    entries, column, _ = list_parquet(path, None, None)
    assert (column, [entry.captions for entry in entries]) == ("jpg", [["c"], ["d"]])
    entries, column, _ = list_parquet(path, "bytes", "mine")
    assert (column, [entry.captions for entry in entries]) == ("bytes", [["e", "f"], ["g"]])
    entries, column, _ = list_parquet(path, "path", "prompt")
    assert (column, entries[1]) == ("path", ArchiveEntry("q", NOT_INSIDE, 0, ["b"]))
    entries, _, _ = list_parquet(write_table(tmp_path / "b.parquet", {"jpg": images}), None, None)
    assert [entry.captions for entry in entries] == [None, None]


def test_rows_with_bytes_and_with_paths_are_distinguished(tmp_path: Path) -> None:
    only_paths = [{"bytes": None, "path": path} for path in ("sub/1.png", "2.png")]
    images = [IMAGES[0], *only_paths, {"bytes": b"", "path": None}]
    for statistics in (True, False):
        path = write_table(tmp_path / "a.parquet", {"image": images}, write_statistics=statistics)
        entries, column, bad = list_parquet(path, None, None)
        assert [(entry.name, entry.start) for entry in entries] == [("0", 0), ("sub/1.png", -1), ("2.png", -1), ("3", 3)]
        assert column == "image" and not bad


def test_rows_without_a_usable_image_or_caption_are_reported(tmp_path: Path) -> None:
    images = [None, {"bytes": None, "path": None}, {"bytes": None, "path": "http://a/b.png"}, *IMAGES[:3]]
    texts = [["a"], ["b"], ["c"], [], ["d", None], ["e"]]
    for statistics in (True, False):
        path = write_table(tmp_path / "a.parquet", {"image": images, "text": texts}, write_statistics=statistics)
        entries, _, bad = list_parquet(path, None, None)
        assert entries == [ArchiveEntry("5", 5, 0, ["e"])]
        assert reasons(bad, path) == {
            "row 0": "has no image",
            "row 1": "has no image",
            "row 2": "has a URL, 'http://a/b.png': images are not downloaded",
            "row 3": "is an empty list: must be a string or a list of at least one",
            "row 4": "has null: must be a string or a list of strings",
        }
    entries, _, bad = list_parquet(write_table(tmp_path / "b.parquet", {"jpg": [b"x", None, b"y"]}), None, None)
    assert [entry.start for entry in entries] == [0, 2] and reasons(bad, tmp_path / "b.parquet") == {"row 1": "has no image"}


def test_wrong_columns_are_rejected_with_the_existing_ones(tmp_path: Path) -> None:
    path = write_table(tmp_path / "a.parquet", {"url": ["a"], "key": [1]})
    existing = "its columns are 'url' (string), 'key' (int64)"
    for image, caption, error in (
        (None, None, f"has no column of images; {existing}"),
        ("key", None, f"has no column 'key' with images or paths; {existing}"),
        ("url", "text", f"has no column 'text' with strings or lists of strings; {existing}"),
        ("url", "key", f"has no column 'key' with strings or lists of strings; {existing}"),
    ):
        with pytest.raises(BadFile) as caught:
            list_parquet(path, image, caption)
        assert caught.value.reason == error
    with pytest.raises(BadFile, match=r"'19' \(int64\) and 980 more$"):
        list_parquet(write_table(path, {str(number): [number] for number in range(1000)}), None, None)


def test_listing_a_table_does_not_read_image_bytes(tmp_path: Path) -> None:
    path = write_table(tmp_path / "a.parquet", {"image": IMAGES, "text": TEXTS}, compression="none")
    from pyarrow import parquet

    expected = list_parquet(path, None, None)
    content = bytearray(path.read_bytes())
    with parquet.ParquetFile(path) as table:
        chunks = [table.metadata.row_group(group).column(0) for group in range(table.num_row_groups)]
    for chunk in chunks:
        assert chunk.path_in_schema == "image.bytes"
        start = chunk.dictionary_page_offset or chunk.data_page_offset
        content[start : start + chunk.total_compressed_size] = b"\xff" * chunk.total_compressed_size
    path.write_bytes(content)
    assert list_parquet(path, None, None) == expected


def test_damaged_or_foreign_file_is_rejected(tmp_path: Path) -> None:
    path = write_table(tmp_path / "a.parquet", {"jpg": [b"x"] * 9, "text": ["a fox"] * 9})
    whole = path.read_bytes()
    damaged = whole[:4] + bytes(len(whole) // 2) + whole[4 + len(whole) // 2 :]
    for content in (whole[:-1], whole[: len(whole) // 2], b"a fox", b"PAR1" * 9, damaged):
        path.write_bytes(content)
        with pytest.raises(BadFile, match="cannot be read as a .parquet file: ") as caught:
            list_parquet(path, None, None)
        assert "\n" not in caught.value.reason
    path.write_bytes(b"")
    with pytest.raises(BadFile, match=r"is empty \(0 bytes\)"):
        list_parquet(path, None, None)


def test_missing_pyarrow_is_reported_with_the_install_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    (tmp_path / "a.parquet").write_bytes(json.dumps("any").encode())
    with pytest.raises(BadFile, match="requires pyarrow: pip install pyarrow"):
        list_parquet(tmp_path / "a.parquet", None, None)


def test_unreadable_and_irregular_files_are_rejected(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.parquet")
    reasons_of = {"none": "cannot be read: No such", "pipe.parquet": "is not a regular", ".": "is not a regular"}
    for name, reason in reasons_of.items():
        with pytest.raises(BadFile, match=reason):
            list_parquet(tmp_path / name, None, None)


# --- in a reader process -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("image_column", [None, "image"])
def test_reader_process_lists_the_same_entries(tmp_path: Path, readers: Readers, image_column: str | None) -> None:
    images = [*IMAGES, None, {"bytes": None, "path": "sub/ä.png"}]
    path = write_table(tmp_path / "a.parquet", {"image": images, "text": [*TEXTS, "five", "six"]})
    entries, column, bad = readers.parquet(path, image_column, None).result()
    expected = list_parquet(path, image_column, None)
    assert (entries, column) == expected[:2] and [entry.start for entry in entries] == [0, 1, 2, 3, 4, NOT_INSIDE]
    assert (
        [str(bad_file) for bad_file in bad] == [str(bad_file) for bad_file in expected[2]] == [f"{path}/row 5: has no image"]
    )


def test_errors_from_a_reader_process_use_the_user_s_path(
    tmp_path: Path, readers: Readers, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    write_table(Path("a.parquet"), {"jpg": [b"x", None]})
    with pytest.raises(BadFile, match="^a.parquet: has no column 'image' with images or paths; its columns are 'jpg'"):
        readers.parquet(Path("a.parquet"), "image", None).result()
    with pytest.raises(BadFile, match="^a.parquet: has no column 'word' with strings"):
        readers.parquet(Path("a.parquet"), None, "word").result()
    _, _, bad = readers.parquet(Path("a.parquet"), None, None).result()
    assert [str(bad_file) for bad_file in bad] == ["a.parquet/row 1: has no image"]


def test_damaged_footer_ends_only_a_reader_process(tmp_path: Path) -> None:
    """For about one bit in a hundred, pyarrow 26 throws an uncaught exception, which aborts its process."""
    whole = write_table(tmp_path / "whole.parquet", {"image": [b"x"] * 2, "text": ["a", "b"]}).read_bytes()
    start = len(whole) - 8 - int.from_bytes(whole[-8:-4], "little")
    num_rejected = 0
    with Readers(1) as pool:
        for position in range(start, len(whole), 4):
            damaged = bytearray(whole)
            damaged[position] ^= 0x10
            path = tmp_path / f"{position}.parquet"
            path.write_bytes(damaged)
            try:
                pool.parquet(path, None, None).result()
            except BadFile as bad:
                assert bad.path == path
                num_rejected += 1
    assert num_rejected


def pretend_pyarrow(folder: Path, patch: pytest.MonkeyPatch, opening: str) -> None:
    """Gives reader processes that start from now on a pyarrow that runs `opening` for each .parquet file."""
    package = folder / "site" / "pyarrow"
    package.mkdir(parents=True)
    (package / "__init__.py").touch()
    (package / "parquet.py").write_text(f"import os, time\n\ndef ParquetFile(path):\n    {opening}\n")
    patch.setenv("PYTHONPATH", str(folder / "site"))


def test_table_that_kills_its_reader_is_reported_and_the_rest_is_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pretend_pyarrow(tmp_path, monkeypatch, "os.abort()")
    folder = make_tiny_dataset(tmp_path / "images", 3)
    (folder / "a.parquet").write_bytes(b"any")
    with Readers(1) as pool:
        dataset = Scan(pool)(folder)
    assert len(dataset.examples) == 3
    assert [str(bad) for bad in dataset.bad_files] == [f"{folder}/a.parquet: the process that read it died (signal 6)"]


def test_listing_a_table_has_a_separate_timeout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_table(tmp_path / "a.parquet", {"jpg": [b"x"]})
    with Readers(1, limit_seconds=0.01) as pool:
        assert len(pool.parquet(path, None, None).result()[0]) == 1
    monkeypatch.setattr("utils.data.sources.readers.TABLE_SECONDS", 0.5)
    pretend_pyarrow(tmp_path, monkeypatch, "time.sleep(60)")
    with Readers(1) as pool, pytest.raises(BadFile, match="a.parquet: took longer than 0.5 s to read"):
        pool.parquet(path, None, None).result()
