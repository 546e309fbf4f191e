"""A few optimizers of each package in one, two and replicated processes, by the benchmark that runs all of them."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.benchmarks.optimizers import Row, measure, table
from tests.distributed.lab import Lab
from tests.distributed.test_layouts import assert_same_run
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
    *(["torchao.AdamW4bit", "torchao.AdamWFp8"] if is_installed(TORCHAO) else []),
]


@pytest.fixture(scope="module")
def rows() -> Iterator[dict[str, Row]]:
    yield dict(zip(NAMES, measure(NAMES), strict=True))


@pytest.mark.parametrize("name", [name for name in NAMES if name != FAILING])
def test_layouts_give_the_same_weights_and_resuming_is_exact(rows: dict[str, Row], name: str) -> None:
    row = rows[name]
    assert not row.has_failed, row
    assert row.replica_difference < 0.5, "replicas add gradients in another order, and Lion takes their signs"


def test_an_optimizer_that_fails_has_its_error_in_the_table_and_the_rest_still_run(rows: dict[str, Row]) -> None:
    assert rows[FAILING].has_failed
    line = next(line for line in table(list(rows.values())).splitlines() if line.startswith("LBFGS"))
    assert "closure" in line
    assert sum(row.has_failed for row in rows.values()) == 1


@pytest.mark.skipif(not is_installed(TORCHAO), reason="pip install --no-deps torchao==0.18.0")
@pytest.mark.parametrize("name", ["torchao.AdamW8bit", "AdamW4bit", "AdamWFp8"])
def test_a_run_resumes_exactly_from_a_checkpoint_with_low_bit_states(lab: Lab, name: str) -> None:
    changes = {"optimizer.type": name}
    half = lab.run(2, lab.experiment(changes), "--set", "max_steps=4")
    assert_same_run(lab.shared_run(1, changes), lab.run(2, half.experiment, "--resume"))
