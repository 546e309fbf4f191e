"""Loads experiments with changes, and their errors, for the tests of the configuration."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.tiny_model import write_experiment
from utils.config.load import Config, ConfigError, ErrorDetail, load_config

NOWHERE = Path("nowhere")


def write(folder: Path, **changes: Any) -> Path:
    """An experiment whose model files need not exist, because loading does not open them."""
    return write_experiment(folder, NOWHERE, NOWHERE, **changes)


def errors_of(path: Path, *overrides: str) -> list[ErrorDetail]:
    with pytest.raises(ConfigError) as caught:
        load_config(path, overrides)
    assert str(caught.value).splitlines() == [str(error) for error in caught.value.errors]
    return caught.value.errors


def only_error(path: Path, *overrides: str) -> tuple[str, str, str]:
    """(file name, key, message) of the only error."""
    errors = errors_of(path, *overrides)
    assert len(errors) == 1, errors
    (error,) = errors
    return error.file.name, error.key, error.message


def load(folder: Path, *overrides: str, **changes: Any) -> Config:
    return load_config(write(folder, **changes), overrides)
