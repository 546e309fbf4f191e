"""Listing .tar files: positions, captions and errors."""

from __future__ import annotations

import gzip
import io
import os
import shutil
import subprocess
import tarfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from utils.data.sources import tar_files
from utils.data.sources.decoding import BadFile
from utils.data.sources.tar_files import list_tar

LONG = f"{'a folder of a long name/' * 12}fox.png"
FORMATS = {"ustar": tarfile.USTAR_FORMAT, "gnu": tarfile.GNU_FORMAT, "pax": tarfile.PAX_FORMAT}


def content_of(name: str) -> bytes:
    """Returns bytes that are no image and differ by name: listing must not read them."""
    return name.encode() * (1 + 7 * len(name))


def write_tar(
    path: Path, members: Sequence[str] | Mapping[str, bytes], tar_format: int = tarfile.PAX_FORMAT, **changes: Any
) -> Path:
    with tarfile.open(path, "w:", format=tar_format) as tar:
        for name in members:
            info = tarfile.TarInfo(name)
            content = members[name] if isinstance(members, Mapping) else content_of(name)
            info.size = len(content)
            for key, value in changes.items():
                setattr(info, key, value)
            tar.addfile(info, io.BytesIO(content))
    return path


def captions_in(path: Path, *, caption_per_line: bool = False) -> dict[str, list[str] | None]:
    entries, bad, others = list_tar(path, caption_per_line=caption_per_line)
    assert not bad and not others
    return {image.name: image.captions for image in entries}


def reasons(bad: Sequence[BadFile], path: Path) -> dict[str, str]:
    return {str(bad_file.path).removeprefix(f"{path}/"): bad_file.reason for bad_file in bad}


@pytest.mark.parametrize("tar_format", FORMATS)
def test_entry_position_contains_the_member_s_bytes(tmp_path: Path, tar_format: str) -> None:
    names = ["fox.jpg", "./000/fox.PNG", "狐/ä.webp", "a.b/fox.jpg", f"{'x' * 90}/{'y' * 80}.gif", "empty.bmp"]
    names += [LONG] if tar_format != "ustar" else []
    members = {name: content_of(name) if name != "empty.bmp" else b"" for name in names}
    path = write_tar(tmp_path / "a.tar", members, FORMATS[tar_format])
    entries, bad, others = list_tar(path, caption_per_line=False)
    whole = path.read_bytes()
    assert {entry.name: whole[entry.start : entry.start + entry.length] for entry in entries} == members
    assert [entry.name for entry in entries] == names and not bad and not others


def test_captions_are_found_by_name_and_sample_anywhere_in_the_archive(tmp_path: Path) -> None:
    members = {
        "b.txt": b"\xef\xbb\xbf text \r\nof b\n",
        "a.png": b"",
        "b.seg.png": b"",
        "x/c.v2.jpg": b"",
        "x/c.v2.txt": b"of its name",
        "x/c.txt": b"of its sample",
        "d.jpg": b"",
        "d.json": b'{"caption": ["one", " two "]}',
        "a.TXT": "ä".encode(),
        "e.jpg": b"",
        "e.json": b'{"caption": null}',
        "f.jpg": b"",
        "f.json": b'[{"caption": "unused"}]',
        "g.jpg": b"",
        "g.json": b'{"key": 7, "tags": ["a", "b"]}',
        "h.jpg": b"",
        "h.txt": b"wins",
        "h.json": b"is not read {",
        "i.jpg": b"",
        "i.txt": b" ",
    }
    assert captions_in(write_tar(tmp_path / "a.tar", members)) == {
        "a.png": ["ä"],
        "b.seg.png": ["text \nof b"],
        "x/c.v2.jpg": ["of its name"],
        "d.jpg": ["one", "two"],
        "e.jpg": None,
        "f.jpg": None,
        "g.jpg": None,
        "h.jpg": ["wins"],
        "i.jpg": [""],
    }


def test_each_line_is_a_caption_with_caption_per_line(tmp_path: Path) -> None:
    members = {"a.jpg": b"", "a.txt": b"one\n\ntwo\n", "b.jpg": b"", "b.json": b'{"text": "x\\ny"}'}
    path = write_tar(tmp_path / "a.tar", members)
    assert captions_in(path, caption_per_line=True) == {"a.jpg": ["one", "two"], "b.jpg": ["x\ny"]}
    assert captions_in(path)["a.jpg"] == ["one\n\ntwo"]


def test_only_members_without_an_image_are_listed_as_unused(tmp_path: Path) -> None:
    names = ["a.jpg", "a.cls", "a.emb.npy", "b.txt", "c/a.cls", "README", ".hidden.jpg", "d/._a.jpg", "e.json"]
    entries, bad, others = list_tar(write_tar(tmp_path / "a.tar", names), caption_per_line=False)
    assert [entry.name for entry in entries] == ["a.jpg"] and not bad
    assert others == ["b.txt", "c/a.cls", "README", "e.json"]


