"""Fixtures for tests of the SD3 family."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tests import public_files
from tests.model_copies import linked_copy
from tests.public_files import Tensors, original_part


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """Uses one thread: for matrices this small a second thread only adds waiting time."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def model(tiny_model: Path, tmp_path: Path) -> Path:
    """A copy of the tiny model, made of links, that a test may change."""
    return linked_copy(tiny_model, tmp_path / "model")


@pytest.fixture(scope="module")
def native(tiny_model: Path) -> Tensors:
    """The network's tensors under native names."""
    return original_part(tiny_model, "mmdit")


@pytest.fixture(scope="module")
def renamed(native: Tensors) -> Tensors:
    """The network's tensors under diffusers' names."""
    return public_files.diffusers_tensors(native)
