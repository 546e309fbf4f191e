"""utils/objective/weighting.py: weights over t against formulas and integrals computed independently, in float64."""

from __future__ import annotations

import math
from typing import get_args

import numpy as np
import pytest
import torch
from scipy import integrate, special

from tests.utils.objective.published_formulas import (
    F64,
    WEIGHTINGS,
    integral,
    make_sampler,
    midpoints,
    name_of,
    weight_formula,
)
from utils.config.schema.objective_choices import WeightingScheme
from utils.objective.rectified_flow import shift_time
from utils.objective.timestep_sampling import Density
from utils.objective.weighting import Weighting

ENDS = torch.tensor([0.0, 2.0**-1074, 2.0**-53, 0.5, 1 - 2.0**-53, 1.0], dtype=F64)


@pytest.mark.parametrize("shift", [1.0, 3.0])
@pytest.mark.parametrize("weighting", WEIGHTINGS, ids=name_of)
def test_weight_agrees_with_its_formula(weighting: Weighting, shift: float) -> None:
    t = torch.cat([torch.tensor([0.1, 0.25, 0.5, 0.75, 0.9], dtype=F64), midpoints(999)])
    expected = weight_formula(weighting, t.numpy(), shift)
    np.testing.assert_allclose(weighting(t, shift_time(t, shift)).numpy(), expected, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize(
    ("scheme", "values"),
    [
        ("none", [1, 1, 1, 1, 1]),
        ("sigma_sqrt", [0.32, 0.50, 0.71, 0.87, 0.95]),
        ("logit_normal", [0.40, 1.16, 1.60, 1.16, 0.40]),
        ("mode", [0.21, 0.42, 0.80, 0.42, 0.21]),
        ("cosmap", [0.02, 0.15, 0.50, 0.85, 0.98]),
    ],
)
def test_weight_agrees_with_values_computed_by_hand(scheme: WeightingScheme, values: list[float]) -> None:
    t = torch.tensor([0.1, 0.25, 0.5, 0.75, 0.9], dtype=F64)
    assert Weighting(scheme)(t, t).tolist() == pytest.approx(values, abs=0.0051)


def test_weights_have_the_expected_integrals_over_t() -> None:
    ends = math.exp(0.5 / 0.2), math.exp(-0.5 / 0.2)
    mode = (math.atan(ends[0]) - math.atan(ends[1])) / math.pi
    expected = {"none": 1.0, "sigma_sqrt": 2 / 3, "logit_normal": 1.0, "mode": mode, "cosmap": 0.5}
    assert expected.keys() == set(get_args(WeightingScheme))
    assert 0.4 < mode < 0.5  # not 1: as a density the formula would need a factor of two and its tails
    for scheme in get_args(WeightingScheme):
        weighting = Weighting(scheme)
        assert integral(lambda t, w=weighting: w(torch.tensor(t), torch.tensor(t)).numpy(), 0, 1) == pytest.approx(
            expected[scheme], abs=1e-5 if scheme == "sigma_sqrt" else 1e-10
        )
        assert make_sampler(Density("sigma"), weighting, (0, 1), 1.0).mean_weight == pytest.approx(
            expected[scheme], abs=1e-7
        )


@pytest.mark.parametrize(("mean", "std"), [(0.0, 0.3), (-0.5, 0.7), (1.0, 2.0)])
def test_logit_normal_weight_integrates_to_one(mean: float, std: float) -> None:
    weighting = Weighting("logit_normal", mean, std)

    def over_logit(logit: float) -> float:
        t = torch.tensor(special.expit(logit), dtype=F64)
        return float(weighting(t, t) * t * (1 - t))

    assert integrate.quad(over_logit, mean - 8 * std, mean + 8 * std)[0] == pytest.approx(1, abs=1e-9)


@pytest.mark.parametrize(
    "weighting",
    [
        *WEIGHTINGS,
        Weighting("logit_normal", logit_std=0.01),
        Weighting("logit_normal", logit_std=10),
        Weighting("logit_normal", logit_mean=-30),
        Weighting("mode", mode_s_n=1e-3),
        Weighting("mode", mode_mean=-5, mode_s_n=1e-3),
        Weighting("mode", mode_mean=7),
    ],
    ids=name_of,
)
def test_weights_are_finite_and_not_negative_on_the_closed_interval(weighting: Weighting) -> None:
    t = torch.cat([ENDS, midpoints(10_000)])
    weight = weighting(t, shift_time(t, 3.0))
    assert weight.isfinite().all()
    assert (weight >= 0).all()


def test_logit_normal_weight_is_zero_at_both_ends() -> None:
    assert Weighting("logit_normal")(ENDS[[0, -1]], ENDS[[0, -1]]).tolist() == [0, 0]
