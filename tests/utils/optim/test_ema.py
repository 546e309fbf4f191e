"""utils/optim/ema.py: the decay of the average of the weights."""

from __future__ import annotations

import pytest

from utils.config.schema.optimizer import EmaConfig
from utils.optim.ema import ema_decay


def test_the_decay_warms_up_to_the_configured_value_and_stays_there() -> None:
    decays = [ema_decay(EmaConfig(decay=0.5), step) for step in range(1, 12)]
    assert decays[:8] == [2 / 11, 3 / 12, 4 / 13, 5 / 14, 6 / 15, 7 / 16, 8 / 17, 9 / 18]
    assert decays[7:] == [0.5] * 4


def test_the_default_decay_is_reached_after_ninety_thousand_steps() -> None:
    assert ema_decay(EmaConfig(), 89_980) < 0.9999
    assert ema_decay(EmaConfig(), 90_000) == 0.9999


@pytest.mark.parametrize("step", [1, 2, 10, 1_000_000])
def test_the_decay_without_warm_up_is_the_same_in_every_step(step: int) -> None:
    assert ema_decay(EmaConfig(decay=0.99, warmup=False), step) == 0.99
