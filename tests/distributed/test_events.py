"""Events of a run: density of t in TensorBoard, evaluations, run page, state in checkpoints."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch

from tests.distributed.lab import Lab
from tests.utils.objective.sd3_objective import sd3_objective
from utils.evaluation.results import EVALUATIONS, read_evaluations

pytestmark = pytest.mark.distributed

OBJECTIVE: dict[str, Any] = {"weighting_scheme": "mode", "mode_mean": 0.3, "discrete_flow_shift": 2.0}


def test_curves_and_run_page_have_the_density_and_every_evaluation(lab: Lab) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    changes = {
        "objective": OBJECTIVE,
        "eval": {"holdout_images": 3, "every_n_steps": 2},
        "monitoring": {"tensorboard": True, "report": True},
        "max_steps": 4,
    }
    run = lab.shared_run(2, changes)
    events = EventAccumulator(str(run.folder), size_guidance={"histograms": 0, "scalars": 0}).Reload()
    (times,) = events.Histograms("objective/t")
    sampler = sd3_objective(**OBJECTIVE).sampler(2.0)
    drawn = sampler.draw((torch.arange(100_000, dtype=torch.float64) + 0.5) / 100_000)
    fractions = torch.tensor(times.histogram_value.bucket, dtype=torch.float64)
    torch.testing.assert_close(fractions, torch.histc(drawn, len(fractions), 0, 1) / 100_000, rtol=0, atol=1e-4)
    (sigmas,) = events.Histograms("objective/sigma")
    shifted = torch.histc(2 * drawn / (1 + drawn), len(fractions), 0, 1) / 100_000
    torch.testing.assert_close(torch.tensor(sigmas.histogram_value.bucket).double(), shifted, rtol=0, atol=1e-4)
    recorded = read_evaluations(run.folder / EVALUATIONS)
    curve = [(point.step, point.value) for point in events.Scalars("eval/loss")]
    assert [step for step, _ in curve] == [0, 2, 4]
    assert [value for _, value in curve] == pytest.approx([result.loss for result in recorded])
    page = (run.folder / "report.html").read_text(encoding="utf-8")
    assert "mode by sampling" in page
    assert "objective        " in run.output and "loss weight mode by sampling" in run.output
    assert "evaluation on holdout" in run.output


def test_no_run_page_is_written_unless_wanted(lab: Lab) -> None:
    assert not (lab.shared_run(2, {}).folder / "report.html").exists()


def test_lost_evaluations_do_not_make_a_worse_step_the_best(lab: Lab) -> None:
    """The best loss is in the checkpoint too: without evaluations.jsonl, a resumed run still compares with it."""
    changes = {
        "eval": {"holdout_images": 3, "every_n_steps": 2, "keep_best": True},
        "optimizer.learning_rate": 1e-3,
        "save.checkpoint_every_n_steps": 2,
    }
    run = lab.run(1, lab.experiment(changes), "--set", "max_steps=2")
    (state,) = (run.folder / "checkpoints").glob("step_000002/state.json")
    saved = json.loads(state.read_text(encoding="utf-8"))
    assert saved["events"]["log"]["minutes"] > 0
    best = saved["events"]["evaluate"]
    recorded = read_evaluations(run.folder / EVALUATIONS)
    assert best["loss"] == min(result.loss for result in recorded)
    saved["events"]["evaluate"]["loss"] = 0.0  # no later loss is lower
    state.write_text(json.dumps(saved), encoding="utf-8")
    (run.folder / EVALUATIONS).unlink()
    resumed = lab.run(1, run.experiment, "--resume", "--set", "max_steps=4")
    assert not [path for path in (resumed.folder / "best").glob("*") if path.name > "step_000002"]
