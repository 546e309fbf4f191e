"""Reads captions from text files and from tables for many images.

Supported tables are those that other programs write: `captions.json` (diffusion-pipe), `metadata.jsonl` and `metadata.csv`
(Hugging Face imagefolder), and the metadata of sd-scripts, a .json file with one object per image. A single error makes the
whole table unusable: reading it in part would silently train on fewer captions than the user expects.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator, Mapping
from pathlib import Path

from utils.data.sources.decoding import BadFile

CAPTION_KEYS = ("text", "caption", "captions", "prompt")
"""Names of the caption in the formats of other programs; the first one present is used."""
TAGS_KEY = "tags"  # output of a tagger in sd-scripts' metadata: one string. A list would be taken for several captions.
_NAME_KEY = "file_name"
_MAX_QUOTED = 80  # characters of a user's text in a message
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
    """Reads a UTF-8 file and strips surrounding white space. Raises BadFile."""
    return _read_text(path).strip()


def split_lines(text: str) -> list[str]:
    """Returns each non-blank line as a separate caption; one empty caption if all lines are blank."""
    return [line for part in text.split("\n") if (line := part.strip())] or [""]


def read_caption_table(path: Path) -> dict[str, list[str]]:
    """Reads a caption table; returns names as written in it (relative paths, file names or stems) -> captions, at least one.

    Entries whose caption is null are skipped. Raises BadFile with the first invalid line or key.
    """
    readers = {".json": _json_entries, ".jsonl": _jsonl_entries, ".csv": _csv_entries}
    entries = readers.get(path.suffix.lower())
    if entries is None:
        raise BadFile(path, f"is not a caption table: its name must end in {', '.join(readers)}")
    text = _read_text(path)
    table: dict[str, list[str]] = {}
    try:
        for location, name, captions in entries(text):
            if captions is not None and table.setdefault(name, captions) != captions:
                raise ValueError(f"{location}: {quoted(name)} already has a different caption above")
    except ValueError as error:
        raise BadFile(path, str(error)) from error
    return table


def decode_text(data: bytes) -> str:
    """Decodes UTF-8, drops a byte order mark and normalizes line ends to LF. Raises ValueError with the reason."""
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"is not UTF-8: byte {error.start} is 0x{data[error.start]:02x}") from error
    return text.removeprefix("\ufeff").replace("\r\n", "\n").replace("\r", "\n")


def _unique_keys(pairs: list[tuple[str, object]]) -> dict[str, object]:
    """Builds a JSON object and rejects duplicate keys with different values; Python alone would keep the last one."""
    entry = dict(pairs)
    if len(entry) != len(pairs):
        for key, value in pairs:
            if entry[key] != value:
                raise ValueError(f"key {quoted(key)}: appears twice with different values")
    return entry


_DECODER = json.JSONDecoder(object_pairs_hook=_unique_keys)  # creating it takes half as long as decoding a short text


def parse_json(text: str) -> object:
    """Parses a JSON text. Raises ValueError with the reason, also for duplicate keys with different values."""
    try:
        return _DECODER.decode(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"is not JSON: {error.msg} (line {error.lineno}, column {error.colno})") from error
    except RecursionError:
        raise ValueError("is not usable JSON: its brackets are nested too deeply") from None


def caption_key(entry: Mapping[str, object]) -> str | None:
    """Returns the key that holds the captions in the object of one image: the first that is not null, else the first."""
    keys = [key for key in CAPTION_KEYS if key in entry]
    if isinstance(entry.get(TAGS_KEY), str):
        keys.append(TAGS_KEY)
    return next((key for key in keys if entry[key] is not None), keys[0] if keys else None)


def captions_of(entry: Mapping[str, object]) -> list[str] | None:
    """Returns the captions in the object of one image; None if they are null. Raises ValueError with the reason."""
    key = caption_key(entry)
    if key is None:
        raise ValueError(f"has none of the keys {', '.join(CAPTION_KEYS)} and no string under {TAGS_KEY}")
    if entry[key] is None:
        return None
    try:
        return as_captions(entry[key])
    except ValueError as error:
        raise ValueError(f"{key} {error}") from error


def as_captions(value: object) -> list[str]:
    """Converts a string or a list of strings to stripped captions. Raises ValueError with the reason."""
    captions = value if isinstance(value, list) else [value]
    if not captions:
        raise ValueError("is an empty list: must be a string or a list of at least one")
    stripped = []
    for caption in captions:
        if not isinstance(caption, str):
            where = "has" if isinstance(value, list) else "is"
            raise ValueError(f"{where} {_json_type(caption)}: must be a string or a list of strings")
        if not caption.isascii() and any("\ud800" <= character <= "\udfff" for character in caption):
            raise ValueError("has an unpaired surrogate, which is not a character")
        stripped.append(caption.strip())
    return stripped


def quoted(text: str) -> str:
    """Quotes a user's text for a message, in one line and shortened."""
    return repr(text if len(text) <= _MAX_QUOTED else f"{text[:_MAX_QUOTED]}...")


