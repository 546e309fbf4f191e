"""Metrics of a run: metrics.jsonl and TensorBoard, in a fresh and in a resumed run folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from utils.tracking.metrics import SMOOTHING, RunLog, StepMetrics


def open_log(folder: Path, **changes: Any) -> RunLog:
    arguments: dict[str, Any] = {"start_step": 0, "num_steps": 10, "global_batch": 4, "tensorboard": False, "is_main": True}
    return RunLog(folder, **{**arguments, **changes})


def metrics(step: int, loss: float = 1.0) -> StepMetrics:
    return StepMetrics(step=step, epoch=0, loss=loss, learning_rate=1e-4, grad_norm=0.5)


def write_steps(folder: Path, first: int, last: int) -> None:
    with open_log(folder, start_step=first - 1) as log:
        for step in range(first, last + 1):
            log.write(metrics(step, loss=1 / step), 0.5)


def lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def comparable(folder: Path) -> list[dict[str, Any]]:
    return [{key: value for key, value in line.items() if key != "images_per_second"} for line in lines(folder)]


def test_each_step_has_a_line_with_every_number(tmp_path: Path) -> None:
    write_steps(tmp_path, 1, 3)
    assert [line["step"] for line in lines(tmp_path)] == [1, 2, 3]
    assert set(lines(tmp_path)[0]) == {
        "step",
        "epoch",
        "loss",
        "learning_rate",
        "grad_norm",
        "loss_smoothed",
        "images_per_second",
    }


def test_line_is_on_disk_as_soon_as_its_step_is_done(tmp_path: Path) -> None:
    with open_log(tmp_path) as log:
        log.write(metrics(1), 0.5)
        assert len(lines(tmp_path)) == 1


def test_resuming_drops_the_lines_after_the_checkpoint(tmp_path: Path) -> None:
    write_steps(tmp_path, 1, 6)
    write_steps(tmp_path, 4, 8)
    assert [line["step"] for line in lines(tmp_path)] == [1, 2, 3, 4, 5, 6, 7, 8]


def test_resumed_file_equals_that_of_an_uninterrupted_run(tmp_path: Path) -> None:
    (tmp_path / "straight").mkdir()
    (tmp_path / "resumed").mkdir()
    write_steps(tmp_path / "straight", 1, 8)
    write_steps(tmp_path / "resumed", 1, 5)
    write_steps(tmp_path / "resumed", 4, 8)
    assert comparable(tmp_path / "resumed") == comparable(tmp_path / "straight")


@pytest.mark.parametrize("rest", ['{"step": 4, "loss": 0.', "\x00\x00\x00"])
def test_partial_last_line_is_dropped(tmp_path: Path, rest: str) -> None:
    write_steps(tmp_path, 1, 3)
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write(rest)
    write_steps(tmp_path, 4, 5)
    assert [line["step"] for line in lines(tmp_path)] == [1, 2, 3, 4, 5]


def test_starting_at_step_0_in_a_used_folder_keeps_no_line(tmp_path: Path) -> None:
    write_steps(tmp_path, 1, 3)
    write_steps(tmp_path, 1, 2)
    assert [line["step"] for line in lines(tmp_path)] == [1, 2]


def test_smoothed_loss_is_unbiased_from_the_first_step_on(tmp_path: Path) -> None:
    with open_log(tmp_path) as log:
        log.write(metrics(1, loss=3.0), 0.5)
        log.write(metrics(2, loss=1.0), 0.5)
    first, second = (line["loss_smoothed"] for line in lines(tmp_path))
    assert first == pytest.approx(3.0)
    assert second == pytest.approx((SMOOTHING * 3.0 + 1.0) / (SMOOTHING + 1))


def test_other_ranks_write_nothing(tmp_path: Path) -> None:
    with open_log(tmp_path, is_main=False, tensorboard=True) as log:
        log.write(metrics(1), 0.5)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("tensorboard", [True, False])
def test_tensorboard_events_are_written_if_configured(tmp_path: Path, tensorboard: bool) -> None:
    with open_log(tmp_path, tensorboard=tensorboard) as log:
        log.write(metrics(1), 0.5)
    assert bool(list(tmp_path.glob("events.out.tfevents.*"))) == tensorboard


def test_throughput_is_that_of_the_step_alone(tmp_path: Path) -> None:
    with open_log(tmp_path) as log:
        log.write(metrics(1), 2.0)
    assert lines(tmp_path)[0]["images_per_second"] == pytest.approx(4 / 2.0)


def test_learning_rates_of_further_groups_have_entries_of_their_own(tmp_path: Path) -> None:
    with open_log(tmp_path) as log:
        log.write(metrics(1), 2.0, {"norms": 3e-5})
    assert lines(tmp_path)[0]["learning_rate_norms"] == 3e-5


def test_distribution_reaches_tensorboard_with_its_fractions(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    fractions = [0.1, 0.2, 0.4, 0.3]
    with open_log(tmp_path, tensorboard=True) as log:
        log.write_distribution("objective/t", 7, fractions)
    events = EventAccumulator(str(tmp_path), size_guidance={"tensors": 0, "histograms": 0}).Reload()
    (written,) = events.Histograms("objective/t")
    assert list(written.histogram_value.bucket) == fractions
    assert list(written.histogram_value.bucket_limit) == [0.25, 0.5, 0.75, 1.0]
    assert written.histogram_value.sum == pytest.approx(0.1 * 0.125 + 0.2 * 0.375 + 0.4 * 0.625 + 0.3 * 0.875)
    assert written.step == 7
