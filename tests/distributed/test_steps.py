"""Steps that are refused, and pipelines that are closed, on two stages. See step_ranks.py."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.distributed.launch import start_ranks
from tests.distributed.step_ranks import CHECKS

pytestmark = pytest.mark.distributed


@pytest.mark.parametrize("check", CHECKS)
def test_every_rank_passes(check: str, tmp_path: Path) -> None:
    finished = start_ranks(2, [check], tmp_path / "log.txt", module="tests.distributed.step_ranks").wait()
    assert finished.exit_code == 0, finished.output
