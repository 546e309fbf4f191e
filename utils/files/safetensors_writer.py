"""Writes one safetensors file from several processes, each of which has some of the tensors.

The safetensors library requires all tensors in one process. Here one process writes the header and sets the file size; then
every process writes its tensors at their offsets. Format: header length (8 bytes, little-endian), header (JSON, padded with
spaces), tensors.
"""

from __future__ import annotations

import json
import os
import shutil
import struct
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

_DTYPE_NAMES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}


@dataclass(frozen=True)
class Entry:
    """A tensor of a file that will be written."""

    key: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def num_bytes(self) -> int:
        return self.dtype.itemsize * torch.Size(self.shape).numel()


@dataclass(frozen=True)
class FileLayout:
    """The header of a file and the offsets of its tensors."""

    header: bytes
    starts: Mapping[str, int]
    """Key -> offset of the tensor in the file, in bytes."""
    num_bytes: int


def plan_file(entries: Sequence[Entry], metadata: Mapping[str, str]) -> FileLayout:
    """Returns the layout of a file of these tensors. Raises ValueError for a duplicate key.

    Tensors are sorted by the size of their elements, the largest first, so that all are aligned.
    """
    header: dict[str, object] = {"__metadata__": {"format": "pt", **metadata}}
    offsets: dict[str, int] = {}
    position = 0
    for entry in sorted(entries, key=lambda entry: (-entry.dtype.itemsize, entry.key)):
        if entry.key in offsets:
            raise ValueError(f"two tensors are named {entry.key}")
        header[entry.key] = {
            "dtype": _DTYPE_NAMES[entry.dtype],
            "shape": list(entry.shape),
            "data_offsets": [position, position + entry.num_bytes],
        }
        offsets[entry.key] = position
        position += entry.num_bytes
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    start = 8 + len(text)
    return FileLayout(struct.pack("<Q", len(text)) + text, {k: start + at for k, at in offsets.items()}, start + position)


def create_file(path: Path, layout: FileLayout) -> None:
    """Writes the header and sets the file size. Raises OSError when the disk has too little free space."""
    free = shutil.disk_usage(path.parent).free
    if free < layout.num_bytes:
        raise OSError(f"{path} needs {layout.num_bytes:,} bytes, but the disk has only {free:,} bytes of free space")
    with path.open("wb") as file:
        file.write(layout.header)
        file.truncate(layout.num_bytes)


def write_tensors(path: Path, layout: FileLayout, tensors: Iterable[tuple[str, Tensor]]) -> None:
    """Writes CPU tensors of the planned dtypes at their offsets in a created file, and flushes it to disk."""
    with path.open("r+b") as file:
        for key, value in tensors:
            file.seek(layout.starts[key])
            file.write(value.contiguous().reshape(-1).view(torch.uint8).numpy().data)
        file.flush()
        os.fsync(file.fileno())