def _read_text(path: Path) -> str:
    try:
        return decode_text(path.read_bytes())
    except ValueError as error:
        raise BadFile(path, str(error)) from error
    except OSError as error:
        raise BadFile(path, f"cannot be read: {error.strerror}") from error


_Entry = tuple[str, str, list[str] | None]
"""(Location in the table, name, captions)."""


def _json_entries(text: str) -> Iterator[_Entry]:
    table = parse_json(text)
    if not isinstance(table, dict):
        raise ValueError(f"is {_json_type(table)}: must be an object of names and captions")
    for name, value in table.items():
        location = f"key {quoted(name)}"
        if not name:
            raise ValueError(f"{location}: must be a name")
        yield location, name, _captions_at(location, value)


def _jsonl_entries(text: str) -> Iterator[_Entry]:
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        location = f"line {number}"
        try:
            entry = parse_json(line)
        except ValueError as error:
            raise ValueError(f"{location}: {error}") from error
        if not isinstance(entry, dict):
            raise ValueError(f"{location}: is {_json_type(entry)}: must be an object")
        yield location, _name_in(location, entry), _captions_at(location, entry)


def _csv_entries(text: str) -> Iterator[_Entry]:
    rows = csv.reader(io.StringIO(text), strict=True)
    header, last = None, 0
    try:
        for row in rows:
            location, last = f"line {last + 1}", rows.line_num  # a quoted field may span several lines
            if not row:
                continue
            if header is None:
                header = row
                _check_header(location, header)
                continue
            if len(row) != len(header):
                raise ValueError(f"{location}: has {len(row)} fields, but the header has {len(header)}")
            entry: dict[str, object] = dict(zip(header, row, strict=True))
            yield location, _name_in(location, entry), _captions_at(location, entry)
    except csv.Error as error:
        raise ValueError(f"line {last + 1}: is not CSV: {error}") from error


def _check_header(location: str, header: list[str]) -> None:
    if len(set(header)) != len(header):
        raise ValueError(f"{location}: the header contains a name twice")
    if _NAME_KEY not in header or not {*CAPTION_KEYS, TAGS_KEY}.intersection(header):
        raise ValueError(f"{location}: the header must have {_NAME_KEY} and one of {', '.join(CAPTION_KEYS)}, {TAGS_KEY}")


def _name_in(location: str, entry: Mapping[str, object]) -> str:
    name = entry.get(_NAME_KEY)
    if not isinstance(name, str) or not name:
        raise ValueError(f"{location}: {_NAME_KEY} must be the name of an image")
    return name


def _captions_at(location: str, value: object) -> list[str] | None:
    """Returns the captions of a table's entry; prefixes errors with the entry's location."""
    try:
        if value is None:
            return None
        return captions_of(value) if isinstance(value, dict) else as_captions(value)
    except ValueError as error:
        raise ValueError(f"{location}: {error}") from error


def _json_type(value: object) -> str:
    return _JSON_TYPES.get(type(value), type(value).__name__)
