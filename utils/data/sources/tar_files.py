"""What .tar files hold: the place of each image, and its captions. Nothing is unpacked.

A .tar is read as webdataset reads it: members are of one sample when their names are equal up to the first dot behind the
last slash ("000/fox.jpg", "000/fox.txt"), wherever they stand in the archive. Only headers and captions are read. Of a
damaged or unfinished archive, what stands before the damage is used.
"""

from __future__ import annotations

import io
import os
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from utils.data.sources.archive_entries import ArchiveEntry, check_regular
from utils.data.sources.captions import caption_key, captions_of, decode_text, parse_json, quoted, split_lines
from utils.data.sources.decoding import IMAGE_SUFFIXES, BadFile

_CAPTION_SUFFIXES = (".txt", ".json")
_MAX_CAPTION_BYTES = 2**20
_MAX_HEADER_BYTES = 2**20
_MAX_PADDING_BYTES = 2**20  # zeros behind the end mark; tar fills up to 10 KiB
_COMPRESSED = (b"\x1f\x8b", b"BZh", b"\xfd7zXZ\x00", b"\x28\xb5\x2f\xfd")  # gzip, bzip2, xz, zstandard


def list_tar(path: Path, *, caption_per_line: bool) -> tuple[list[ArchiveEntry], list[BadFile], list[str]]:
    """Images in the archive's order; what cannot be used; names of members of no image.

    An image's caption is the .txt file of its name or of its sample, else the .json file with one of CAPTION_KEYS. Hidden
    members are passed over. Raises BadFile for what is no archive, or is one that was compressed.
    """
    check_regular(path)
    members = _Members(path)
    try:
        with _HeaderFile(path) as file:
            _check_beginning(path, os.pread(file.fileno(), tarfile.BLOCKSIZE, 0))
            try:
                for header in _headers(file):
                    members.add(header)
            except ValueError as error:
                members.refuse("", f"{error} after {len(members.images)} images")
            found = list(members.with_captions(file.fileno(), caption_per_line))
    except OSError as error:
        raise BadFile(path, f"cannot be read: {error.strerror}") from error
    return found, members.bad, members.of_no_image()


class _HeaderFile(io.FileIO):
    """A .tar file for tarfile to read headers from; without a buffer, which would read content with each."""

    ran_out = False

    def read(self, size: int | None = -1, /) -> bytes:
        if size is None or not 0 <= size <= _MAX_HEADER_BYTES:  # only damage asks for it, and it would be allocated
            raise ValueError(f"a header of {size} bytes")
        content = super().read(size)
        self.ran_out = self.ran_out or len(content) < size
        return content


def _headers(file: _HeaderFile) -> Iterator[tarfile.TarInfo]:
    """Each member whose content is there to its end. Raises ValueError where the archive is cut off or damaged."""
    size = os.fstat(file.fileno()).st_size
    reached = 0
    try:
        with tarfile.open(fileobj=file, mode="r:", encoding="utf-8") as tar:
            while (header := tar.next()) is not None:
                tar.members = []  # type: ignore[attr-defined]  # it would keep a kilobyte for each
                if tar.offset <= reached:  # a negative size would have it read the same members for ever
                    raise ValueError("a negative size")
                if header.isreg() and header.sparse is None and header.offset_data + header.size > size:
                    file.ran_out = True
                    raise ValueError("content is missing")
                reached = tar.offset
                yield header
            reached = tar.offset
    except (MemoryError, OSError):
        raise
    except Exception as error:  # damaged headers make tarfile raise whatever they like
        raise ValueError("is cut off" if file.ran_out else f"is damaged at byte {reached}") from error
    _check_end(file, reached)


def _check_end(file: _HeaderFile, end: int) -> None:
    """tarfile ends without a word where a header is damaged or missing. Raises ValueError."""
    if file.ran_out:
        raise ValueError("is cut off")
    padding = os.pread(file.fileno(), _MAX_PADDING_BYTES, end)
    if any(padding[: tarfile.BLOCKSIZE]):
        raise ValueError(f"is damaged at byte {end}")
    if any(padding):
        raise ValueError(f"has an end mark at byte {end} and more behind it, which is not read (joined by cat?),")


