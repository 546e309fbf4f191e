"""Writing one safetensors file from several processes, each its own tensors at their places.

safetensors' own writer wants every tensor at once, in one process. Here one process writes the header and makes room, then
anyone who knows the layout writes what it has. Format: 8 bytes of little-endian header length, the header as JSON padded
with spaces, the tensors.
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
    """A tensor that a file will have."""

    key: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def num_bytes(self) -> int:
        return self.dtype.itemsize * torch.Size(self.shape).numel()


@dataclass(frozen=True)
class FileLayout:
    """Where everything goes in a file."""

    header: bytes
    starts: Mapping[str, int]
    """Key -> its first byte's place in the file."""
    num_bytes: int


def plan_file(entries: Sequence[Entry], metadata: Mapping[str, str]) -> FileLayout:
    """The layout of a file of these tensors. Raises ValueError when a key is there twice.

    Wider numbers come first, so that everything is aligned.
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
    """Write the header and make the file as long as it will be. Raises OSError when the disk has less than that left."""
    free = shutil.disk_usage(path.parent).free
    if free < layout.num_bytes:
        raise OSError(f"{path} needs {layout.num_bytes:,} bytes, and the disk has {free:,} left")
    with path.open("wb") as file:
        file.write(layout.header)
        file.truncate(layout.num_bytes)


def write_tensors(path: Path, layout: FileLayout, tensors: Iterable[tuple[str, Tensor]]) -> None:
    """Write tensors, on the CPU and in the dtype planned, at their places in a created file, and flush them to the disk."""
    with path.open("r+b") as file:
        for key, value in tensors:
            file.seek(layout.starts[key])
            file.write(value.contiguous().reshape(-1).view(torch.uint8).numpy().data)
        file.flush()
        os.fsync(file.fileno())
