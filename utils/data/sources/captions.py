"""Captions: of a text file, of a table for many images, and as lists of tags in several orders.

Tables are read in the forms that other programs write: `captions.json` (diffusion-pipe), `metadata.jsonl` and `metadata.csv`
(Hugging Face imagefolder), and sd-scripts' metadata, a .json file with an object for each image. One mistake makes the
whole table unusable: a table that is read in part would train on fewer captions than its writer thinks.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator, Mapping
from pathlib import Path

from utils.data.sources.decoding import BadFile

CAPTION_KEYS = ("text", "caption", "captions", "prompt")
"""What other programs call an image's caption; the first that is there is used."""
TAGS_KEY = "tags"  # sd-scripts' name for what a tagger wrote, one string; a list of tags would pass for several captions
_NAME_KEY = "file_name"
_MAX_SHOWN = 80  # characters of a user's text in a message
_JSON_TYPES = {
    type(None): "null",
    bool: "true or false",
    int: "a number",
    float: "a number",
    str: "a string",
    list: "a list",
    dict: "an object",
}


def read_caption(path: Path) -> str:
    """The text of a UTF-8 file, without white space around it. Raises BadFile."""
    return _read_text(path).strip()


def split_lines(text: str) -> list[str]:
    """Each line with something in it as a caption of its own; one empty caption if there is no such line."""
    return [line for part in text.split("\n") if (line := part.strip())] or [""]


def read_caption_table(path: Path) -> dict[str, list[str]]:
    """Names as the table writes them (relative paths, file names or stems) and the captions of each, at least one.

    An image whose caption is null has none and is left out. Raises BadFile, which names the first wrong line or key.
    """
    readers = {".json": _json_entries, ".jsonl": _jsonl_entries, ".csv": _csv_entries}
    entries = readers.get(path.suffix.lower())
    if entries is None:
        raise BadFile(path, f"is no table of captions: its name must end in {', '.join(readers)}")
    text = _read_text(path)
    table: dict[str, list[str]] = {}
    try:
        for place, name, captions in entries(text):
            if captions is not None and table.setdefault(name, captions) != captions:
                raise ValueError(f"{place}: {quoted(name)} has another caption above")
    except ValueError as error:
        raise BadFile(path, str(error)) from error
    return table


def decode_text(data: bytes) -> str:
    """UTF-8, with or without a byte order mark; every end of line becomes a line feed. Raises ValueError with the reason."""
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"is not UTF-8: byte {error.start} is 0x{data[error.start]:02x}") from error
    return text.removeprefix("\ufeff").replace("\r\n", "\n").replace("\r", "\n")


def _unique_keys(pairs: list[tuple[str, object]]) -> dict[str, object]:
    """A JSON object; Python would take the last of two equal keys."""
    found = dict(pairs)
    if len(found) != len(pairs):
        for key, value in pairs:
            if found[key] != value:
                raise ValueError(f"key {quoted(key)}: is there twice, with another value")
    return found


_DECODER = json.JSONDecoder(object_pairs_hook=_unique_keys)  # made once: that is half of a short text's time


def parse_json(text: str) -> object:
    """What a JSON text says. Raises ValueError with the reason, also for an object that has a key twice."""
    try:
        return _DECODER.decode(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"is not JSON: {error.msg} (line {error.lineno}, column {error.colno})") from error
    except RecursionError:
        raise ValueError("is not JSON anybody wrote: its brackets are too deep") from None


def caption_key(entry: Mapping[str, object]) -> str | None:
    """The key of an object about one image that has its captions: the first that is not null, else the first."""
    keys = [key for key in CAPTION_KEYS if key in entry]
    if isinstance(entry.get(TAGS_KEY), str):
        keys.append(TAGS_KEY)
    return next((key for key in keys if entry[key] is not None), keys[0] if keys else None)


def captions_of(entry: Mapping[str, object]) -> list[str] | None:
    """Captions of an object about one image; None if they are null. Raises ValueError with the reason."""
    key = caption_key(entry)
    if key is None:
        raise ValueError(f"has none of the keys {', '.join(CAPTION_KEYS)}, and no string {TAGS_KEY}")
    if entry[key] is None:
        return None
    try:
        return as_captions(entry[key])
    except ValueError as error:
        raise ValueError(f"{key} {error}") from error