def _check_beginning(path: Path, block: bytes) -> None:
    """Raises BadFile for what tarfile cannot begin with; a block of zeros ends an archive of nothing."""
    if block.startswith(_COMPRESSED):
        raise BadFile(path, "is compressed: members cannot be read in place; unpack it")
    if len(block) == tarfile.BLOCKSIZE and not any(block):
        return
    try:
        tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
    except (tarfile.TarError, ValueError) as error:
        raise BadFile(path, "is not a .tar file") from error


@dataclass
class _Members:
    """What an archive's headers tell."""

    archive: Path
    images: dict[str, ArchiveEntry] = field(default_factory=dict)
    """By what members of a sample have in common."""
    captions: dict[str, tuple[str, int, int]] = field(default_factory=dict)
    """Name with its suffix in small letters -> name, first byte, bytes."""
    others: list[str] = field(default_factory=list)
    """Names of all but images."""
    bad: list[BadFile] = field(default_factory=list)

    def add(self, header: tarfile.TarInfo) -> None:
        name = header.name
        if header.isdir() or name.rpartition("/")[2].startswith("."):
            return
        stem, suffix = _split(name)
        is_image = suffix in IMAGE_SUFFIXES
        if not is_image:
            self.others.append(name)
            if suffix not in _CAPTION_SUFFIXES:
                return
        reason = _unreadable(header)
        if reason:
            self.refuse(name, reason)
        elif is_image:
            found = ArchiveEntry(name, header.offset_data, header.size, None)
            first = self.images.setdefault(_key(name), found)
            if first is not found:
                self.refuse(name, f"shares its name up to the first dot with {quoted(first.name)}: one sample, one image")
        elif self.captions.setdefault(stem + suffix, place := (name, header.offset_data, header.size)) is not place:
            self.refuse(name, "is there twice")

    def refuse(self, name: str, reason: str) -> None:
        self.bad.append(BadFile(Path(f"{self.archive}/{name}"), reason))  # joined by "/", an absolute name would stand alone

    def with_captions(self, descriptor: int, caption_per_line: bool) -> Iterator[ArchiveEntry]:
        """The images but those whose caption cannot be read."""
        for key, image in self.images.items():
            places = [
                self.captions[stem + suffix]
                for suffix in _CAPTION_SUFFIXES
                for stem in dict.fromkeys((_split(image.name)[0], key))
                if stem + suffix in self.captions
            ]
            captions = None
            try:
                for name, start, length in places:
                    captions = _read_captions(descriptor, name, start, length, caption_per_line)
                    if captions is not None:
                        break
            except ValueError as error:
                self.refuse(name, str(error))
                continue
            yield image._replace(captions=captions)

    def of_no_image(self) -> list[str]:
        return [name for name in self.others if _key(name) not in self.images]


def _split(name: str) -> tuple[str, str]:
    """Name up to its last dot; the rest in small letters."""
    stem, dot, suffix = name.rpartition(".")
    return (stem, f".{suffix.lower()}") if dot and "/" not in suffix else (name, "")


def _key(name: str) -> str:
    """Name up to the first dot behind the last slash: what members of one sample have in common."""
    folder, slash, last = name.rpartition("/")
    return folder + slash + last.partition(".")[0]


def _unreadable(header: tarfile.TarInfo) -> str:
    """Why the member's content does not stand in the archive as it is; empty if it does."""
    if header.islnk() or header.issym():
        return f"is a link to {quoted(header.linkname)}: the archive must have the file itself"
    if header.sparse is not None:
        return "is stored with its zeros left out (sparse) and cannot be read in place"
    return "" if header.isreg() else f"is no file, but a member of type {header.type!r}"


def _read_captions(descriptor: int, name: str, start: int, length: int, caption_per_line: bool) -> list[str] | None:
    """Captions of a .txt or .json member; None if there are none in it. Raises ValueError with the reason."""
    if length > _MAX_CAPTION_BYTES:
        raise ValueError(f"has {length} bytes: a caption's file may have {_MAX_CAPTION_BYTES}")
    content = os.pread(descriptor, length, start)
    if len(content) < length:
        raise ValueError("is cut off")
    text = decode_text(content)
    if _split(name)[1] == ".txt":
        return split_lines(text) if caption_per_line else [text.strip()]
    entry = parse_json(text)
    return captions_of(entry) if isinstance(entry, dict) and caption_key(entry) is not None else None
