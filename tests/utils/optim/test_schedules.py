"""utils/optim/schedules.py: warm-up and course of the learning rate."""

from __future__ import annotations

import warnings
from typing import Any

import pytest

from utils.config.schema.optimizer import OptimizerConfig
from utils.optim.schedules import LearningRateSchedule, schedule_of

RATE = 1e-3


def make_schedule(**changes: Any) -> LearningRateSchedule:
    return schedule_of(OptimizerConfig(**{"learning_rate": RATE, **changes}))


@pytest.mark.parametrize("scheduler", ["constant", "linear", "cosine"])
def test_the_warm_up_rises_in_equal_steps_to_the_peak(scheduler: str) -> None:
    schedule = make_schedule(lr_warmup_steps=4, lr_scheduler=scheduler)
    rates = [schedule.at(step, 20) for step in range(5)]
    assert rates == pytest.approx([RATE * fraction / 5 for fraction in (1, 2, 3, 4, 5)])


@pytest.mark.parametrize("scheduler", ["linear", "cosine"])
@pytest.mark.parametrize("minimum", [0.0, 0.1])
@pytest.mark.parametrize(("warmup", "num_steps"), [(0, 10), (3, 10), (0, 2), (5, 7)])
def test_the_decay_ends_exactly_at_the_last_step(scheduler: str, minimum: float, warmup: int, num_steps: int) -> None:
    schedule = make_schedule(lr_scheduler=scheduler, lr_min_ratio=minimum, lr_warmup_steps=warmup)
    rates = [schedule.at(step, num_steps) for step in range(num_steps)]
    assert rates[-1] == pytest.approx(minimum * RATE, abs=1e-18)
    assert rates[warmup] == pytest.approx(RATE)
    falling = rates[warmup:]
    assert all(before > after for before, after in zip(falling[:-1], falling[1:], strict=True))
    if num_steps > 2:
        assert rates[-2] > minimum * RATE


def test_cosine_is_half_way_down_in_the_middle() -> None:
    schedule = make_schedule(lr_scheduler="cosine", lr_min_ratio=0.2)
    assert schedule.at(5, 11) == pytest.approx(RATE * 0.6)
    assert schedule.at(2, 11) > RATE * (1 - 0.8 * 0.2)  # flatter than linear at the start


@pytest.mark.parametrize("minimum", [0.0, 0.5])
def test_a_constant_rate_is_constant(minimum: float) -> None:
    schedule = make_schedule(lr_scheduler="constant", lr_min_ratio=minimum)
    assert {schedule.at(step, 10) for step in range(10)} == {RATE}


@pytest.mark.parametrize("scheduler", ["constant", "linear", "cosine"])
@pytest.mark.parametrize(("warmup", "num_steps"), [(0, 1), (10, 5), (5, 5), (4, 5)])
def test_rates_of_very_short_runs_stay_within_bounds(scheduler: str, warmup: int, num_steps: int) -> None:
    schedule = make_schedule(lr_scheduler=scheduler, lr_warmup_steps=warmup)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        rates = [schedule.at(step, num_steps) for step in range(num_steps)]
    assert all(0 < rate <= RATE for rate in rates)


def test_a_group_s_own_peak_scales_the_whole_schedule() -> None:
    config = OptimizerConfig(learning_rate=RATE, lr_scheduler="cosine", lr_warmup_steps=3, lr_min_ratio=0.1)
    own = schedule_of(config, peak=4 * RATE)
    assert [own.at(step, 20) for step in range(20)] == [4 * schedule_of(config).at(step, 20) for step in range(20)]
