"""Fixtures of all tests: the tiny model and its images, made once."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.tiny_model import make_tiny_dataset, make_tiny_model
from utils.data.sources.readers import Readers


@pytest.fixture(scope="session")
def common_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A temporary folder that all test workers have in common."""
    own = tmp_path_factory.getbasetemp()
    return own.parent if "PYTEST_XDIST_WORKER" in os.environ else own


def made_once(folder: Path, make: Callable[[Path], Path]) -> Path:
    """Returns the folder, which the first worker that asks for it makes."""
    finished = folder.with_suffix(".made")
    with folder.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not finished.exists():
            make(folder)
            finished.touch()
    return folder


@pytest.fixture(scope="session")
def tiny_model(common_folder: Path) -> Path:
    """Folder of the tiny model; read-only: tests that change files copy it."""
    return made_once(common_folder / "tiny_model", make_tiny_model)


@pytest.fixture(scope="session")
def tiny_dataset(common_folder: Path) -> Path:
    """Folder of twelve captioned images; read-only: tests that change files write their own."""
    return made_once(common_folder / "tiny_dataset", make_tiny_dataset)


@pytest.fixture(scope="session")
def readers() -> Iterator[Readers]:
    """One reader process, started at its first use."""
    with Readers(1) as started:
        yield started
