"""kill -9 of all ranks during caching: entries of complete shards are kept, and the final cache is the same."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.distributed.kills import (
    CachingExperiment,
    Uninterrupted,
    assert_nothing_was_lost,
    kill_and_restart,
    make_experiment,
    run_uninterrupted,
)

pytestmark = pytest.mark.distributed


@pytest.fixture(scope="module")
def work(tiny_model: Path, tiny_dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> CachingExperiment:
    return make_experiment(tmp_path_factory.mktemp("kills"), tiny_model, tiny_dataset)


@pytest.fixture(scope="module")
def expected(work: CachingExperiment) -> Uninterrupted:
    return run_uninterrupted(work)


@pytest.mark.parametrize("fraction", [0.1, 0.45, 0.8])
def test_caching_continues_after_a_kill_and_gives_the_same_cache(
    work: CachingExperiment, expected: Uninterrupted, fraction: float
) -> None:
    """`python -m tests.benchmarks.kills` kills at thirty random times."""
    outcome = kill_and_restart(work, fraction * expected.seconds)
    assert outcome.entries == expected.entries
    assert_nothing_was_lost(outcome, expected)
