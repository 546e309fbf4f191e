"""Helpers of the command-line tests: write experiments, call main() and catch its exit, damage images and captions."""

from __future__ import annotations

import re
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import pytest

import train
from tests.tiny_model import write_experiment
from utils.report.dataset_gather import BAD_FILES


@dataclass(frozen=True)
class Refusal:
    """Exit code and standard error of main()."""

    exit_code: int
    error: str

    @property
    def errors(self) -> list[str]:
        """The error lines, without the first one and without line numbers, which tests/utils/config/test_lines.py tests."""
        lines = [line for line in self.error.splitlines() if line and not line.startswith("Cannot start: ")]
        return [re.sub(r"(\.toml), line \d+: ", r"\1: ", line) for line in lines]


class Bench:
    """Writes experiments into the test's own folder, and calls main() in this process."""

    def __init__(self, folder: Path, model: Path, dataset: Path, capture: Any, patch: pytest.MonkeyPatch) -> None:
        self.folder, self.model, self.dataset = folder, model, dataset
        self._capture, self._patch = capture, patch

    def experiment(self, **changes: Any) -> Path:
        return write_experiment(self.folder, self.model, changes.pop("images", self.dataset), **changes)

    def main(self, *arguments: str, world_size: int = 1) -> Refusal:
        """Calls train.py ARGUMENTS as rank 0 of several; fails if a process group is started."""
        self._patch.setenv("WORLD_SIZE", str(world_size))
        self._patch.setenv("RANK", "0")
        self._patch.setattr("sys.argv", ["train.py", *arguments])
        self._patch.setattr(train.group, "finish", _exit)
        self._patch.setattr(train.group, "start", lambda: pytest.fail("a process group is started"))
        self._capture.readouterr()
        with pytest.raises(SystemExit) as caught:
            train.main()
        assert isinstance(caught.value.code, int)
        return Refusal(caught.value.code, self._capture.readouterr().err)

    def refused(self, experiment: Path, *arguments: str, world_size: int = 1) -> list[str]:
        """The errors that main() reports. It must exit with 1 and write only the file index and the list of bad files."""
        before = tree(self.folder)
        refusal = self.main("--config", str(experiment), *arguments, world_size=world_size)
        assert refusal.exit_code == 1, refusal.error
        file_index = self.folder / "output" / "cache" / "files"
        bad_files = self.folder / "output" / BAD_FILES
        allowed = {str(path) for path in (file_index, *file_index.parents, *file_index.glob("*.safetensors"), bad_files)}
        assert set(tree(self.folder)) - allowed == set(before) - allowed
        count = len(refusal.errors)
        assert f"Cannot start: {count} error{'s' if count > 1 else ''}:" in refusal.error
        return refusal.errors

    def only_error(self, experiment: Path, *arguments: str, world_size: int = 1) -> str:
        (error,) = self.refused(experiment, *arguments, world_size=world_size)
        return error


def _exit(exit_code: int = 0) -> NoReturn:
    raise SystemExit(exit_code)


def tree(folder: Path) -> list[str]:
    return sorted(str(path) for path in folder.rglob("*"))


# --- damage ------------------------------------------------------------------------------------------------------------


def spoil_caption(folder: Path) -> Path:
    path = folder / "image_001.txt"
    path.write_bytes(b"caf\xe9")
    return path


def cut_off(folder: Path) -> Path:
    path = folder / "image_002.png"
    path.write_bytes(path.read_bytes()[:-40])
    return path


def spoil_pixels(folder: Path) -> Path:
    """Damages the middle of a PNG whose header, checksums and end stay valid: only decoding detects it."""
    path = folder / "image_003.png"
    content = path.read_bytes()
    start = content.index(b"IDAT") + 4
    length = int.from_bytes(content[start - 8 : start - 4], "big")
    garbage = content[start : start + 2] + bytes(length - 2)
    checksum = zlib.crc32(b"IDAT" + garbage).to_bytes(4, "big")
    path.write_bytes(content[:start] + garbage + checksum + content[start + length + 4 :])
    return path
