"""Presets: sigma and loss agree with other programs, computed from their published formulas on the same tensors."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.utils.objective.sd3_objective import sd3_objective
from utils.config.presets import PRESETS
from utils.config.schema.objective import ObjectiveConfig
from utils.objective import rectified_flow
from utils.objective.loss import LossTarget
from utils.objective.objective import NoiseLevel, Objective

PIXELS = 1024**2
DRAWS = [2**-53, 1e-6, 0.003, 0.0305, 0.2, 0.37, 0.51, 0.6180339, 0.81, 0.9994, 1 - 1e-6, 1 - 2**-53]
SHAPE = (len(DRAWS), 4, 6, 5)


def draw(seed: int) -> Tensor:
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


LATENTS, NOISE, OUTPUT = draw(0), draw(1), draw(2)
SAMPLE_WEIGHTS = torch.linspace(0.5, 2, len(DRAWS), dtype=torch.float64)


def normal_of(u: float) -> float:
    """Returns the quantile u of the standard normal distribution."""
    return float(torch.special.ndtri(torch.tensor(u, dtype=torch.float64)))


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def levels(objective: Objective) -> list[NoiseLevel]:
    return [objective.noise_level(u, PIXELS) for u in DRAWS]


def our_losses(sample_weights: Tensor = SAMPLE_WEIGHTS, **settings: Any) -> tuple[list[float], list[float]]:
    """Returns sigma and loss of each draw, computed as in training and multiplied by its sample weight."""
    objective = sd3_objective(**settings)
    found = levels(objective)
    sigma = torch.tensor([level.sigma for level in found], dtype=torch.float64)
    weight = torch.tensor([level.weight for level in found], dtype=torch.float64) * sample_weights
    noisy = rectified_flow.add_noise(LATENTS, NOISE, sigma)
    target = objective.target(rectified_flow.velocity_target(LATENTS, NOISE), noisy, sigma, weight, None)
    rows = range(len(DRAWS))
    alone = [LossTarget(*(part[row : row + 1] for part in target)) for row in rows]
    losses = [float(objective.loss(OUTPUT[row : row + 1], alone[row])) for row in rows]
    together = float(objective.loss(OUTPUT, target))
    assert together == pytest.approx(sum(losses) / len(losses), rel=1e-6), "the loss of the batch is the mean over its rows"
    return sigma.tolist(), losses


def assert_same(ours: tuple[list[float], list[float]], sigmas: list[float], losses: list[float]) -> None:
    assert ours[0] == pytest.approx(sigmas, rel=1e-12, abs=1e-15)
    assert ours[1] == pytest.approx(losses, rel=1e-6, abs=1e-12)
    assert max(losses) > 0.1


# --- sd-scripts: sd3_train_utils.get_noisy_model_input_and_timesteps, sd3_train_network.get_noise_pred_and_target ---------


def sd_scripts(density: str, weighting: str, shift: float = 1.0, **parameters: float) -> tuple[list[float], list[float]]:
    """Returns its sigma and loss: errors of clean latents; timesteps truncated to integers after the shift."""
    sigmas, losses = [], []
    for row, draw_ in enumerate(DRAWS):
        u = draw_
        if density == "logit_normal":
            u = sigmoid(parameters["mean"] + parameters["std"] * normal_of(draw_))
        elif density == "mode":
            v = 1 - draw_
            u = 1 - v - parameters["scale"] * (math.cos(math.pi * v / 2) ** 2 - 1 + v)
        u = u * shift / (1 + (shift - 1) * u)
        timestep = math.floor(u * 1000)
        sigma = timestep / 1000
        noisy = sigma * NOISE[row] + (1 - sigma) * LATENTS[row]
        model_pred = OUTPUT[row] * -sigma + noisy
        loss = (model_pred - LATENTS[row]).square()
        if weighting == "sigma_sqrt":
            loss = loss * sigma**-2 if sigma else loss * math.nan
        elif weighting == "cosmap":
            loss = loss * (2 / (math.pi * (1 - 2 * sigma + 2 * sigma**2)))
        sigmas.append(sigma)
        losses.append(float(loss.mean() * SAMPLE_WEIGHTS[row]))
    return sigmas, losses


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_preset_sd_scripts_agrees_with_sd_scripts(shift: float) -> None:
    ours = our_losses(preset="sd_scripts", discrete_flow_shift=shift)
    assert_same(ours, *sd_scripts("uniform", "none", shift))
    assert 0.0 in ours[0], "its timestep 0, which has no noise, is among them"
    assert max(ours[0]) < 1, "it never reaches 1000"


@pytest.mark.parametrize(("mean", "std"), [(0.0, 1.0), (0.6, 0.8)])
def test_logit_normal_of_sd_scripts_is_a_density(mean: float, std: float) -> None:
    ours = our_losses(preset="sd_scripts", timestep_sampling="logit_normal", logit_mean=mean, logit_std=std)
    assert_same(ours, *sd_scripts("logit_normal", "none", mean=mean, std=std))


def test_mode_of_sd_scripts_is_a_density() -> None:
    ours = our_losses(preset="sd_scripts", timestep_sampling="mode", mode_scale=1.29)
    assert_same(ours, *sd_scripts("mode", "none", scale=1.29))


def test_sigma_sqrt_of_sd_scripts_is_the_unweighted_velocity_loss() -> None:
    """At timestep 0 its loss is NaN; that row is not compared."""
    sigmas, losses = our_losses(preset="sd_scripts", model_prediction_type="raw")
    theirs = sd_scripts("uniform", "sigma_sqrt")
    kept = [row for row, loss in enumerate(theirs[1]) if not math.isnan(loss)]
    assert 0 < len(kept) < len(DRAWS)
    assert all(math.isfinite(loss) for loss in losses)
    assert_same(
        ([sigmas[row] for row in kept], [losses[row] for row in kept]),
        [theirs[0][row] for row in kept],
        [theirs[1][row] for row in kept],
    )


def test_cosmap_of_sd_scripts_is_a_density_in_expectation() -> None:
    """The mean over uniform sigma of cosmap weight times error equals the mean error over the cosmap density."""
    count = 20_000
    u = (torch.arange(count, dtype=torch.float64) + 0.5) / count
    ours = sd3_objective(preset="sd_scripts", timestep_sampling="cosmap", timestep_grid="none")
    t = ours.sampler(1.0).draw(u)

    def error(sigma: Tensor) -> Tensor:
        return sigma.square() * (1 + torch.sin(5 * sigma))

    theirs = (error(u) * 2 / (math.pi * (1 - 2 * u + 2 * u**2))).mean()
    assert error(t).mean() == pytest.approx(float(theirs), rel=1e-6)


# --- diffusers: train_dreambooth_sd3.py ----------------------------------------------------------------------------------


@pytest.mark.parametrize("shift", [1.0, 3.0])
@pytest.mark.parametrize("precondition", [True, False])
def test_preset_diffusers_agrees_with_diffusers(shift: float, precondition: bool) -> None:
    """The reference uses its scheduler. Its u counts from noise to data, so its normal variable has the opposite sign."""
    from diffusers import FlowMatchEulerDiscreteScheduler

    scheduler = FlowMatchEulerDiscreteScheduler(num_train_timesteps=1000, shift=shift)
    sigmas, losses = [], []
    for row, draw_ in enumerate(DRAWS):
        u = sigmoid(-normal_of(draw_))
        timestep = scheduler.timesteps[math.floor(u * 1000)]
        step = int((scheduler.timesteps == timestep).nonzero()[0, 0])
        sigma = float(scheduler.sigmas[step])
        noisy = (1 - sigma) * LATENTS[row] + sigma * NOISE[row]
        prediction = OUTPUT[row] * -sigma + noisy if precondition else OUTPUT[row]
        target = LATENTS[row] if precondition else NOISE[row] - LATENTS[row]
        sigmas.append(sigma)
        losses.append(float((prediction - target).square().mean() * SAMPLE_WEIGHTS[row]))
    changes = {} if precondition else {"model_prediction_type": "raw"}
    ours = our_losses(preset="diffusers", discrete_flow_shift=shift, **changes)
    assert ours[0] == pytest.approx(sigmas, rel=1e-6), "the table is float32"
    assert ours[1] == pytest.approx(losses, rel=1e-5)
    assert max(ours[0]) == 1, "it reaches pure noise"


# --- SimpleTuner: models/common.py ---------------------------------------------------------------------------------------


def test_preset_simpletuner_agrees_with_simpletuner() -> None:
    sigmas, losses = [], []
    for row, draw_ in enumerate(DRAWS):
        sigma = sigmoid(normal_of(draw_))
        sigma = sigma * 3.0 / (1 + (3.0 - 1) * sigma)
        sigmas.append(sigma)
        losses.append(float((OUTPUT[row] - (NOISE[row] - LATENTS[row])).square().mean() * SAMPLE_WEIGHTS[row]))
    assert_same(our_losses(preset="simpletuner"), sigmas, losses)


# --- the paper -----------------------------------------------------------------------------------------------------------


def test_preset_sd3_paper_agrees_with_the_weighted_noise_loss_of_the_paper() -> None:
    """Eqs. 5 and 14 to 16: -1/2 w_t lambda'_t |eps error|^2 with w_t = t / (1 - t) and lambda = log((1 - t)^2 / t^2)."""
    ours = our_losses(preset="sd3_paper", discrete_flow_shift=1.0)
    sigmas, losses = [], []
    for row, draw_ in enumerate(DRAWS[2:-3], start=2):  # at the ends (1 - t)^2 loses all digits
        t = sigmoid(normal_of(draw_))
        noisy = (1 - t) * LATENTS[row] + t * NOISE[row]
        predicted_noise = noisy + (1 - t) * OUTPUT[row]
        slope = -2 * (1 / (1 - t) + 1 / t)
        weight = -0.5 * t / (1 - t) * slope
        sigmas.append(t)
        losses.append(float(weight * (predicted_noise - NOISE[row]).square().mean() * SAMPLE_WEIGHTS[row]))
    assert_same((ours[0][2:-3], ours[1][2:-3]), sigmas, losses)


# --- presets -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("preset", sorted(PRESETS))
def test_a_preset_sets_its_keys_and_written_keys_take_precedence(preset: str) -> None:
    plain = ObjectiveConfig(preset=preset).model_dump()
    assert {key: plain[key] for key in PRESETS[preset]} == PRESETS[preset]
    assert ObjectiveConfig(preset=preset, discrete_flow_shift=1.75).discrete_flow_shift == 1.75


@pytest.mark.parametrize("preset", sorted(PRESETS))
def test_the_resolved_table_is_equivalent_without_its_preset(preset: str) -> None:
    resolved = ObjectiveConfig(preset=preset).model_dump(exclude={"preset"})
    again = sd3_objective(**resolved)
    assert levels(again) == levels(sd3_objective(preset=preset))
    assert ObjectiveConfig(preset=preset, **resolved) == ObjectiveConfig(preset=preset)
