"""Registry of model families: type name -> import paths of its settings class and its ModelFamily, one line each."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from models.family import ModelFamily

_FAMILIES = {
    "sd3": ("models.sd3.settings:SD3Settings", "models.sd3.family:SD3Family"),
}


def family_names() -> list[str]:
    """Returns every allowed value of `[model] type`."""
    return sorted(_FAMILIES)


def _load(target: str) -> Any:
    module, _, name = target.partition(":")
    return getattr(importlib.import_module(module), name)


def settings_class(family: str) -> Any:
    """Returns the pydantic class of the `[model]` table of this family. Raises KeyError for an unknown family."""
    return _load(_FAMILIES[family][0])


def family_class(family: str) -> type[ModelFamily]:
    """Returns the ModelFamily subclass of this family, imported on demand. Raises KeyError for an unknown family."""
    found: type[ModelFamily] = _load(_FAMILIES[family][1])
    return found
