"""Fixtures of the tests of utils/evaluation."""

from __future__ import annotations

from pathlib import Path

import pytest

from utils.config.schema.dataset import DatasetConfig
from utils.data.examples import Example
from utils.data.scan import scan
from utils.data.sources.directory_index import DirectoryIndexer
from utils.data.sources.readers import Readers
from utils.files.file_index import FileIndex


@pytest.fixture(scope="module")
def examples(tiny_dataset: Path, readers: Readers) -> list[Example]:
    """Seven images of three shapes, each at two resolutions."""
    config = DatasetConfig.model_validate(
        {"resolutions": [32, 48], "num_ar_buckets": 3, "directory": [{"path": str(tiny_dataset)}]}
    )
    found = scan(config, 16, DirectoryIndexer(readers, FileIndex(None))).examples
    names = sorted({example.image for example in found})[:7]
    return [example for example in found if example.image in names]