def test_unusable_members_are_reported_with_the_reason(tmp_path: Path) -> None:
    members = {
        "a.jpg": b"",
        "a.seg.png": b"",
        "b.jpg": b"",
        "b.txt": b"caf\xe9",
        "c.jpg": b"",
        "c.json": b"{",
        "d.jpg": b"",
        "d.txt": bytes(2**20 + 1),
        "../e.jpg": b"",
        "../e.json": b'{"text": 7}',
        "/abs/f.png": b"",
        "/abs/f.txt": b"\xff",
    }
    path = write_tar(tmp_path / "a.tar", members)
    entries, bad, others = list_tar(path, caption_per_line=False)
    assert [entry.name for entry in entries] == ["a.jpg"] and not others
    assert reasons(bad, path) == {
        "a.seg.png": "shares its name up to the first dot with 'a.jpg': a sample can have only one image",
        "b.txt": "is not UTF-8: byte 3 is 0xe9",
        "c.json": "is not JSON: Expecting property name enclosed in double quotes (line 1, column 2)",
        "d.txt": "has 1048577 bytes; a caption file may have at most 1048576",
        "../e.json": "text is a number: must be a string or a list of strings",
        "abs/f.txt": "is not UTF-8: byte 0 is 0xff",
    }


def test_duplicate_member_counts_once(tmp_path: Path) -> None:
    path = tmp_path / "a.tar"
    with tarfile.open(path, "w:") as tar:
        for name in ("a.jpg", "a.txt", "a.jpg", "a.txt"):
            tar.addfile(tarfile.TarInfo(name))
    entries, bad, _ = list_tar(path, caption_per_line=False)
    assert len(entries) == 1 and [bad_file.path.name for bad_file in bad] == ["a.jpg", "a.txt"]


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        (tarfile.SYMTYPE, "is a link to 'other.jpg': the archive must contain the file itself"),
        (tarfile.LNKTYPE, "is a link to 'other.jpg': the archive must contain the file itself"),
        (tarfile.FIFOTYPE, "is not a file but a member of type b'6'"),
        (tarfile.GNUTYPE_SPARSE, "is stored as a sparse file, which cannot be read in place"),
    ],
)
def test_members_that_are_not_regular_files_are_rejected(tmp_path: Path, kind: bytes, reason: str) -> None:
    path = write_tar(tmp_path / "a.tar", {"a.jpg": b""}, type=kind, linkname="other.jpg")
    entries, bad, _ = list_tar(path, caption_per_line=False)
    assert entries == [] and reasons(bad, path) == {"a.jpg": reason}


@pytest.mark.skipif(shutil.which("tar") is None, reason="requires the program tar")
@pytest.mark.parametrize("version", ["gnu", *(f"pax --sparse-version={number}" for number in ("0.0", "0.1", "1.0"))])
def test_sparse_members_are_rejected_and_later_ones_are_found(tmp_path: Path, version: str) -> None:
    with (tmp_path / "a.jpg").open("wb") as file:
        for position in (0, 2**20, 2**22):
            file.seek(position)
            file.write(b"a fox")
        file.truncate(2**23)
    (tmp_path / "b.jpg").write_bytes(b"whole")
    path, form = tmp_path / "a.tar", version.split()
    subprocess.run(["tar", "--sparse", "--format", *form, "-cf", path, "-C", tmp_path, "a.jpg", "b.jpg"], check=True)
    entries, bad, _ = list_tar(path, caption_per_line=False)
    assert [path.read_bytes()[entry.start : entry.start + entry.length] for entry in entries] == [b"whole"]
    assert reasons(bad, path) == {"a.jpg": "is stored as a sparse file, which cannot be read in place"}


def test_folders_are_ignored(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "a.tar", {"folder.jpg": b"", "b": b""}, type=tarfile.DIRTYPE)
    assert list_tar(path, caption_per_line=False) == ([], [], [])


