"""Reading an image's bytes from files and archives; missing bytes raise OSError."""

from __future__ import annotations

import io
import os
import tarfile
from pathlib import Path
from typing import Any

import pytest

from utils.data.sources import image_files as image_files
from utils.data.sources.image_files import ImageFile

CONTENTS = [bytes([number]) * (1000 + number) for number in range(10)]


def make_tar(path: Path) -> list[ImageFile]:
    with tarfile.open(path, "w") as archive:
        for number, content in enumerate(CONTENTS):
            member = tarfile.TarInfo(f"{number}.png")
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    with tarfile.open(path) as archive:
        return [ImageFile(path, member.name, member.offset_data, member.size) for member in archive]


def make_table(path: Path, *, in_struct: bool, contents: list[bytes] = CONTENTS) -> list[ImageFile]:
    """Writes a .parquet file with row groups of four rows."""
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    values: list[Any] = [{"bytes": content, "path": None} for content in contents] if in_struct else contents
    parquet.write_table(pyarrow.table({"text": ["a"] * len(values), "image": values}), path, row_group_size=4)
    return [ImageFile(path, "image", row) for row in range(len(values))]


def make_files(folder: Path) -> list[ImageFile]:
    for number, content in enumerate(CONTENTS):
        (folder / f"{number}.png").write_bytes(content)
    return [ImageFile(folder / f"{number}.png") for number in range(len(CONTENTS))]


def make(folder: Path, kind: str) -> list[ImageFile]:
    if kind == "files":
        return make_files(folder)
    if kind == "tar":
        return make_tar(folder / "shard.tar")
    return make_table(folder / "part.parquet", in_struct=kind == "struct")


@pytest.mark.parametrize("kind", ["files", "tar", "column", "struct"])
def test_image_bytes_are_the_same_in_every_kind_of_container(tmp_path: Path, kind: str) -> None:
    files = make(tmp_path, kind)
    assert [file.read() for file in files] == CONTENTS
    for file, content in zip(reversed(files), reversed(CONTENTS), strict=True):
        with file.open() as opened:
            assert opened.seek(0, os.SEEK_END) == len(content)
            opened.seek(1)
            assert opened.read() == content[1:]


def test_string_form_locates_the_image() -> None:
    assert str(ImageFile(Path("a/fox.jpg"))) == "a/fox.jpg"
    assert str(ImageFile(Path("a/shard.tar"), "in/fox.jpg", 512, 9)) == "a/shard.tar/in/fox.jpg"
    assert str(ImageFile(Path("a/part.parquet"), "image", 17)) == "a/part.parquet/row 17"


@pytest.mark.parametrize("kind", ["files", "tar", "column", "struct"])
def test_deleted_file_raises_file_not_found(tmp_path: Path, kind: str) -> None:
    """Also for a table of which another row has just been read."""
    first, second, *_ = make(tmp_path, kind)
    first.read()
    second.path.unlink()
    with pytest.raises(FileNotFoundError):
        second.read()
    with pytest.raises(FileNotFoundError):
        second.open()


@pytest.mark.parametrize("kind", ["column", "struct"])
def test_damaged_table_raises_oserror(tmp_path: Path, kind: str) -> None:
    first, second, *_ = make(tmp_path, kind)
    first.read()
    second.path.write_bytes(second.path.read_bytes()[:-100])
    with pytest.raises(OSError, match="row 1 of part.parquet: ") as caught:
        second.read()
    assert caught.value.strerror
    assert "\n" not in caught.value.strerror


def test_member_of_a_truncated_archive_is_never_returned_truncated(tmp_path: Path) -> None:
    file = make_tar(tmp_path / "shard.tar")[3]
    os.truncate(file.path, file.start + 10)
    with pytest.raises(OSError, match="shard.tar is truncated: 10 of 1003 bytes exist"):
        file.read()
    os.truncate(file.path, 5)
    with pytest.raises(OSError, match="0 of 1003 bytes exist"):
        file.read()


def test_impossible_length_is_not_allocated(tmp_path: Path) -> None:
    file = make_tar(tmp_path / "shard.tar")[0]
    with pytest.raises(OSError, match="is truncated"):
        ImageFile(file.path, file.member, file.start, 2**60).read()


@pytest.mark.parametrize(("column", "row", "reason"), [("image", 99, "row 99"), ("none", 0, "none"), ("text", 0, "bytes")])
def test_missing_row_or_column_raises_oserror(tmp_path: Path, column: str, row: int, reason: str) -> None:
    path = make_table(tmp_path / "part.parquet", in_struct=True)[0].path
    with pytest.raises(OSError, match=reason):
        ImageFile(path, column, row).read()


def test_empty_cell_raises_oserror(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    path = tmp_path / "part.parquet"
    table = pyarrow.table({"column": [b"content", None], "struct": [{"bytes": b"content"}, None]})
    parquet.write_table(table, path)
    for column in ("column", "struct"):
        assert ImageFile(path, column, 0).read() == b"content"
        with pytest.raises(OSError, match=f"row 1 of part.parquet has no bytes in column {column}"):
            ImageFile(path, column, 1).read()


def test_rows_in_order_read_each_row_group_once(tmp_path: Path) -> None:
    files = make_table(tmp_path / "part.parquet", in_struct=True)
    image_files._row_group.cache_clear()
    for file in files:
        file.read()
    assert image_files._row_group.cache_info().misses == 3


def test_replaced_table_is_read_again(tmp_path: Path) -> None:
    file = make_table(tmp_path / "part.parquet", in_struct=False)[0]
    assert file.read() == CONTENTS[0]
    other = make_table(tmp_path / "other.parquet", in_struct=False, contents=CONTENTS[::-1])[0]
    other.path.replace(file.path)
    assert file.read() == CONTENTS[-1]


def test_opening_a_pipe_does_not_block(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.png")
    for name in ("pipe.png", "."):
        with pytest.raises(OSError, match="Not a regular file|Is a directory"):
            ImageFile(tmp_path / name).open()
        with pytest.raises(OSError, match="Not a regular file|Is a directory"):
            ImageFile(tmp_path / name, "member", 0, 10).read()
