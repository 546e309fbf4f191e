"""Lists the images of .tar files: position and captions of each. Nothing is unpacked.

A .tar file is interpreted like a webdataset: members belong to one sample if their names are equal up to the first dot after
the last slash ("000/fox.jpg", "000/fox.txt"), wherever they are in the archive. Only headers and captions are read. In a
damaged or truncated archive, the members before the damage are used.
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
_MAX_PADDING_BYTES = 2**20  # zeros after the end marker; tar pads to 10 KiB
_COMPRESSED = (b"\x1f\x8b", b"BZh", b"\xfd7zXZ\x00", b"\x28\xb5\x2f\xfd")  # gzip, bzip2, xz, zstandard


def list_tar(path: Path, *, caption_per_line: bool) -> tuple[list[ArchiveEntry], list[BadFile], list[str]]:
    """Returns the images in the archive's order, the unusable members, and the names of members that belong to no image.

    An image's caption is the .txt file of its name or sample, otherwise the .json file with one of CAPTION_KEYS. Hidden
    members are skipped. Raises BadFile for a file that is not a .tar archive or is compressed.
    """
    check_regular(path)
    members = _Members(path)
    try:
        with _HeaderFile(path) as file:
            _check_first_block(path, os.pread(file.fileno(), tarfile.BLOCKSIZE, 0))
            try:
                for header in _headers(file):
                    members.add(header)
            except ValueError as error:
                members.add_bad("", f"{error} after {len(members.images)} images")
            entries = list(members.with_captions(file.fileno(), caption_per_line))
    except OSError as error:
        raise BadFile(path, f"cannot be read: {error.strerror}") from error
    return entries, members.bad, members.unused()


class _HeaderFile(io.FileIO):
    """A .tar file from which tarfile reads headers; unbuffered, since a buffer would also read the contents."""

    ran_out = False

    def read(self, size: int | None = -1, /) -> bytes:
        if size is None or not 0 <= size <= _MAX_HEADER_BYTES:  # only in a damaged archive; it would be allocated
            raise ValueError(f"a header of {size} bytes")
        content = super().read(size)
        self.ran_out = self.ran_out or len(content) < size
        return content


def _headers(file: _HeaderFile) -> Iterator[tarfile.TarInfo]:
    """Yields each member whose content is complete. Raises ValueError where the archive is truncated or damaged."""
    size = os.fstat(file.fileno()).st_size
    reached = 0
    try:
        with tarfile.open(fileobj=file, mode="r:", encoding="utf-8") as tar:
            while (header := tar.next()) is not None:
                tar.members = []  # type: ignore[attr-defined]  # it would keep a kilobyte per member
                if tar.offset <= reached:  # a negative size would repeat the same members forever
                    raise ValueError("a negative size")
                if header.isreg() and header.sparse is None and header.offset_data + header.size > size:
                    file.ran_out = True
                    raise ValueError("content is missing")
                reached = tar.offset
                yield header
            reached = tar.offset
    except (MemoryError, OSError):
        raise
    except Exception as error:  # damaged headers make tarfile raise arbitrary exceptions
        raise ValueError("is truncated" if file.ran_out else f"is damaged at byte {reached}") from error
    _check_end(file, reached)


def _check_end(file: _HeaderFile, end: int) -> None:
    """Raises ValueError unless the archive ends properly; tarfile silently stops at a damaged or missing header."""
    if file.ran_out:
        raise ValueError("is truncated")
    padding = os.pread(file.fileno(), _MAX_PADDING_BYTES, end)
    if any(padding[: tarfile.BLOCKSIZE]):
        raise ValueError(f"is damaged at byte {end}")
    if any(padding):
        raise ValueError(f"has an end marker at byte {end} and more data after it, which is not read (joined by cat?),")


def _check_first_block(path: Path, block: bytes) -> None:
    """Raises BadFile if the file does not start with a .tar header. A block of zeros is an empty archive."""
    if block.startswith(_COMPRESSED):
        raise BadFile(path, "is compressed, so members cannot be read in place; decompress it")
    if len(block) == tarfile.BLOCKSIZE and not any(block):
        return
    try:
        tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
    except (tarfile.TarError, ValueError) as error:
        raise BadFile(path, "is not a .tar file") from error


@dataclass
class _Members:
    """The members of an archive, collected from its headers."""

    archive: Path
    images: dict[str, ArchiveEntry] = field(default_factory=dict)
    """Sample key -> image."""
    captions: dict[str, tuple[str, int, int]] = field(default_factory=dict)
    """Name with lower-case suffix -> (name, first byte, size in bytes)."""
    others: list[str] = field(default_factory=list)
    """Names of all members that are not images."""
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
            self.add_bad(name, reason)
        elif is_image:
            entry = ArchiveEntry(name, header.offset_data, header.size, None)
            first = self.images.setdefault(_sample_key(name), entry)
            if first is not entry:
                sample = f"shares its name up to the first dot with {quoted(first.name)}"
                self.add_bad(name, f"{sample}: a sample can have only one image")
        elif self.captions.setdefault(stem + suffix, caption := (name, header.offset_data, header.size)) is not caption:
            self.add_bad(name, "exists twice")

    def add_bad(self, name: str, reason: str) -> None:
        """Records a member that cannot be used."""
        # Not `archive / name`, which would drop the archive in front of an absolute name.
        self.bad.append(BadFile(Path(f"{self.archive}/{name}"), reason))

    def with_captions(self, descriptor: int, caption_per_line: bool) -> Iterator[ArchiveEntry]:
        """Yields the images with their captions, without those whose caption cannot be read."""
        for key, image in self.images.items():
            files = [
                self.captions[stem + suffix]
                for suffix in _CAPTION_SUFFIXES
                for stem in dict.fromkeys((_split(image.name)[0], key))
                if stem + suffix in self.captions
            ]
            captions = None
            try:
                for name, start, length in files:
                    captions = _read_captions(descriptor, name, start, length, caption_per_line)
                    if captions is not None:
                        break
            except ValueError as error:
                self.add_bad(name, str(error))
                continue
            yield image._replace(captions=captions)

    def unused(self) -> list[str]:
        """Returns the names of members that belong to no image."""
        return [name for name in self.others if _sample_key(name) not in self.images]


def _split(name: str) -> tuple[str, str]:
    """Splits a name at its last dot; the suffix is converted to lower case."""
    stem, dot, suffix = name.rpartition(".")
    return (stem, f".{suffix.lower()}") if dot and "/" not in suffix else (name, "")


def _sample_key(name: str) -> str:
    """Returns the name up to the first dot after the last slash, which the members of a sample have in common."""
    folder, slash, last = name.rpartition("/")
    return folder + slash + last.partition(".")[0]


def _unreadable(header: tarfile.TarInfo) -> str:
    """Returns the reason why the member's content cannot be read in place; empty if it can."""
    if header.islnk() or header.issym():
        return f"is a link to {quoted(header.linkname)}: the archive must contain the file itself"
    if header.sparse is not None:
        return "is stored as a sparse file, which cannot be read in place"
    return "" if header.isreg() else f"is not a file but a member of type {header.type!r}"


def _read_captions(descriptor: int, name: str, start: int, length: int, caption_per_line: bool) -> list[str] | None:
    """Reads the captions of a .txt or .json member; None if it has none. Raises ValueError with the reason."""
    if length > _MAX_CAPTION_BYTES:
        raise ValueError(f"has {length} bytes; a caption file may have at most {_MAX_CAPTION_BYTES}")
    content = os.pread(descriptor, length, start)
    if len(content) < length:
        raise ValueError("is truncated")
    text = decode_text(content)
    if _split(name)[1] == ".txt":
        return split_lines(text) if caption_per_line else [text.strip()]
    entry = parse_json(text)
    return captions_of(entry) if isinstance(entry, dict) and caption_key(entry) is not None else None
