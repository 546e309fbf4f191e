"""Registry of model families: type name -> where its settings and adapter live. One line a family."""

from __future__ import annotations

import importlib
from typing import Any

_FAMILIES = {
    "sd3": ("models.sd3.settings:SD3Settings", "models.sd3.family:SD3Family"),
}


def family_names() -> list[str]:
    """Every value that `[model] type` may have."""
    return sorted(_FAMILIES)


def _load(target: str) -> Any:
    module, _, name = target.partition(":")
    return getattr(importlib.import_module(module), name)


def settings_class(family: str) -> Any:
    """The pydantic class of the `[model]` table of this family. Raises KeyError for an unknown family."""
    return _load(_FAMILIES[family][0])


def family_class(family: str) -> Any:
    """The ModelFamily of this family; imported only when asked for. Raises KeyError for an unknown family."""
    return _load(_FAMILIES[family][1])
