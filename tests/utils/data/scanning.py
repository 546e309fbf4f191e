"""Dataset files made of arguments, and a look at the folders they name."""

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
    """Of these folders, one [[directory]] each, or of `directory=[{...}]`."""
    directories = [{"path": folder} for folder in folders]
    table = {"resolutions": [32], "num_ar_buckets": 3, "directory": directories, **changes}
    return DatasetConfig.model_validate(table)


class Scan:
    """Scans folders; the file index lies in `folder`, or is kept in memory if there is none."""

    def __init__(self, readers: Readers, folder: Path | None = None) -> None:
        self.readers, self.folder = readers, folder

    def __call__(self, *folders: Path, prefix: str = "", **changes: Any) -> Dataset:
        indexer = DirectoryIndexer(self.readers, FileIndex(self.folder))
        return scan(config_of(*folders, **changes), LATENT.pixel_multiple, indexer, prefix=prefix)


def names(dataset: Dataset) -> list[str]:
    """Of its examples' images, below their directories."""
    return [example.key.partition("/")[2].partition("@")[0] for example in dataset.examples]
