"""Finds the tokenizer of each text encoder: a folder on this machine, or a download from the Hugging Face hub.

The order of search: `clip_l_tokenizer` and so on in the [model] table; the encoder's own folder; the folder of a diffusers
pipeline next to it (`tokenizer`, `tokenizer_2`, `tokenizer_3`), for a single file next to the file; the hub.
"""

from __future__ import annotations

import json
import re
from pathlib import Path

from models.family import FileErrors
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
"""Alternative sets of files that are sufficient for a tokenizer."""
_KINDS = {"clip_l": "CLIP tokenizer", "clip_g": "CLIP tokenizer", "t5xxl": "T5 tokenizer"}
_TOKENIZER_FILES = (
    "added_tokens.json",
    "merges.txt",
    "special_tokens_map.json",
    "spiece.model",
    "tokenizer.json",
    "tokenizer_config.json",
    "vocab.json",
)
_HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+(/[\w.-]+)?")


def find_tokenizers(settings: SD3Settings, components: dict[str, Component]) -> tuple[dict[str, Path], FileErrors]:
    """Returns (encoder -> folder of its tokenizer, errors of those not found)."""
    configured = {
        "clip_l": settings.clip_l_tokenizer,
        "clip_g": settings.clip_g_tokenizer,
        "t5xxl": settings.t5xxl_tokenizer,
    }
    found: dict[str, Path] = {}
    errors: FileErrors = []
    for name, component in components.items():
        value = configured[name]
        try:
            found[name] = _configured(name, value) if value is not None else _nearby(name, component)
        except LookupError as error:
            errors.append((f"{name}_tokenizer", str(error.args[0])))
    return found, errors


def tokenizer_files(folder: Path) -> tuple[Path, ...]:
    """Returns the files in a tokenizer's folder that determine its token ids; the folder may contain other files."""
    return tuple(folder / name for name in _TOKENIZER_FILES if (folder / name).is_file())


def _is_tokenizer(name: str, folder: Path) -> bool:
    return any(all(_is_valid_file(name, folder / file) for file in files) for files in _FILES[name])


def _is_valid_file(name: str, path: Path) -> bool:
    """Returns whether the file exists and plausibly has the content its name promises: no LFS pointer, HTML or empty table.

    tokenizer.json is the name of both kinds: the vocabulary of CLIP is a table, that of T5 a list.
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


def _configured(name: str, value: str) -> Path:
    folder = Path(value)
    if folder.is_dir():
        if _is_tokenizer(name, folder):
            return folder
        raise LookupError(f"= {value!r}: the folder has no {_KINDS[name]} ({_wanted(name)})")
    if not _HUB_NAME.fullmatch(value):
        raise LookupError(f"= {value!r}: is neither a folder nor a hub name owner/name; set a folder with {_wanted(name)}")
    try:
        return _from_hub(name, value)
    except OSError as error:
        raise LookupError(
            f"= {value!r}: no such folder, and it cannot be downloaded from the hub ({error}); put {_wanted(name)} into a "
            f"folder and set {name}_tokenizer = FOLDER"
        ) from error


def _nearby(name: str, component: Component) -> Path:
    neighbour = (component.folder if component.config is None else component.folder.parent) / FOLDERS[name]
    for folder in (component.folder, neighbour):
        if _is_tokenizer(name, folder):
            return folder
    try:
        return _from_hub(name, HUB_NAMES[name])
    except OSError as error:
        raise LookupError(
            f"not found: put {_wanted(name)} into {neighbour}, or set {name}_tokenizer = FOLDER to one that has them "
            f"(download of {HUB_NAMES[name]}: {error})"
        ) from error


def _from_hub(name: str, hub_name: str) -> Path:
    """Returns the local folder of a tokenizer of the hub, downloading it if necessary. Raises OSError with the reason."""
    from huggingface_hub import snapshot_download  # imported here: local files do not need it
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    repository, inner = "/".join(hub_name.split("/")[:2]), "/".join(hub_name.split("/")[2:])
    patterns = [f"{inner}/{pattern}" for pattern in _TOKENIZER_FILES] if inner else list(_TOKENIZER_FILES)
    try:
        folder = Path(snapshot_download(repository, allow_patterns=patterns)) / inner
    except LocalEntryNotFoundError as error:
        raise OSError("it cannot be reached") from error
    except (HfHubHTTPError, ValueError) as error:
        raise OSError(str(error).strip().split("\n")[0]) from error
    if not _is_tokenizer(name, folder):
        raise OSError(f"{hub_name} has no {_wanted(name)}")
    return folder
