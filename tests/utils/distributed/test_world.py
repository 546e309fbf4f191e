"""Rank information from the environment."""

from __future__ import annotations

import subprocess
import sys

import pytest

from utils.distributed.world import World, world

VARIABLES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "LOCAL_SIZE")


@pytest.fixture(autouse=True)
def no_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)


def test_without_launcher_the_world_is_one_process() -> None:
    assert world() == World(rank=0, local_rank=0, size=1, local_size=1)
    assert world().is_main


@pytest.mark.parametrize("name", ["LOCAL_WORLD_SIZE", "LOCAL_SIZE"])
def test_torchrun_and_deepspeed_name_the_local_size_differently(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    for variable, value in {"RANK": "5", "LOCAL_RANK": "1", "WORLD_SIZE": "8", name: "4"}.items():
        monkeypatch.setenv(variable, value)
    assert world() == World(rank=5, local_rank=1, size=8, local_size=4)
    assert not world().is_main


def test_without_local_size_all_processes_are_on_one_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "3")
    assert world().local_size == 3


def test_reading_the_world_does_not_import_torch() -> None:
    code = "import sys, utils.distributed.world; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
