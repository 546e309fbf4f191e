"""Builds dataset configurations from arguments and scans their folders."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from models.family import LatentSpec
from utils.config.schema.dataset import DatasetConfig
from utils.data.dataset import Dataset
from utils.data.scan import scan
from utils.data.sources.directory_index import DirectoryIndexer
from utils.data.sources.readers import Readers
from utils.files.file_index import FileIndex

LATENT = LatentSpec(channels=16, downscale=8, patch=2, max_side_pixels=256)


def config_of(*folders: Path, **changes: Any) -> DatasetConfig:
    """Builds the configuration with one [[directory]] per folder, or with `directory=[{...}]`."""
    directories = [{"path": folder} for folder in folders]
    table = {"resolutions": [32], "num_ar_buckets": 3, "directory": directories, **changes}
    return DatasetConfig.model_validate(table)


class Scan:
    """Scans folders; the file index is stored in `folder`, or only in memory if it is None."""

    def __init__(self, readers: Readers, folder: Path | None = None) -> None:
        self.readers, self.folder = readers, folder

    def __call__(self, *folders: Path, prefix: str = "", **changes: Any) -> Dataset:
        indexer = DirectoryIndexer(self.readers, FileIndex(self.folder))
        return scan(config_of(*folders, **changes), LATENT.pixel_multiple, indexer, prefix=prefix)


def names(dataset: Dataset) -> list[str]:
    """Returns the image names of the examples, relative to their directories."""
    return [example.key.partition("/")[2].partition("@")[0] for example in dataset.examples]
