"""Helpers for tests of invalid model files."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from models.family import ModelFilesError
from models.sd3.family import SD3Family
from tests import public_files
from tests.model_copies import settings_for
from tests.public_files import Tensors

ENCODER_FOLDERS = public_files.ENCODER_FOLDERS
Change = Callable[[Tensors], None]


def errors_of(model: Path, **changes: Any) -> list[tuple[str, str]]:
    with pytest.raises(ModelFilesError) as caught:
        SD3Family.from_files(settings_for(model, **changes))
    assert all(text and f"{key}: {text}" in str(caught.value) for key, text in caught.value.errors)
    return caught.value.errors


def only_error(key: str, model: Path, **changes: Any) -> str:
    """Returns the message of the only error, which must have this key."""
    ((named, text),) = errors_of(model, **changes)
    assert named == key
    return text


def zeros(*names: str) -> Tensors:
    return {name: torch.zeros(4, 4) for name in names}
