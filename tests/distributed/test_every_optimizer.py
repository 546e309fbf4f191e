"""A few optimizers of each package in one, two and replicated processes, by the benchmark that runs all of them."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.benchmarks.optimizers import Row, measure, table
from utils.optim.registry import TORCHAO, is_installed

pytestmark = pytest.mark.distributed

FAILING = "torch.optim.LBFGS"
"""It is refused, because its step needs a function that evaluates the loss."""
NAMES = [
    "torch.optim.AdamW",
    FAILING,
    "torch.optim.Adafactor",
    "schedulefree.RAdamScheduleFree",
    "pytorch_optimizer.lion",
    "pytorch_optimizer.came",
    "pytorch_optimizer.muon",
    *(["torchao.AdamW4bit"] if is_installed(TORCHAO) else []),
]


@pytest.fixture(scope="module")
def rows() -> Iterator[dict[str, Row]]:
    yield dict(zip(NAMES, measure(NAMES), strict=True))


@pytest.mark.parametrize("name", [name for name in NAMES if name != FAILING])
def test_layouts_give_the_same_weights_and_resuming_is_exact(rows: dict[str, Row], name: str) -> None:
    row = rows[name]
    assert not row.has_failed, row
    assert row.replica_difference < 0.1, "replicas add gradients in another order"


def test_an_optimizer_that_fails_has_its_error_in_the_table_and_the_rest_still_run(rows: dict[str, Row]) -> None:
    assert rows[FAILING].has_failed
    line = next(line for line in table(list(rows.values())).splitlines() if line.startswith("LBFGS"))
    assert "closure" in line
    assert sum(row.has_failed for row in rows.values()) == 1
