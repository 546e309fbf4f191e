"""Rounding of float32 weights to bfloat16: exactly reversible with a remainder, or right on average."""

from __future__ import annotations

import torch

from utils.optim.rounding import NUM_RANDOM, join, round_at_random, split
from utils.randomness import device_integers


def all_kinds_of_numbers() -> torch.Tensor:
    """A million float32 numbers of every exponent but the last, which overflow, with all halfway cases of some of them."""
    generator = torch.Generator().manual_seed(0)
    bits = torch.randint(-(2**31), 2**31, (2**20,), generator=generator).to(torch.int32)
    halfway = (torch.arange(-(2**15), 2**15, dtype=torch.int32) << 16) | 0x8000
    numbers = torch.cat([bits, halfway, halfway - 1, halfway + 1, torch.zeros(1, dtype=torch.int32)]).view(torch.float32)
    return numbers[numbers.abs() < 3e38]


def test_the_remainder_gives_the_float32_number_back() -> None:
    numbers = all_kinds_of_numbers()
    rounded, remainder = split(numbers)
    assert (rounded.dtype, remainder.dtype) == (torch.bfloat16, torch.int16)
    assert torch.equal(join(rounded, remainder).view(torch.int32), numbers.view(torch.int32))


def test_rounding_is_to_the_nearest() -> None:
    numbers = all_kinds_of_numbers()
    rounded, nearest = split(numbers)[0], numbers.bfloat16()
    different = rounded != nearest
    assert different.float().mean() < 0.1
    assert torch.equal(  # halfway cases alone
        (rounded[different].double() - numbers[different].double()).abs(),
        (nearest[different].double() - numbers[different].double()).abs(),
    )


def test_random_rounding_is_right_on_average_and_repeatable() -> None:
    number = torch.full((2**20,), 1 + 0.3 * 2**-7)
    drawn = device_integers(0, "rounding", "weight", 3, high=NUM_RANDOM, like=number)
    rounded = round_at_random(number, drawn).float()
    assert set(rounded.tolist()) == {1.0, 1 + 2**-7}
    assert abs(float(rounded.double().mean()) - float(number[0])) < 2e-3 * 2**-7 * 4
    again = device_integers(0, "rounding", "weight", 3, high=NUM_RANDOM, like=number)
    other = device_integers(0, "rounding", "weight", 4, high=NUM_RANDOM, like=number)
    assert torch.equal(drawn, again)
    assert not torch.equal(drawn, other)


def test_random_rounding_keeps_exact_numbers() -> None:
    numbers = torch.randn(1000, generator=torch.Generator().manual_seed(1)).bfloat16()
    drawn = torch.full((1000,), NUM_RANDOM - 1, dtype=torch.int32)
    assert torch.equal(round_at_random(numbers.float(), drawn), numbers)
