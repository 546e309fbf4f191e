"""Training gives the numbers and files that it gave when tests/golden/runs was recorded.

On the platform of the record they are compared bit for bit. On another one, sums are rounded differently: then losses and
norms are compared within a tolerance, and of files the names.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.golden.make_runs import KINDS, LAYOUTS, NAMES, Recorder, golden_path
from tests.golden.records import differences, header_of, other_platform, without_metadata

pytestmark = pytest.mark.distributed

TOLERANCES = {"fp32": 1e-4, "bf16": 2e-2}


@pytest.fixture(scope="module")
def recorder(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Recorder:
    return Recorder(tmp_path_factory.mktemp("golden_runs"), tiny_model)


@pytest.mark.parametrize(("kind", "layout"), NAMES)
def test_run_is_reproduced(recorder: Recorder, kind: str, layout: str) -> None:
    golden = golden_path(kind, layout).read_text(encoding="utf-8")
    found = recorder.records(kind)[layout]
    tolerance = TOLERANCES[kind.rpartition("_")[2]]
    reason = other_platform(golden, found)
    rule = f"compared within {tolerance:g}, because {reason}" if reason else "compared bit for bit on the same platform"
    different = differences(without_metadata(golden), without_metadata(found), tolerance if reason else None)
    assert not different, f"{golden_path(kind, layout)}: {rule}:\n" + "\n".join(different[:20])


def test_records_are_those_of_the_runs() -> None:
    expected = {golden_path(kind, layout).name for kind in KINDS for layout in LAYOUTS}
    assert {path.name for path in golden_path("full_fp32", "2_stages").parent.iterdir()} == expected


@pytest.mark.parametrize("kind", KINDS)
def test_stages_do_not_change_results(kind: str) -> None:
    """The records of one and of two stages are equal except for exported files, whose headers contain the layout."""

    def kept(layout: str) -> list[str]:
        lines = golden_path(kind, layout).read_text(encoding="utf-8").splitlines()
        return [line for line in lines if not line.startswith("export ")]

    assert kept("1_process") == kept("2_stages")


def test_comparison_finds_a_changed_number() -> None:
    golden = golden_path("full_fp32", "1_process").read_text(encoding="utf-8")
    assert header_of(golden)["command"] == "python -m tests.golden.make_runs"
    line = next(line for line in golden.splitlines() if line.startswith("step 3 "))
    loss = line.split("loss=")[1].split()[0]
    slightly, clearly = (golden.replace(loss, repr(float(loss) * factor)) for factor in (1 + 1e-12, 1 + 1e-3))
    assert len(differences(golden, slightly, None)) == 1
    assert not differences(golden, slightly, 1e-4)
    assert len(differences(golden, clearly, 1e-4)) == 1
    assert differences(golden, golden.replace("layer_003", "layer_033"), 1e-4)
    assert other_platform(golden, golden) is None
    reason = other_platform(golden, golden.replace("# torch: ", "# torch: other "))
    assert reason is not None and reason.startswith("torch was ")
