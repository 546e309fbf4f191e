"""Copies of the tiny model that a test may change, and its settings without an experiment file."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

from models.sd3.settings import SD3Settings


def linked_copy(model: Path, folder: Path) -> Path:
    """Copies a folder as links. Before changing a file, unlink it or replace it with `rewrite`."""
    shutil.copytree(model, folder, copy_function=os.symlink)
    return folder


def rewrite(path: Path, text: str) -> None:
    """Replaces a linked file without changing the target of the link."""
    path.unlink(missing_ok=True)
    path.write_text(text, encoding="utf-8")


def settings_for(model: Path, **changes: Any) -> SD3Settings:
    """Returns the `[model]` table of the tiny model with changes."""
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
