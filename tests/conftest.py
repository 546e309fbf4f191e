"""Fixtures of all tests: the tiny model and its pictures, made once."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.tiny_model import make_tiny_dataset, make_tiny_model


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of the tiny model. Read only: tests that change files copy it."""
    return make_tiny_model(tmp_path_factory.mktemp("tiny_model"))


@pytest.fixture(scope="session")
def tiny_dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of twelve captioned pictures. Read only: tests that change files write their own."""
    return make_tiny_dataset(tmp_path_factory.mktemp("tiny_dataset"))
