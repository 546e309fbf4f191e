"""Fixtures of the tests of data."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.utils.data.caching import CachingSetup
from tests.utils.data.scanning import Scan
from utils.data.sources.readers import Readers


@pytest.fixture
def scan_folders(readers: Readers) -> Scan:
    """Looks at folders and remembers nothing."""
    return Scan(readers)


@pytest.fixture
def caching(tmp_path: Path, readers: Readers, monkeypatch: pytest.MonkeyPatch) -> CachingSetup:
    return CachingSetup(tmp_path, readers, monkeypatch)
