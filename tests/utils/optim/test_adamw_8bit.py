"""AdamW with 8-bit moments: codes, and updates beside torch's AdamW."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from utils.optim.adamw_8bit import AdamW8bit, decode_positive, decode_signed, encode_positive, encode_signed

NUM_STEPS = 60


def train(kind: type[torch.optim.Optimizer], shape: tuple[int, ...]) -> tuple[Tensor, Tensor, torch.optim.Optimizer]:
    """(weights at the start, weights at the end, optimizer) of a noisy quadratic with curvatures from 1 to 10."""
    generator = torch.Generator().manual_seed(0)
    weight = nn.Parameter(torch.randn(shape, generator=generator))
    start, curvature = weight.detach().clone(), 10 ** torch.rand(shape, generator=generator)
    optimizer = kind([weight], lr=1e-2, weight_decay=0.1)  # type: ignore[call-arg]
    for _ in range(NUM_STEPS):
        weight.grad = curvature * (weight.detach() + 0.1 * torch.randn(shape, generator=generator))
        optimizer.step()
    return start, weight.detach(), optimizer


def test_small_parameters_are_updated_as_by_torch() -> None:
    _, expected, _ = train(torch.optim.AdamW, (63, 64))
    _, found, _ = train(AdamW8bit, (63, 64))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("shape", [(64, 64), (100, 77), (8, 16, 7, 9)])
def test_weights_are_near_those_of_torch_relative_to_their_way(shape: tuple[int, ...]) -> None:
    start, expected, _ = train(torch.optim.AdamW, shape)
    _, found, _ = train(AdamW8bit, shape)
    error = (found - expected).norm() / (expected - start).norm()
    assert 0 < error < 0.03


def test_state_takes_two_bytes_per_weight_and_a_scale_per_block() -> None:
    _, _, optimizer = train(AdamW8bit, (512, 512))
    (state,) = optimizer.state.values()
    size = sum(tensor.nbytes for tensor in state.values())
    assert size == 2 * 512 * 512 * (1 + 4 / 256) + 4


@pytest.mark.parametrize("exponent", [-30, 0, 10])
def test_codes_keep_sign_and_size_of_values(exponent: int) -> None:
    values = torch.randn(5, 1000, generator=torch.Generator().manual_seed(1)) * 10.0**exponent
    decoded = decode_signed(*encode_signed(values), values.shape)
    assert ((decoded - values).abs() <= values.abs().max() / 100).all()
    assert (decoded * values >= 0).all()
    squares = values.square().clamp(min=1e-38)
    positive = decode_positive(*encode_positive(squares), values.shape)
    assert (positive > 0).all()
    large = squares > 1e-4 * squares.max()
    assert ((positive / squares)[large] - 1).abs().max() < 0.25


def test_zeros_stay_zero() -> None:
    zeros = torch.zeros(3, 300)
    assert torch.equal(decode_signed(*encode_signed(zeros), zeros.shape), zeros)
    assert torch.equal(decode_positive(*encode_positive(zeros), zeros.shape), zeros)
