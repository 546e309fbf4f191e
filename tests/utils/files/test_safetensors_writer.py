"""Files written in parts are valid safetensors files."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from utils.files import safetensors_writer
from utils.files.safetensors_writer import Entry, create_file, plan_file, write_tensors

TENSORS = {
    "b.weight": torch.randn(3, 5).to(torch.bfloat16),
    "a.weight": torch.randn(2, 2, 1),
    "a.alpha": torch.tensor(0.25),
    "c": torch.randn(7).to(torch.float16),
    "empty": torch.empty(0, 4),
}
ENTRIES = [Entry(key, tensor.dtype, tuple(tensor.shape)) for key, tensor in TENSORS.items()]


def test_parts_may_be_written_in_any_order(tmp_path: Path) -> None:
    path = tmp_path / "file.safetensors"
    layout = plan_file(ENTRIES, {"made by": "hand"})
    create_file(path, layout)
    items = list(TENSORS.items())
    write_tensors(path, layout, reversed(items[:2]))
    write_tensors(path, layout, items[2:])
    read = load_file(path)
    assert read.keys() == TENSORS.keys()
    for key, tensor in TENSORS.items():
        assert read[key].dtype == tensor.dtype
        assert torch.equal(read[key], tensor)
    with safe_open(path, "pt") as file:
        assert file.metadata() == {"format": "pt", "made by": "hand"}


def test_all_tensors_are_aligned() -> None:
    layout = plan_file(ENTRIES, {"x": "odd lengths."})
    for entry in ENTRIES:
        assert layout.starts[entry.key] % entry.dtype.itemsize == 0
    assert len(layout.header) % 8 == 0


def test_a_transposed_tensor_is_written_in_row_major_order(tmp_path: Path) -> None:
    value = torch.arange(6.0).reshape(2, 3).T
    layout = plan_file([Entry("x", torch.float32, (3, 2))], {})
    create_file(tmp_path / "file", layout)
    write_tensors(tmp_path / "file", layout, [("x", value)])
    assert torch.equal(load_file(tmp_path / "file")["x"], value)


def test_a_duplicate_key_raises_an_error() -> None:
    with pytest.raises(ValueError, match=r"named b\.weight"):
        plan_file([*ENTRIES, ENTRIES[0]], {})


def test_a_full_disk_raises_an_error_before_anything_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(safetensors_writer.shutil, "disk_usage", lambda _path: SimpleNamespace(free=10))
    with pytest.raises(OSError, match=r"file needs [\d,]+ bytes, but the disk has only 10 bytes"):
        create_file(tmp_path / "file", plan_file(ENTRIES, {}))
    assert not list(tmp_path.iterdir())
