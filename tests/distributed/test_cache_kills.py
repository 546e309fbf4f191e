"""kill -9 of every rank of a caching pass: nothing is lost but what was being collected, and nothing is ever wrong."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.distributed.kills import Pass, Undisturbed, assert_nothing_was_lost, kill_and_go_on, make_pass, undisturbed

pytestmark = pytest.mark.distributed


@pytest.fixture(scope="module")
def work(tiny_model: Path, tiny_dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Pass:
    return make_pass(tmp_path_factory.mktemp("kills"), tiny_model, tiny_dataset)


@pytest.fixture(scope="module")
def whole(work: Pass) -> Undisturbed:
    return undisturbed(work)


@pytest.mark.parametrize("share", [0.1, 0.45, 0.8])
def test_a_killed_pass_goes_on_to_the_same_cache(work: Pass, whole: Undisturbed, share: float) -> None:
    """`python -m tests.benchmarks.kills` does it at thirty random moments."""
    outcome = kill_and_go_on(work, share * whole.seconds)
    assert outcome.entries == whole.entries
    assert_nothing_was_lost(outcome, whole)
