"""Prodigy: equal to the package prodigyopt, and to itself however the parameters are distributed."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from utils.optim.prodigy import Prodigy

SHAPES = ((12, 5), (7,), (3, 3, 2))
NUM_STEPS = 60


class Problem:
    """Weights on a noisy quadratic."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(3)
        self.weights = [nn.Parameter(torch.randn(shape, generator=generator)) for shape in SHAPES]

    def set_gradients(self, step: int) -> None:
        generator = torch.Generator().manual_seed(step)
        for weight in self.weights:
            weight.grad = weight.detach() - 0.3 + 0.1 * torch.randn(weight.shape, generator=generator)

    def values(self) -> list[Tensor]:
        return [weight.detach() for weight in self.weights]


CASES: list[dict[str, Any]] = [
    {},
    {"weight_decay": 0.1, "d_coef": 2.0},
    {"weight_decay": 0.1, "decouple": False, "use_bias_correction": True},
    {"safeguard_warmup": True, "growth_rate": 1.5, "betas": (0.8, 0.9), "beta3": 0.95},
]


@pytest.mark.parametrize("arguments", CASES)
def test_weights_and_d_equal_those_of_prodigyopt(arguments: dict[str, Any]) -> None:
    prodigyopt = pytest.importorskip("prodigyopt")
    own, other = Problem(), Problem()
    optimizer, reference = Prodigy(own.weights, **arguments), prodigyopt.Prodigy(other.weights, **arguments)
    for step in range(NUM_STEPS):
        own.set_gradients(step)
        other.set_gradients(step)
        optimizer.step()
        reference.step()
    d = float(optimizer.state[own.weights[0]]["d"])
    assert d == pytest.approx(float(reference.param_groups[0]["d"]), rel=1e-4)
    assert d > 100 * 1e-6, "it has grown"
    torch.testing.assert_close(own.values(), other.values(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("parts", [((0,), (1, 2)), ((2, 0), (1,)), ((0,), (1,), (2,))])
def test_parts_with_exchanged_sums_equal_the_whole_bitwise(parts: tuple[tuple[int, ...], ...]) -> None:
    whole, cut = Problem(), Problem()
    optimizer = Prodigy(whole.weights)
    optimizers = [Prodigy([cut.weights[index] for index in part]) for part in parts]
    for step in range(NUM_STEPS):
        whole.set_gradients(step)
        cut.set_gradients(step)
        optimizer.step()
        rows = torch.zeros(len(SHAPES), Prodigy.num_sums, dtype=torch.float64)
        for part, one in zip(parts, optimizers, strict=True):
            rows[list(part)] = one.sums()
        for one in optimizers:
            one.finish(rows.sum(dim=0).tolist())
    assert all(torch.equal(*pair) for pair in zip(whole.values(), cut.values(), strict=True))
