"""Runs that the tests of this folder share."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.distributed.lab import Lab


@pytest.fixture(scope="session")
def lab(tiny_model: Path, tiny_dataset: Path, common_folder: Path) -> Lab:
    return Lab(tiny_model, tiny_dataset, common_folder / "lab")
