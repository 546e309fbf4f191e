"""Fixtures for the tests of utils/data."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.utils.data.caching import CachingSetup
from tests.utils.data.scanning import Scan
from utils.data.sources.readers import Readers


@pytest.fixture
def scan_folders(readers: Readers) -> Scan:
    """Scans folders without storing a file index."""
    return Scan(readers)


@pytest.fixture
def caching(tmp_path: Path, readers: Readers, monkeypatch: pytest.MonkeyPatch) -> CachingSetup:
    return CachingSetup(tmp_path, readers, monkeypatch)
