"""Copies of the tiny model that a test may change, and its settings without any experiment file."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

from models.sd3.settings import SD3Settings


def linked_copy(model: Path, folder: Path) -> Path:
    """The same folder made of links: unlink a file, or rewrite it with `rewrite`, before changing it."""
    shutil.copytree(model, folder, copy_function=os.symlink)
    return folder


def rewrite(path: Path, text: str) -> None:
    """Replace a linked file, leaving what it was linked to alone."""
    path.unlink(missing_ok=True)
    path.write_text(text, encoding="utf-8")


def settings_for(model: Path, **changes: Any) -> SD3Settings:
    """`[model]` of the tiny model with changes."""
    values: dict[str, Any] = {
        "type": "sd3",
        "mmdit": model / "mmdit.safetensors",
        "vae": model / "vae",
        "clip_l": model / "text_encoder",
        "clip_g": model / "text_encoder_2",
        "t5xxl": model / "text_encoder_3",
        "dtype": "float32",
        "clip_max_token_length": 8,
        "t5xxl_max_token_length": 8,
    }
    return SD3Settings(**{**values, **changes})
