"""Scanning a folder: files by kind, links and unreadable folders."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest

from utils.data.sources.directory_scan import merge_files, scan_directory, stat_files
from utils.files.file_index import stamp_of


def touch(folder: Path, *names: str) -> Path:
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(name)
    return folder


def test_files_are_classified_by_their_names(tmp_path: Path) -> None:
    touch(tmp_path, "a.png", "b.JPG", "a.txt", "c.tar", "d.parquet", "captions.json", "metadata.jsonl", "notes.md", "e.tgz")
    scan = scan_directory(tmp_path, recursive=False)
    assert scan.images.names == ["a.png", "b.JPG"]
    assert scan.texts.names == ["a.txt"]
    assert scan.archives == ["c.tar", "d.parquet", "e.tgz"]
    assert scan.tables == ["captions.json", "metadata.jsonl"]
    assert scan.others == ["notes.md"]


@pytest.mark.parametrize("recursive", [False, True])
def test_hidden_files_and_folders_are_ignored(tmp_path: Path, recursive: bool) -> None:
    touch(tmp_path, ".a.png", ".hidden/b.png", ".notes", "c.png")
    scan = scan_directory(tmp_path, recursive=recursive)
    assert (scan.images.names, scan.folders, scan.others, scan.bad_files) == (["c.png"], [], [], [])


def test_subfolders_are_listed_but_not_scanned_without_recursive(tmp_path: Path) -> None:
    touch(tmp_path, "a.png", "more/b.png", "also/c.png")
    scan = scan_directory(tmp_path, recursive=False)
    assert (scan.images.names, scan.folders) == (["a.png"], ["also", "more"])


def test_recursive_scan_returns_sorted_names_with_slashes(tmp_path: Path) -> None:
    touch(tmp_path, "b/z.png", "b/c/a.png", "a.png", "b/z.txt", "b/captions.json", "b/c/x.tar")
    scan = scan_directory(tmp_path, recursive=True)
    assert scan.images.names == ["a.png", "b/c/a.png", "b/z.png"]
    assert (scan.texts.names, scan.tables, scan.archives) == (["b/z.txt"], ["b/captions.json"], ["b/c/x.tar"])
    assert scan.folders == []


def test_order_does_not_depend_on_the_file_system(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    touch(tmp_path, *(f"{letter}/{number}.png" for letter in "cab" for number in range(3)), "z.md", "y.md", "x.tar", "w.tar")
    for link in ("0", "a2", "z"):
        (tmp_path / link).symlink_to(tmp_path / "a")
        (tmp_path / f"{link}.png").symlink_to("nothing")
    expected, real = scan_directory(tmp_path, recursive=True), os.scandir
    monkeypatch.setattr(os, "scandir", lambda path: list(real(path))[::-1])
    scan = scan_directory(tmp_path, recursive=True)
    assert scan.images.names == expected.images.names == sorted(expected.images.names)
    assert np.array_equal(scan.images.stamps, expected.images.stamps)
    assert np.array_equal(scan.images.file_ids, expected.images.file_ids)
    assert (scan.others, scan.archives) == (expected.others, expected.archives)
    reports = [[str(bad) for bad in result.bad_files] for result in (scan, expected)]
    assert reports[0] == reports[1]
    assert len(reports[0]) == 2 * 3


@pytest.mark.parametrize("recursive", [False, True])
def test_excluded_folder_is_neither_scanned_nor_listed(tmp_path: Path, recursive: bool) -> None:
    touch(tmp_path, "a.png", "masks/a.png", "more/b.png")
    scan = scan_directory(tmp_path, recursive=recursive, excluded=[tmp_path / "masks", tmp_path / "none"])
    assert scan.images.names == (["a.png", "more/b.png"] if recursive else ["a.png"])
    assert scan.folders == ([] if recursive else ["more"])


def test_link_to_an_excluded_folder_is_excluded_and_not_bad(tmp_path: Path) -> None:
    touch(tmp_path, "images/a.png", "masks/a.png")
    (tmp_path / "images" / "masks").symlink_to(tmp_path / "masks")
    scan = scan_directory(tmp_path / "images", recursive=True, excluded=[tmp_path / "images" / "masks"])
    assert (scan.images.names, scan.bad_files) == (["a.png"], [])


def test_folder_reachable_without_a_link_keeps_its_own_name(tmp_path: Path) -> None:
    touch(tmp_path, "b/deep/x.png")
    (tmp_path / "a").symlink_to(tmp_path / "b" / "deep")
    scan = scan_directory(tmp_path, recursive=True)
    assert scan.images.names == ["b/deep/x.png"]
    assert [bad.path.name for bad in scan.bad_files] == ["a"]


def test_circular_link_is_reported_and_not_followed(tmp_path: Path) -> None:
    touch(tmp_path, "sub/a.png")
    (tmp_path / "sub" / "up").symlink_to(tmp_path)
    scan = scan_directory(tmp_path, recursive=True)
    assert scan.images.names == ["sub/a.png"]
    (bad,) = scan.bad_files
    assert bad.path == tmp_path / "sub" / "up"
    assert bad.reason == "is a link to a folder that is already included"


@pytest.mark.parametrize("backwards", [False, True])
def test_first_of_several_links_to_a_folder_is_followed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, backwards: bool
) -> None:
    touch(tmp_path, "elsewhere/x.png", "here/a.png")
    for link in ("second", "first", "third"):
        (tmp_path / "here" / link).symlink_to(tmp_path / "elsewhere")
    real = os.scandir
    monkeypatch.setattr(os, "scandir", lambda path: sorted(real(path), key=lambda entry: entry.name, reverse=backwards))
    scan = scan_directory(tmp_path / "here", recursive=True)
    assert scan.images.names == ["a.png", "first/x.png"]
    assert [bad.path.name for bad in scan.bad_files] == ["second", "third"]


def test_linked_folder_outside_is_scanned(tmp_path: Path) -> None:
    touch(tmp_path, "elsewhere/b.png", "here/a.png")
    (tmp_path / "here" / "link").symlink_to(tmp_path / "elsewhere")
    scan = scan_directory(tmp_path / "here", recursive=True)
    assert (scan.images.names, scan.bad_files) == (["a.png", "link/b.png"], [])


@pytest.mark.parametrize("name", ["gone.png", "notes"])
def test_broken_link_is_reported(tmp_path: Path, name: str) -> None:
    (tmp_path / name).symlink_to(tmp_path / "nothing")
    (bad,) = scan_directory(tmp_path, recursive=False).bad_files
    assert (bad.path, bad.reason) == (tmp_path / name, "is a broken link: No such file or directory")


def test_link_to_itself_is_reported(tmp_path: Path) -> None:
    (tmp_path / "round.png").symlink_to(tmp_path / "round.png")
    (bad,) = scan_directory(tmp_path, recursive=False).bad_files
    assert bad.path == tmp_path / "round.png"
    assert bad.reason.startswith("is a broken link: ")


@pytest.mark.skipif(os.geteuid() == 0, reason="root can read everything")
def test_unreadable_folder_is_reported(tmp_path: Path) -> None:
    touch(tmp_path, "closed/a.png", "b.png")
    (tmp_path / "closed").chmod(0)
    scan = scan_directory(tmp_path, recursive=True)
    (tmp_path / "closed").chmod(0o755)
    assert scan.images.names == ["b.png"]
    (bad,) = scan.bad_files
    assert (bad.path.name, bad.reason) == ("closed", "cannot be listed: Permission denied")


def test_links_share_a_file_identity_and_copies_do_not(tmp_path: Path) -> None:
    touch(tmp_path, "a.png", "b.png")
    (tmp_path / "c.png").symlink_to(tmp_path / "a.png")
    os.link(tmp_path / "a.png", tmp_path / "d.png")
    first, second, third, fourth = scan_directory(tmp_path, recursive=False).images.file_ids.tolist()
    assert first == third == fourth != second


@pytest.mark.parametrize("change", ["size", "time", "replaced"])
def test_every_change_of_a_file_changes_its_stamp(tmp_path: Path, change: str) -> None:
    touch(tmp_path, "a.png", "b.png")
    before = scan_directory(tmp_path, recursive=False).images.stamps
    path = tmp_path / "a.png"
    if change == "size":
        path.write_text("longer than before")
    elif change == "time":
        os.utime(path, ns=(1, 1))
    else:  # by a file of equal size and mtime: only the ctime differs
        status = path.stat()
        touch(tmp_path, "new").joinpath("new").write_text("X.png")
        os.utime(tmp_path / "new", ns=(status.st_atime_ns, status.st_mtime_ns))
        (tmp_path / "new").replace(path)
        assert path.stat().st_size == status.st_size
    after = scan_directory(tmp_path, recursive=False).images.stamps
    assert (after[0] != before[0]).any()
    assert (after[1] == before[1]).all()
    assert tuple(after[0].tolist()) == stamp_of(path)


def test_files_outside_the_folder_are_merged_in_order_and_missing_ones_skipped(tmp_path: Path) -> None:
    touch(tmp_path, "b.png", "sub/a.png", "z/c.png")
    inside = scan_directory(tmp_path, recursive=False).images
    joined = merge_files(inside, stat_files(tmp_path, ["z/c.png", "sub/a.png", "gone.png"]))
    everything = scan_directory(tmp_path, recursive=True).images
    assert joined.names == everything.names == ["b.png", "sub/a.png", "z/c.png"]
    assert np.array_equal(joined.stamps, everything.stamps)
    assert np.array_equal(joined.file_ids, everything.file_ids)
