"""Where each text encoder's tokenizer is: a folder on this machine, or one of a model hub.

Looked for in this order: where `clip_l_tokenizer` and so on say; the encoder's own folder; the folder beside it that
diffusers has (`tokenizer`, `tokenizer_2`, `tokenizer_3`), which for a single file is beside the file; the hub.
"""

from __future__ import annotations

import json
import re
from pathlib import Path

from models.sd3.settings import SD3Settings
from models.sd3.sources import Component

FOLDERS = {"clip_l": "tokenizer", "clip_g": "tokenizer_2", "t5xxl": "tokenizer_3"}
HUB_NAMES = {
    "clip_l": "openai/clip-vit-large-patch14",
    "clip_g": "laion/CLIP-ViT-bigG-14-laion2B-39B-b160k",
    "t5xxl": "google/t5-v1_1-xxl",
}
_CLIP_FILES = (("vocab.json", "merges.txt"), ("tokenizer.json",))
_FILES = {"clip_l": _CLIP_FILES, "clip_g": _CLIP_FILES, "t5xxl": (("tokenizer.json",), ("spiece.model",))}
"""The sets of files, any of which makes a tokenizer."""
_KINDS = {"clip_l": "CLIP tokenizer", "clip_g": "CLIP tokenizer", "t5xxl": "T5 tokenizer"}
_READ_BY_TOKENIZERS = (
    "added_tokens.json",
    "merges.txt",
    "special_tokens_map.json",
    "spiece.model",
    "tokenizer.json",
    "tokenizer_config.json",
    "vocab.json",
)
_HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+(/[\w.-]+)?")


def find_tokenizers(settings: SD3Settings, parts: dict[str, Component]) -> tuple[dict[str, Path], list[tuple[str, str]]]:
    """Encoder -> folder of its tokenizer, and for those that have none what to do, as (key, message)."""
    given = {
        "clip_l": settings.clip_l_tokenizer,
        "clip_g": settings.clip_g_tokenizer,
        "t5xxl": settings.t5xxl_tokenizer,
    }
    found: dict[str, Path] = {}
    errors: list[tuple[str, str]] = []
    for name, part in parts.items():
        value = given[name]
        try:
            found[name] = _given(name, value) if value is not None else _nearby(name, part)
        except LookupError as error:
            errors.append((f"{name}_tokenizer", str(error.args[0])))
    return found, errors


def tokenizer_files(folder: Path) -> tuple[Path, ...]:
    """Of a tokenizer's folder, which may hold much else, the files that decide what the tokens are."""
    return tuple(folder / name for name in _READ_BY_TOKENIZERS if (folder / name).is_file())


def _is_tokenizer(name: str, folder: Path) -> bool:
    return any(all(_is_of_kind(name, folder / file) for file in files) for files in _FILES[name])


def _is_of_kind(name: str, path: Path) -> bool:
    """Whether the file is there and what its name says, as far as a glance can tell: no pointer, page or empty table.

    tokenizer.json has one name for both kinds: CLIP's words are a table, T5's a list.
    """
    if not path.is_file():
        return False
    if path.name in ("merges.txt", "spiece.model"):
        with path.open("rb") as file:
            start = file.read(64)
        return len(start) == 64 and not start.startswith((b"version https://git-lfs", b"<"))
    try:
        if path.name == "vocab.json":
            return len(json.loads(path.read_text(encoding="utf-8"))) > 1
        vocabulary = json.loads(path.read_text(encoding="utf-8"))["model"]["vocab"]
    except (OSError, ValueError, KeyError, TypeError):
        return False
    return isinstance(vocabulary, list if name == "t5xxl" else dict)


def _wanted(name: str) -> str:
    return " or ".join(" and ".join(files) for files in _FILES[name])


def _given(name: str, value: str) -> Path:
    folder = Path(value)
    if folder.is_dir():
        if _is_tokenizer(name, folder):
            return folder
        raise LookupError(f"= {value!r}: the folder has no {_KINDS[name]} ({_wanted(name)})")
    if not _HUB_NAME.fullmatch(value):
        raise LookupError(f"= {value!r}: is neither a folder nor a hub's owner/name; give a folder with {_wanted(name)}")
    try:
        return _from_hub(name, value)
    except OSError as error:
        raise LookupError(
            f"= {value!r}: no such folder, and the hub does not give it ({error}); put {_wanted(name)} into a folder and "
            f"give {name}_tokenizer = that folder"
        ) from error


def _nearby(name: str, part: Component) -> Path:
    beside = (part.folder if part.config is None else part.folder.parent) / FOLDERS[name]
    for folder in (part.folder, beside):
        if _is_tokenizer(name, folder):
            return folder
    try:
        return _from_hub(name, HUB_NAMES[name])
    except OSError as error:
        raise LookupError(
            f"not found: put {_wanted(name)} into {beside}, or give {name}_tokenizer = a folder that has them "
            f"(the hub was asked for {HUB_NAMES[name]}: {error})"
        ) from error


def _from_hub(name: str, hub_name: str) -> Path:
    """The folder of a hub's tokenizer on this machine, downloaded if need be. Raises OSError saying why there is none."""
    from huggingface_hub import snapshot_download  # here: files on this machine need no hub
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    repository, inner = "/".join(hub_name.split("/")[:2]), "/".join(hub_name.split("/")[2:])
    patterns = [f"{inner}/{pattern}" for pattern in _READ_BY_TOKENIZERS] if inner else list(_READ_BY_TOKENIZERS)
    try:
        folder = Path(snapshot_download(repository, allow_patterns=patterns)) / inner
    except LocalEntryNotFoundError as error:
        raise OSError("it cannot be reached") from error
    except (HfHubHTTPError, ValueError) as error:
        raise OSError(str(error).strip().split("\n")[0]) from error
    if not _is_tokenizer(name, folder):
        raise OSError(f"{hub_name} has no {_wanted(name)}")
    return folder
