"""Captions of the images of a folder: from the image's text file, otherwise from a caption table in the folder."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from utils.data.sources.captions import read_caption, split_lines
from utils.data.sources.decoding import IMAGE_SUFFIXES, BadFile
from utils.data.sources.directory_scan import StampedFiles

Captions = Mapping[str, Sequence[str]]


@dataclass(frozen=True)
class CaptionTable:
    """A file with the captions of many images."""

    path: Path
    stamp: tuple[int, int, int]
    read: Callable[[], Captions]
    """Returns path relative to the folder or to the table's folder, with or without suffix -> captions. Raises BadFile."""


class CaptionSources:
    """The text files and caption tables of one folder. Tables are read only when an image needs them."""

    def __init__(self, folder: Path, texts: StampedFiles, tables: Sequence[CaptionTable], *, per_line: bool) -> None:
        self._folder, self.tables, self._per_line = folder, list(tables), per_line
        self._texts = {name[: -len(".txt")]: row for row, name in enumerate(texts.names)}
        self._stamps = texts.stamps
        self.bad_tables: list[BadFile] = []

    @cached_property
    def _table(self) -> dict[str, list[str]]:
        """Name or stem -> captions, from all tables; the first table with an entry for an image takes precedence."""
        captions_by_name: dict[str, list[str]] = {}
        for table in self.tables:
            table_folder = table.path.parent.relative_to(self._folder)
            try:
                entries = table.read()
            except BadFile as bad:
                self.bad_tables.append(bad)
                continue
            for name, captions in entries.items():
                captions_by_name.setdefault(self._relative(table_folder, name), list(captions))
        return captions_by_name

    def _relative(self, table_folder: Path, name: str) -> str:
        """Converts a name in a table to a path relative to this folder; programs also write "./fox.png" or full paths."""
        return os.path.normpath(os.path.join(table_folder, name)).removeprefix(f"{self._folder.absolute()}/")

    def stamps_of(self, names: Sequence[str]) -> np.ndarray:
        """Returns the stamp of each image's text file, (n, 3) int64; zeros for images without one."""
        rows = np.fromiter((self._texts.get(stem_of(name), -1) for name in names), np.int64, len(names))
        stamps = np.zeros((len(names), 3), np.int64)
        stamps[rows >= 0] = self._stamps[rows[rows >= 0]]
        return stamps

    def captions_of(self, name: str) -> list[str] | BadFile:
        """Returns the captions of an image, or the reason why it has none."""
        stem = stem_of(name)
        if stem in self._texts:
            try:
                text = read_caption(self._folder / f"{stem}.txt")
            except BadFile as bad:
                return bad
            return split_lines(text) if self._per_line else [text]
        captions = self._table.get(name) or self._table.get(stem) if self.tables else None
        if captions:
            return captions
        reason = f"has no caption: {Path(stem).name}.txt is missing (an empty file is an empty caption)"
        return BadFile(self._folder / name, reason + self._table_reasons())

    def _table_reasons(self) -> str:
        unreadable = {bad.path for bad in self.bad_tables}
        reasons = ["cannot be read" if table.path in unreadable else "has no entry for it" for table in self.tables]
        return "".join(f", and {table.path.name} {reason}" for table, reason in zip(self.tables, reasons, strict=True))

    def named_images(self) -> list[str]:
        """Returns the image names in the tables, in this folder or elsewhere."""
        return [name for name in self._table if Path(name).suffix.lower() in IMAGE_SUFFIXES]

    def unmatched_entries(self, names: Sequence[str]) -> list[str]:
        """Returns the table entries that match none of the images."""
        if not self.tables:
            return []
        known = {*names, *map(stem_of, names)}
        return [name for name in self._table if name not in known]

    def warnings(self, names: Sequence[str]) -> list[str]:
        """Returns warnings about text files without an image and images that share one. names: those of all images."""
        stems = Counter(stem_of(name) for name in names)
        warnings = []
        shared = sorted(f"{stem}.txt" for stem, count in stems.items() if count > 1 and stem in self._texts)
        if shared:
            warnings.append(f"{self._folder}: several images share one caption file: {first_few(shared)}")
        unused = sorted(f"{stem}.txt" for stem in self._texts.keys() - stems.keys())
        if unused:
            warnings.append(f"{self._folder}: {len(unused)} caption files belong to no image: {first_few(unused)}")
        return warnings


def stem_of(name: str) -> str:
    """Returns the name without its suffix."""
    return name.rpartition(".")[0]


def first_few(names: Sequence[str], limit: int = 5, *, total: int | None = None) -> str:
    """Joins the first `limit` names and counts the rest. total: the full number, if `names` has only the first of them."""
    more = (len(names) if total is None else total) - limit
    return ", ".join(names[:limit]) + (f" and {more} more" if more > 0 else "")
