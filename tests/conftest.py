"""Fixtures of all tests: the tiny model and its images, made once."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.tiny_model import make_tiny_dataset, make_tiny_model
from utils.data.sources.readers import Readers


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of the tiny model; read-only: tests that change files copy it."""
    return make_tiny_model(tmp_path_factory.mktemp("tiny_model"))


@pytest.fixture(scope="session")
def tiny_dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of twelve captioned images; read-only: tests that change files write their own."""
    return make_tiny_dataset(tmp_path_factory.mktemp("tiny_dataset"))


@pytest.fixture(scope="session")
def readers() -> Iterator[Readers]:
    """One reader process, started at its first use."""
    with Readers(1) as started:
        yield started
