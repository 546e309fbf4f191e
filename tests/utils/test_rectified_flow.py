"""Identities of the objective, in float64."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from utils import rectified_flow as flow

F64 = torch.float64


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, dtype=F64, generator=torch.Generator().manual_seed(seed))


def test_path_starts_at_the_data_and_ends_at_the_noise() -> None:
    latents, noise = draw(2, 3, 4, 4), draw(2, 3, 4, 4, seed=1)
    assert torch.equal(flow.add_noise(latents, noise, torch.zeros(2, dtype=F64)), latents)
    assert torch.equal(flow.add_noise(latents, noise, torch.ones(2, dtype=F64)), noise)


def test_each_sample_has_its_own_place_on_the_path() -> None:
    latents, noise = torch.zeros(3, 1, 2, 2, dtype=F64), torch.ones(3, 1, 2, 2, dtype=F64)
    noisy = flow.add_noise(latents, noise, torch.tensor([0.1, 0.5, 0.9], dtype=F64))
    assert noisy.flatten(1).unique(dim=1).flatten().tolist() == [0.1, 0.5, 0.9]


def test_target_is_the_derivative_of_the_path() -> None:
    latents, noise = draw(2, 3, 4, 4), draw(2, 3, 4, 4, seed=1)
    sigma = torch.tensor([0.2, 0.7], dtype=F64)

    def path(at: Tensor) -> Tensor:
        return flow.add_noise(latents, noise, at)

    _, derivative = torch.autograd.functional.jvp(path, sigma, torch.ones_like(sigma))
    torch.testing.assert_close(derivative, flow.velocity_target(latents, noise), rtol=0, atol=1e-14)


@pytest.mark.parametrize("shift", [0.3, 1.0, 3.0, 6.0])
def test_shift_keeps_its_ends_and_rises(shift: float) -> None:
    t = torch.linspace(0, 1, 101, dtype=F64)
    sigma = flow.shift_time(t, shift)
    assert sigma[0] == 0
    assert sigma[-1] == pytest.approx(1, abs=1e-15)
    assert (sigma.diff() > 0).all()
    torch.testing.assert_close(sigma, shift * t / (1 + (shift - 1) * t), rtol=1e-14, atol=0)


def test_shift_multiplies_the_odds_of_noise() -> None:
    """The paper's derivation: a shift is a constant added to the logit."""
    t = torch.linspace(0.01, 0.99, 99, dtype=F64)
    moved = torch.logit(flow.shift_time(t, 3.0)) - torch.logit(t)
    torch.testing.assert_close(moved, torch.full_like(t, math.log(3)), rtol=0, atol=1e-12)


def test_shift_of_one_changes_nothing_and_of_three_takes_the_middle_to_three_quarters() -> None:
    t = torch.linspace(0, 1, 11, dtype=F64)
    assert torch.equal(flow.shift_time(t, 1.0), t)
    assert flow.shift_time(torch.tensor(0.5, dtype=F64), 3.0) == 0.75


def test_shifts_compose() -> None:
    t = torch.linspace(0, 1, 11, dtype=F64)
    torch.testing.assert_close(flow.shift_time(flow.shift_time(t, 2.0), 1.5), flow.shift_time(t, 3.0))


def normal_cdf(x: Tensor) -> Tensor:
    return 0.5 * (1 + torch.erf(x / math.sqrt(2)))


def kolmogorov_smirnov(probabilities: Tensor) -> float:
    """Largest distance between the empirical distribution of probabilities and the uniform one."""
    ordered, count = probabilities.sort().values, len(probabilities)
    above = torch.arange(1, count + 1, dtype=F64) / count - ordered
    below = ordered - torch.arange(count, dtype=F64) / count
    return float(torch.maximum(above, below).max())


@pytest.mark.parametrize(("mean", "std"), [(0.0, 1.0), (-0.5, 0.7), (1.0, 2.0)])
def test_logit_normal_times_follow_their_density(mean: float, std: float) -> None:
    count = 20_000
    u = torch.rand(count, dtype=F64, generator=torch.Generator().manual_seed(2))
    t = flow.time_of_draw(u, "logit_normal", mean, std)
    assert ((t > 0) & (t < 1)).all()
    critical = 1.63 / math.sqrt(count)  # 1% level
    assert kolmogorov_smirnov(normal_cdf((torch.logit(t) - mean) / std)) < critical
    assert kolmogorov_smirnov(normal_cdf((torch.logit(t) - mean - 0.1) / std)) > critical


def test_logit_normal_is_the_inverse_of_its_distribution_function() -> None:
    u = torch.linspace(0.001, 0.999, 999, dtype=F64)
    t = flow.time_of_draw(u, "logit_normal", 0.3, 0.8)
    torch.testing.assert_close(normal_cdf((torch.logit(t) - 0.3) / 0.8), u, rtol=0, atol=1e-12)


def test_sigma_sampling_is_the_uniform_draw_itself() -> None:
    u = torch.linspace(0.1, 0.9, 9, dtype=F64)
    assert torch.equal(flow.time_of_draw(u, "sigma", 5.0, 9.0), u)


@pytest.mark.parametrize("u", [2.0**-53, 1 - 2.0**-53])
def test_the_rarest_draws_give_finite_times(u: float) -> None:
    for sampling in ("sigma", "logit_normal"):
        t = flow.time_of_draw(torch.tensor(u, dtype=F64), sampling, 0.0, 1.0)
        assert 0 < t < 1
        assert 0 < flow.shift_time(t, 3.0) <= 1


def test_loss_is_zero_for_the_target_and_a_mean_over_everything_otherwise() -> None:
    target = draw(3, 2, 4, 4)
    assert flow.flow_matching_loss(target, target) == 0
    assert flow.flow_matching_loss(target + 0.5, target) == pytest.approx(0.25)


def test_every_sample_counts_alike_in_the_loss() -> None:
    target = torch.zeros(4, 2, 4, 4)
    losses = []
    for index in range(4):
        velocity = target.clone()
        velocity[index] = 1.0
        losses.append(float(flow.flow_matching_loss(velocity, target)))
    assert losses == [0.25] * 4


def test_loss_is_computed_in_float32_for_a_network_in_bfloat16() -> None:
    velocity = torch.full((1, 1, 1, 1), 256.0, dtype=torch.bfloat16)
    loss = flow.flow_matching_loss(velocity, torch.full((1, 1, 1, 1), 255.0))
    assert loss.dtype == torch.float32
    assert loss == 1  # bfloat16 has no 255
