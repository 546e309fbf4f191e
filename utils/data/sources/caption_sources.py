"""Which captions an image of a folder has: those of its text file, else those of a table of captions in the folder."""

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
    """Name below the folder, or below that of the table, or a stem -> captions. Raises BadFile."""


class CaptionSources:
    """The text files and tables of one folder. Tables are read only when an image asks for its captions."""

    def __init__(self, folder: Path, texts: StampedFiles, tables: Sequence[CaptionTable], *, per_line: bool) -> None:
        self._folder, self.tables, self._per_line = folder, list(tables), per_line
        self._texts = {name[: -len(".txt")]: row for row, name in enumerate(texts.names)}
        self._stamps = texts.stamps
        self.bad_tables: list[BadFile] = []

    @cached_property
    def _table(self) -> dict[str, list[str]]:
        """Name or stem -> captions, of all tables; the first that has an image counts."""
        joined: dict[str, list[str]] = {}
        for table in self.tables:
            inner = table.path.parent.relative_to(self._folder)
            try:
                entries = table.read()
            except BadFile as bad:
                self.bad_tables.append(bad)
                continue
            for name, captions in entries.items():
                joined.setdefault(self._below(inner, name), list(captions))
        return joined

    def _below(self, inner: Path, name: str) -> str:
        """A name in a table of the folder `inner`, below this folder; some programs write "./fox.png", or whole paths."""
        return os.path.normpath(os.path.join(inner, name)).removeprefix(f"{self._folder.absolute()}/")

    def stamps_of(self, names: Sequence[str]) -> np.ndarray:
        """The stamp of each image's text file, zeros for those that have none: (n, 3)."""
        rows = np.fromiter((self._texts.get(stem_of(name), -1) for name in names), np.int64, len(names))
        stamps = np.zeros((len(names), 3), np.int64)
        stamps[rows >= 0] = self._stamps[rows[rows >= 0]]
        return stamps

    def captions_of(self, name: str) -> list[str] | BadFile:
        """The captions of an image, or why it has none."""
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
        return BadFile(self._folder / name, reason + self._why_no_table())

    def _why_no_table(self) -> str:
        unread = {bad.path for bad in self.bad_tables}
        whys = ["cannot be read" if table.path in unread else "has no entry for it" for table in self.tables]
        return "".join(f", and {table.path.name} {why}" for table, why in zip(self.tables, whys, strict=True))

    def named_images(self) -> list[str]:
        """Images that tables name, wherever they are."""
        return [name for name in self._table if Path(name).suffix.lower() in IMAGE_SUFFIXES]

    def nameless(self, names: Sequence[str]) -> list[str]:
        """Entries of tables that name none of all images."""
        if not self.tables:
            return []
        everyone = {*names, *map(stem_of, names)}
        return [name for name in self._table if name not in everyone]

    def warnings(self, names: Sequence[str]) -> list[str]:
        """Text files that are nobody's, and images that share one; of all images' names."""
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
    """The name without its suffix."""
    return name.rpartition(".")[0]


def first_few(names: Sequence[str], limit: int = 5, *, total: int | None = None) -> str:
    """The first few, and how many more there are; `total`: how many there are of which these are the first."""
    more = (len(names) if total is None else total) - limit
    return ", ".join(names[:limit]) + (f" and {more} more" if more > 0 else "")
