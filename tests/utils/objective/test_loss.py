"""utils/objective/loss.py: penalties against their published forms; masks and weights of rows."""

from __future__ import annotations

import math
from typing import Any, get_args

import pytest
import torch

from tests.utils.objective.sd3_objective import sd3_objective
from utils.config.schema.objective_choices import LossType
from utils.objective import rectified_flow
from utils.objective.loss import LossTarget, penalty
from utils.objective.objective import Objective

F64 = torch.float64


# --- penalties ---------------------------------------------------------------------------------------------------------


def test_penalties_agree_with_their_published_formulas() -> None:
    for error in (-7.0, -0.3, 0.0, 1e-3, 0.1, 2.0):
        for c in (0.05, 0.1, 3.0):
            tensor = torch.tensor(error, dtype=F64)
            assert penalty(tensor, "l2", c) == error**2
            root = math.sqrt(error * error + c * c)
            assert penalty(tensor, "huber", c) == pytest.approx(2 * c * (root - c), rel=1e-8, abs=1e-18)
            assert penalty(tensor, "smooth_l1", c) == pytest.approx(2 * (root - c), rel=1e-8, abs=1e-18)


def test_huber_penalties_are_quadratic_for_small_and_linear_for_large_errors() -> None:
    c = 0.1
    small, large = torch.tensor([-1e-4, 2e-4], dtype=F64), torch.tensor([-1e4, 3e4], dtype=F64)
    torch.testing.assert_close(penalty(small, "huber", c), small**2, rtol=1e-5, atol=0)
    torch.testing.assert_close(penalty(small, "smooth_l1", c), small**2 / c, rtol=1e-5, atol=0)
    torch.testing.assert_close(penalty(large, "huber", c), 2 * c * large.abs(), rtol=1e-4, atol=0)
    torch.testing.assert_close(penalty(large, "smooth_l1", c), 2 * large.abs(), rtol=1e-4, atol=0)


@pytest.mark.parametrize("loss_type", get_args(LossType))
@pytest.mark.parametrize("dtype", [torch.float32, F64])
def test_penalty_has_a_finite_gradient_everywhere(loss_type: LossType, dtype: torch.dtype) -> None:
    error = torch.tensor([-1e3, -0.1, 0.0, 1e-30, 0.1, 1e3], dtype=dtype, requires_grad=True)
    penalties = penalty(error, loss_type, 0.1)
    (gradient,) = torch.autograd.grad(penalties.sum(), error)
    assert (penalties >= 0).all()
    assert gradient.isfinite().all()
    assert gradient[2] == 0
    assert (gradient.sign() == error.sign()).all()


@pytest.mark.parametrize(("loss_type", "limit"), [("huber", 0.2), ("smooth_l1", 2.0)])
def test_the_gradient_of_a_huber_penalty_is_bounded(loss_type: LossType, limit: float) -> None:
    error = torch.linspace(-100, 100, 2001, dtype=F64, requires_grad=True)
    (gradient,) = torch.autograd.grad(penalty(error, loss_type, 0.1).sum(), error)
    assert gradient.abs().max() <= limit
    assert gradient.abs().max() == pytest.approx(limit, rel=1e-5)


# --- the mean over the batch -------------------------------------------------------------------------------------------


def simple_target(objective: Objective, **changes: Any) -> LossTarget:
    """Returns a target of two rows: output 0, sigma 0.5, weight 1."""
    zeros = torch.zeros(2, 1, 2, 2)
    arguments = {"sigma": torch.tensor([0.5, 0.5]), "weight": torch.ones(2), "mask": None, **changes}
    return objective.target(zeros, zeros, **arguments)


def test_a_mask_scales_the_loss_of_its_own_row_only() -> None:
    objective = sd3_objective()
    output = torch.tensor([[[[1.0, 1.0], [1.0, 1.0]]], [[[2.0, 2.0], [2.0, 2.0]]]])
    mask = torch.tensor([[[[1.0, 0.5], [0.0, 0.0]]], [[[1.0, 1.0], [1.0, 1.0]]]])
    assert float(objective.loss(output, simple_target(objective, mask=mask))) == pytest.approx((1.5 / 4 + 4) / 2)
    assert float(objective.loss(output, simple_target(objective))) == pytest.approx(2.5)


def test_gradients_are_multiplied_by_the_mask() -> None:
    objective = sd3_objective()
    output = torch.ones(2, 1, 2, 2, requires_grad=True)
    mask = torch.tensor([1.0, 0.5, 0.25, 0.0]).reshape(1, 1, 2, 2).expand(2, 1, 2, 2)
    objective.loss(output, simple_target(objective, mask=mask)).backward()
    assert output.grad is not None
    ratios = output.grad[0].flatten() / output.grad[0, 0, 0, 0]
    assert ratios.tolist() == pytest.approx([1.0, 0.5, 0.25, 0.0])


def test_each_row_has_its_own_weight() -> None:
    """sd-scripts multiplies (B,) by (B, 1, 1, 1), which gives every row the mean weight of the batch."""
    objective = sd3_objective()
    output = torch.stack([torch.full((1, 2, 2), 1.0), torch.full((1, 2, 2), 3.0)])
    target = simple_target(objective, weight=torch.tensor([1.0, 10.0]))
    assert float(objective.loss(output, target)) == pytest.approx((1 * 1 + 10 * 9) / 2)


def test_sigma_scaled_multiplies_the_error_before_the_huber_penalty() -> None:
    objective = sd3_objective(model_prediction_type="sigma_scaled", loss_type="huber", huber_c=0.1)
    loss = float(objective.loss(torch.full((2, 1, 2, 2), 3.0), simple_target(objective)))
    assert loss == pytest.approx(2 * 0.1 * (math.sqrt(1.5**2 + 0.1**2) - 0.1))


def test_additive_predicts_the_velocity_minus_the_noisy_latents() -> None:
    objective = sd3_objective(model_prediction_type="additive")
    noisy = torch.full((2, 1, 2, 2), 0.25)
    target = objective.target(torch.ones(2, 1, 2, 2), noisy, torch.ones(2), torch.ones(2), None)
    assert float(objective.loss(torch.full((2, 1, 2, 2), 0.75), target)) == 0
    velocity = rectified_flow.velocity_of(torch.full((2, 1, 2, 2), 0.75), noisy, "additive")
    assert torch.equal(velocity, torch.ones(2, 1, 2, 2))


def test_loss_is_computed_in_float32_for_a_network_in_bfloat16() -> None:
    objective = sd3_objective()
    output = torch.full((1, 1, 1, 1), 256.0, dtype=torch.bfloat16)
    velocity = torch.full((1, 1, 1, 1), 255.0)
    target = objective.target(velocity, velocity, torch.ones(1), torch.ones(1), None)
    loss = objective.loss(output, target)
    assert loss.dtype == torch.float32
    assert loss == 1  # 255 is not representable in bfloat16