def test_truncated_tar_gives_the_images_before_the_cut(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "a.tar", {f"{index}/{LONG}": b"x" * 700 for index in range(4)}, tarfile.PAX_FORMAT)
    expected, whole = list_tar(path, caption_per_line=False)[0], path.read_bytes()
    end = max(entry.start + entry.length for entry in expected)
    for cut in [*range(512, end + 1200, 64), *(entry.start + entry.length for entry in expected)]:
        path.write_bytes(whole[:cut])
        entries, bad, _ = list_tar(path, caption_per_line=False)
        complete = [entry for entry in expected if entry.start + entry.length <= cut]
        assert entries == complete, cut
        has_end_marker = cut >= -(-end // 512) * 512 + 512
        assert [bad_file.reason for bad_file in bad] == (
            [] if has_end_marker else [f"is truncated after {len(complete)} images"]
        ), cut
        assert all(bad_file.path == path for bad_file in bad)


def test_damaged_header_is_reported(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "a.tar", ["a.jpg", "b.jpg", "c.jpg"], tarfile.USTAR_FORMAT)
    header_start = list_tar(path, caption_per_line=False)[0][1].start - 512
    damaged = bytearray(path.read_bytes())
    damaged[header_start + 3] ^= 1
    path.write_bytes(damaged)
    entries, bad, _ = list_tar(path, caption_per_line=False)
    assert [entry.name for entry in entries] == ["a.jpg"]
    assert [bad_file.reason for bad_file in bad] == [f"is damaged at byte {header_start} after 1 images"]


def test_data_after_the_end_marker_is_reported(tmp_path: Path) -> None:
    first, second = write_tar(tmp_path / "a.tar", ["a.jpg"]), write_tar(tmp_path / "b.tar", ["b.jpg"])
    end = list_tar(first, caption_per_line=False)[0][0].start + 512
    first.write_bytes(first.read_bytes() + second.read_bytes())
    entries, bad, _ = list_tar(first, caption_per_line=False)
    assert [entry.name for entry in entries] == ["a.jpg"]
    assert [bad_file.reason for bad_file in bad] == [
        f"has an end marker at byte {end} and more data after it, which is not read (joined by cat?), after 1 images"
    ]


def header_of(size: int, kind: bytes = tarfile.REGTYPE) -> bytes:
    info = tarfile.TarInfo("a.jpg")
    info.size, info.type = size, kind
    return info.tobuf(tarfile.GNU_FORMAT)


@pytest.mark.parametrize("kind", [tarfile.REGTYPE, tarfile.XHDTYPE, tarfile.GNUTYPE_LONGNAME])
@pytest.mark.parametrize("size", [-512, -1024, -(2**40), 2**40, 2**62])
def test_impossible_sizes_neither_hang_nor_exhaust_memory(tmp_path: Path, size: int, kind: bytes) -> None:
    path = tmp_path / "a.tar"
    path.write_bytes(header_of(0) + header_of(size, kind) + header_of(0) + bytes(1024))
    _, bad, _ = list_tar(path, caption_per_line=False)
    assert len(bad) >= 1 and all("\n" not in bad_file.reason for bad_file in bad)


def test_endless_extension_headers_are_rejected(tmp_path: Path) -> None:
    path = tmp_path / "a.tar"
    path.write_bytes(header_of(0) + header_of(0, tarfile.GNUTYPE_LONGNAME) * 20_000 + bytes(1024))
    _, bad, _ = list_tar(path, caption_per_line=False)
    assert [bad_file.reason for bad_file in bad] == ["is damaged at byte 512 after 1 images"]


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "is empty (0 bytes)"),
        (b"a fox", "is not a .tar file"),
        (b"a fox" * 1000, "is not a .tar file"),
        (gzip.compress(b"a fox" * 1000), "is compressed, so members cannot be read in place; decompress it"),
    ],
    ids=["empty", "short", "long", "gzip"],
)
def test_file_that_is_not_a_tar_archive_is_rejected(tmp_path: Path, content: bytes, reason: str) -> None:
    path = tmp_path / "a.tar"
    path.write_bytes(content)
    with pytest.raises(BadFile) as caught:
        list_tar(path, caption_per_line=False)
    assert (caught.value.path, caught.value.reason) == (path, reason)


@pytest.mark.parametrize("mode", ["w:gz", "w:bz2", "w:xz"])
def test_compressed_archives_are_rejected_whatever_their_name(tmp_path: Path, mode: str) -> None:
    with tarfile.open(tmp_path / "a.tar", mode) as tar:  # type: ignore[call-overload]
        tar.addfile(tarfile.TarInfo("a.jpg"))
    with pytest.raises(BadFile, match="is compressed"):
        list_tar(tmp_path / "a.tar", caption_per_line=False)


def test_unreadable_and_irregular_files_are_rejected(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.tar")
    for name, reason in (("none", "cannot be read: No such"), ("pipe.tar", "is not a regular"), (".", "is not a regular")):
        with pytest.raises(BadFile, match=reason):
            list_tar(tmp_path / name, caption_per_line=False)


def test_empty_archive_has_no_images(tmp_path: Path) -> None:
    assert list_tar(write_tar(tmp_path / "a.tar", []), caption_per_line=False) == ([], [], [])


def test_listing_reads_only_headers_and_captions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    num_samples, size = 1000, 50 * 2**20  # 50 GB in a sparse file
    path = tmp_path / "a.tar"
    with path.open("wb") as file:
        for index in range(num_samples):
            for name, content in ((f"{index}.jpg", None), (f"{index}.txt", b"a fox")):
                info = tarfile.TarInfo(name)
                info.size = size if content is None else len(content)
                file.write(info.tobuf(tarfile.USTAR_FORMAT))
                file.write(content or b"")
                file.seek(-(-(file.tell() + (size if content is None else 0)) // 512) * 512)
        file.truncate(file.tell() + 1024)
    num_read: list[int] = []
    monkeypatch.setattr(os, "pread", count_bytes(os.pread, num_read))
    monkeypatch.setattr(tar_files._HeaderFile, "read", count_bytes(tar_files._HeaderFile.read, num_read))
    entries, bad, _ = list_tar(path, caption_per_line=False)
    assert len(entries) == num_samples and not bad and entries[-1].captions == ["a fox"]
    assert 2 * num_samples * 512 <= sum(num_read) < 2 * num_samples * 600


def count_bytes(function: Any, counts: list[int]) -> Any:
    def counted(*arguments: Any) -> bytes:
        content = function(*arguments)
        counts.append(len(content))
        return content

    return counted
