"""utils/optim/schedules.py: warm-up and course of the learning rate."""

from __future__ import annotations

import warnings
from typing import Any

import pytest

from utils.config.schema.optimizer import OptimizerConfig, OptimizerGroupConfig
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
    own = schedule_of(config, OptimizerGroupConfig(name="own", pattern=".*", lr_mult=4.0))
    assert [own.at(step, 20) for step in range(20)] == [4 * schedule_of(config).at(step, 20) for step in range(20)]


# --- further courses ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scheduler", ["cosine_with_restarts", "polynomial", "warmup_stable_decay"])
@pytest.mark.parametrize("minimum", [0.0, 0.1])
@pytest.mark.parametrize(("warmup", "num_steps"), [(0, 10), (3, 40), (0, 2), (0.25, 40)])
def test_every_course_starts_at_the_peak_and_ends_at_the_minimum(
    scheduler: str, minimum: float, warmup: float, num_steps: int
) -> None:
    schedule = make_schedule(lr_scheduler=scheduler, lr_min_ratio=minimum, lr_warmup_steps=warmup, lr_cycles=3)
    rates = [schedule.at(step, num_steps) for step in range(num_steps)]
    assert rates[-1] == pytest.approx(minimum * RATE, abs=1e-18)
    assert rates[round(warmup * num_steps) if isinstance(warmup, float) else warmup] == pytest.approx(RATE)
    assert all(minimum * RATE - 1e-18 <= rate <= RATE * (1 + 1e-12) for rate in rates[10:])


def test_a_warm_up_may_be_a_fraction_of_all_steps() -> None:
    by_steps, by_fraction = make_schedule(lr_warmup_steps=5), make_schedule(lr_warmup_steps=0.1)
    assert [by_steps.at(step, 50) for step in range(50)] == [by_fraction.at(step, 50) for step in range(50)]
    assert by_fraction.at(5, 100) < RATE


def test_restarts_repeat_the_cosine() -> None:
    schedule = make_schedule(lr_scheduler="cosine_with_restarts", lr_cycles=4)
    rates = [schedule.at(step, 41) for step in range(41)]
    for start in (10, 20, 30):
        assert rates[start : start + 10] == pytest.approx(rates[:10])
    assert rates[0] == RATE and rates[5] == pytest.approx(RATE / 2) and rates[40] == pytest.approx(0, abs=1e-18)


def test_polynomial_is_the_power_of_the_linear_course() -> None:
    linear, cubic = make_schedule(lr_scheduler="linear"), make_schedule(lr_scheduler="polynomial", lr_power=3.0)
    for step in range(20):
        assert cubic.at(step, 20) == pytest.approx(RATE * (linear.at(step, 20) / RATE) ** 3)


def test_inverse_square_root_halves_after_four_times_the_warm_up() -> None:
    schedule = make_schedule(lr_scheduler="inverse_sqrt", lr_warmup_steps=10)
    assert [schedule.at(step, 1000) for step in (10, 40, 90)] == pytest.approx([RATE, RATE / 2, RATE / 3])
    without = make_schedule(lr_scheduler="inverse_sqrt")
    assert [without.at(step, 1000) for step in (0, 3)] == pytest.approx([RATE, RATE / 2])


def test_stable_decay_is_constant_before_its_last_steps() -> None:
    schedule = make_schedule(lr_scheduler="warmup_stable_decay", lr_warmup_steps=5, lr_decay_steps=10)
    rates = [schedule.at(step, 100) for step in range(100)]
    assert rates[5:90] == [RATE] * 85
    assert rates[89:] == pytest.approx([RATE * left / 10 for left in range(10, -1, -1)])
