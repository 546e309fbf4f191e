"""Random draws are pure functions of seed, purpose and key."""

from __future__ import annotations

import math
import os
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

from utils import randomness

Draw = Callable[..., Tensor]


def as_tensor(value: object) -> Tensor:
    return torch.as_tensor(value)


DRAWS: dict[str, Draw] = {
    "normal": lambda seed, *key: randomness.normal(seed, *key, shape=(5,)),
    "uniform": lambda seed, *key: as_tensor(randomness.uniform(seed, *key)),
    "fraction": lambda seed, *key: as_tensor(randomness.fraction(seed, *key)),
    "integers": lambda seed, *key: randomness.integers(seed, *key, high=1000, shape=(5,)),
    "permutation": lambda seed, *key: as_tensor(randomness.permutation(seed, *key, length=20)),
    "kaiming_uniform": lambda seed, *key: randomness.kaiming_uniform(seed, *key, shape=(3, 4)),
}


@pytest.mark.parametrize("name", DRAWS)
def test_the_same_key_gives_the_same_draw(name: str) -> None:
    draw = DRAWS[name]
    first = draw(1, "noise", "0/a.png@32", 3, 0)
    draw(1, "something else", 9)
    assert torch.equal(draw(1, "noise", "0/a.png@32", 3, 0), first)


@pytest.mark.parametrize("name", DRAWS)
def test_another_seed_purpose_or_key_gives_another_draw(name: str) -> None:
    draw = DRAWS[name]
    keys = [
        (1, "noise", "a", 3, 0),
        (2, "noise", "a", 3, 0),
        (1, "time", "a", 3, 0),
        (1, "noise", "b", 3, 0),
        (1, "noise", "a", 4, 0),
        (1, "noise", "a", 3, 1),
        (1, "noise", "a", 30),
        (1, "noise", "a3", 0),
        (1, "noise", "a", "3", 0),
    ]
    drawn = {tuple(draw(*key).flatten().tolist()) for key in keys}
    assert len(drawn) == len(keys)


@pytest.mark.parametrize("name", DRAWS)
def test_draws_neither_read_nor_change_the_global_generator(name: str) -> None:
    draw = DRAWS[name]
    torch.manual_seed(0)
    before, first = torch.get_rng_state(), draw(1, "noise", "a")
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(99)
    assert torch.equal(draw(1, "noise", "a"), first)


def test_known_draws_never_change() -> None:
    """A change would silently change the results of every run and of resumed runs."""
    assert randomness.permutation(7, "example order", 0, "32x32", 0, length=6).tolist() == GOLDEN_PERMUTATION
    assert randomness.fraction(7, "hold out", "0/a.png") == GOLDEN_FRACTION
    assert randomness.uniform(7, "time", "0/a.png@32", 0, 0) == GOLDEN_UNIFORM
    torch.testing.assert_close(
        randomness.normal(7, "noise", "0/a.png@32", 0, 0, shape=(3,)), torch.tensor(GOLDEN_NORMAL), rtol=0, atol=1e-6
    )


# python -c "from utils.randomness import *; print(permutation(7, 'example order', 0, '32x32', 0, length=6).tolist(),
#   fraction(7, 'hold out', '0/a.png'), uniform(7, 'time', '0/a.png@32', 0, 0),
#   normal(7, 'noise', '0/a.png@32', 0, 0, shape=(3,)).tolist())"
GOLDEN_PERMUTATION = [4, 5, 0, 3, 1, 2]
GOLDEN_FRACTION = 0.1898770381548328
GOLDEN_UNIFORM = 0.6501398288577676
GOLDEN_NORMAL = [0.19407208263874054, -1.4029022455215454, -1.0226882696151733]


@pytest.mark.parametrize("draw", [randomness.uniform, randomness.fraction])
def test_uniform_draws_are_uniform_in_the_open_interval(draw: Callable[..., float]) -> None:
    drawn = torch.tensor([draw(0, "time", index) for index in range(4000)], dtype=torch.float64)
    assert ((drawn > 0) & (drawn < 1)).all()
    expected = (torch.arange(4000, dtype=torch.float64) + 0.5) / 4000
    assert (drawn.sort().values - expected).abs().max() < 1.63 / math.sqrt(4000)


@pytest.mark.parametrize("integer", [0, 2**53 - 2])
def test_a_uniform_draw_is_never_zero_or_one(monkeypatch: pytest.MonkeyPatch, integer: int) -> None:
    def extreme(high: int, *_arguments: object, **_keywords: object) -> Tensor:
        assert integer < high
        return torch.tensor([integer])

    monkeypatch.setattr(torch, "randint", extreme)
    assert 0 < randomness.uniform(0, "time") < 1


@pytest.mark.parametrize(("number", "expected"), [(0, 0.0), (2**64 - 1, 1 - 2**-53), (2**63, 0.5), (2**11, 2**-53)])
def test_a_fraction_can_be_zero_and_never_one(monkeypatch: pytest.MonkeyPatch, number: int, expected: float) -> None:
    monkeypatch.setattr(randomness, "_number", lambda *_key: number)
    assert randomness.fraction(0, "hold out") == expected


def test_a_key_may_be_a_name_that_is_not_utf8() -> None:
    names = [os.fsdecode(name) for name in (b"\xff.png", b"\xfe.png")]
    assert len({randomness.fraction(0, "crop", name) for name in names}) == 2
    assert len({randomness.uniform(0, "time", name) for name in names}) == 2


def test_normal_draws_have_mean_zero_and_variance_one() -> None:
    drawn = randomness.normal(0, "noise", shape=(100_000,))
    assert drawn.dtype == torch.float32
    assert abs(float(drawn.mean())) < 0.015
    assert abs(float(drawn.var()) - 1) < 0.02


@pytest.mark.parametrize("length", [0, 1, 17])
def test_a_permutation_contains_every_number_once(length: int) -> None:
    drawn = randomness.permutation(0, "order", length=length)
    assert drawn.dtype == np.int64
    assert sorted(drawn.tolist()) == list(range(length))


def test_kaiming_uniform_has_the_range_and_std_of_a_new_linear_layer() -> None:
    drawn = randomness.kaiming_uniform(0, "lora", shape=(64, 400))
    fresh = torch.nn.Linear(400, 64).weight.detach()
    assert drawn.abs().max() <= 1 / 20
    assert drawn.abs().max() > 0.99 / 20
    assert float(drawn.std()) == pytest.approx(float(fresh.std()), rel=0.05)
