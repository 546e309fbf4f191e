"""utils/objective/rectified_flow.py: identities of path, shift and predictions, in float64."""

from __future__ import annotations

import math
from typing import get_args

import pytest
import torch
from torch import Tensor

from utils.config.schema.objective_choices import PredictionType
from utils.objective import rectified_flow as flow

F64 = torch.float64


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, dtype=F64, generator=torch.Generator().manual_seed(seed))


def test_path_starts_at_the_data_and_ends_at_the_noise() -> None:
    latents, noise = draw(2, 3, 4, 4), draw(2, 3, 4, 4, seed=1)
    assert torch.equal(flow.add_noise(latents, noise, torch.zeros(2, dtype=F64)), latents)
    assert torch.equal(flow.add_noise(latents, noise, torch.ones(2, dtype=F64)), noise)


def test_each_row_of_a_batch_has_its_own_sigma() -> None:
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
def test_shift_maps_0_to_0_and_1_to_1_and_increases(shift: float) -> None:
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


def test_shift_1_changes_nothing_and_shift_3_maps_one_half_to_three_quarters() -> None:
    t = torch.linspace(0, 1, 11, dtype=F64)
    assert torch.equal(flow.shift_time(t, 1.0), t)
    assert flow.shift_time(torch.tensor(0.5, dtype=F64), 3.0) == 0.75


def test_shifts_compose() -> None:
    t = torch.linspace(0, 1, 11, dtype=F64)
    torch.testing.assert_close(flow.shift_time(flow.shift_time(t, 2.0), 1.5), flow.shift_time(t, 3.0))


# --- prediction types --------------------------------------------------------------------------------------------------

PREDICTION_TYPES: list[PredictionType] = list(get_args(PredictionType))


@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
def test_velocity_of_inverts_output_of(prediction_type: PredictionType) -> None:
    velocity, noisy = draw(2, 3, 4, 4), draw(2, 3, 4, 4, seed=1)
    output = flow.output_of(velocity, noisy, prediction_type)
    torch.testing.assert_close(flow.velocity_of(output, noisy, prediction_type), velocity, rtol=0, atol=1e-15)


def test_output_is_the_velocity_except_for_additive() -> None:
    output, noisy = draw(2, 3, 4, 4), draw(2, 3, 4, 4, seed=1)
    assert torch.equal(flow.velocity_of(output, noisy, "raw"), output)
    assert torch.equal(flow.velocity_of(output, noisy, "sigma_scaled"), output)
    assert torch.equal(flow.velocity_of(output, noisy, "additive"), output + noisy)


def test_sigma_scaled_error_is_the_error_of_the_clean_latents() -> None:
    """(prediction - z)^2 = sigma^2 (v - v*)^2, with prediction = x_t - sigma v."""
    latents, noise, velocity = draw(4, 3, 4, 4), draw(4, 3, 4, 4, seed=1), draw(4, 3, 4, 4, seed=2)
    sigma = torch.tensor([0.0, 0.001, 0.6, 1.0], dtype=F64)
    prediction = flow.add_noise(latents, noise, sigma) - sigma[:, None, None, None] * velocity
    scale = flow.error_scale(sigma, "sigma_scaled")[:, None, None, None]
    error = scale * (velocity - flow.velocity_target(latents, noise))
    torch.testing.assert_close(error.square(), (prediction - latents).square(), rtol=1e-9, atol=1e-14)


def test_other_prediction_types_compare_velocities() -> None:
    sigma = torch.tensor([0.0, 0.3, 1.0], dtype=F64)
    for prediction_type in ("raw", "additive"):
        assert flow.error_scale(sigma, prediction_type).tolist() == [1, 1, 1]