def as_captions(value: object) -> list[str]:
    """A string or a list of strings as captions, without white space around them. Raises ValueError with the reason."""
    captions = value if isinstance(value, list) else [value]
    if not captions:
        raise ValueError("is an empty list: must be a string or a list of at least one")
    stripped = []
    for caption in captions:
        if not isinstance(caption, str):
            where = "has" if isinstance(value, list) else "is"
            raise ValueError(f"{where} {_kind(caption)}: must be a string or a list of strings")
        if not caption.isascii() and any("\ud800" <= character <= "\udfff" for character in caption):
            raise ValueError("has half a surrogate pair, which is no character")
        stripped.append(caption.strip())
    return stripped


def quoted(text: str) -> str:
    """A user's text for a message: quoted, in one line, shortened."""
    return repr(text if len(text) <= _MAX_SHOWN else f"{text[:_MAX_SHOWN]}...")


def _read_text(path: Path) -> str:
    try:
        return decode_text(path.read_bytes())
    except ValueError as error:
        raise BadFile(path, str(error)) from error
    except OSError as error:
        raise BadFile(path, f"cannot be read: {error.strerror}") from error


_Entry = tuple[str, str, list[str] | None]
"""Where it stands in its table, name, captions."""


def _json_entries(text: str) -> Iterator[_Entry]:
    table = parse_json(text)
    if not isinstance(table, dict):
        raise ValueError(f"is {_kind(table)}: must be an object of names and captions")
    for name, value in table.items():
        place = f"key {quoted(name)}"
        if not name:
            raise ValueError(f"{place}: must be a name")
        yield place, name, _located(place, value)


def _jsonl_entries(text: str) -> Iterator[_Entry]:
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        place = f"line {number}"
        try:
            entry = parse_json(line)
        except ValueError as error:
            raise ValueError(f"{place}: {error}") from error
        if not isinstance(entry, dict):
            raise ValueError(f"{place}: is {_kind(entry)}: must be an object")
        yield place, _name_in(place, entry), _located(place, entry)


def _csv_entries(text: str) -> Iterator[_Entry]:
    rows = csv.reader(io.StringIO(text), strict=True)
    header, last = None, 0
    try:
        for row in rows:
            place, last = f"line {last + 1}", rows.line_num  # a quoted field may reach over several lines
            if not row:
                continue
            if header is None:
                header = row
                _check_header(place, header)
                continue
            if len(row) != len(header):
                raise ValueError(f"{place}: has {len(row)} fields, and the header {len(header)}")
            entry: dict[str, object] = dict(zip(header, row, strict=True))
            yield place, _name_in(place, entry), _located(place, entry)
    except csv.Error as error:
        raise ValueError(f"line {last + 1}: is not CSV: {error}") from error


def _check_header(place: str, header: list[str]) -> None:
    if len(set(header)) != len(header):
        raise ValueError(f"{place}: the header has a name twice")
    if _NAME_KEY not in header or not {*CAPTION_KEYS, TAGS_KEY}.intersection(header):
        raise ValueError(f"{place}: the header must have {_NAME_KEY} and one of {', '.join(CAPTION_KEYS)}, {TAGS_KEY}")


def _name_in(place: str, entry: Mapping[str, object]) -> str:
    name = entry.get(_NAME_KEY)
    if not isinstance(name, str) or not name:
        raise ValueError(f"{place}: {_NAME_KEY} must be the name of an image")
    return name


def _located(place: str, value: object) -> list[str] | None:
    """Captions of a table's entry, a mistake with the place before it."""
    try:
        if value is None:
            return None
        return captions_of(value) if isinstance(value, dict) else as_captions(value)
    except ValueError as error:
        raise ValueError(f"{place}: {error}") from error


def _kind(value: object) -> str:
    return _JSON_TYPES.get(type(value), type(value).__name__)
