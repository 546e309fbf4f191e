"""The objective as a whole: what other programs compute, from their published formulas on the same tensors."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

from utils.config.presets import PRESETS
from utils.config.schema.objective import ObjectiveConfig
from utils.objective import rectified_flow
from utils.objective.objective import LossTarget, NoiseLevel, Objective, objective_errors, unread_keys

PIXELS = 1024**2
DRAWS = [2**-53, 1e-6, 0.003, 0.0305, 0.2, 0.37, 0.51, 0.6180339, 0.81, 0.9994, 1 - 1e-6, 1 - 2**-53]
SHAPE = (len(DRAWS), 4, 6, 5)


def draw(seed: int) -> Tensor:
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


LATENTS, NOISE, OUTPUT = draw(0), draw(1), draw(2)
SAMPLE_WEIGHTS = torch.linspace(0.5, 2, len(DRAWS), dtype=torch.float64)


def normal_of(u: float) -> float:
    """The standard normal number with this share of the distribution below it."""
    return float(torch.special.ndtri(torch.tensor(u, dtype=torch.float64)))


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def levels(objective: Objective) -> list[NoiseLevel]:
    return [objective.noise_level(u, PIXELS) for u in DRAWS]


def our_losses(sample_weights: Tensor = SAMPLE_WEIGHTS, **settings: Any) -> tuple[list[float], list[float]]:
    """(sigma, loss) of each draw alone, through the path the trainer takes; each times its sample weight."""
    objective = Objective(ObjectiveConfig(**settings))
    found = levels(objective)
    sigma = torch.tensor([level.sigma for level in found], dtype=torch.float64)
    weight = torch.tensor([level.weight for level in found], dtype=torch.float64) * sample_weights
    noisy = rectified_flow.add_noise(LATENTS, NOISE, sigma)
    target = objective.target(rectified_flow.velocity_target(LATENTS, NOISE), noisy, sigma, weight, None)
    rows = range(len(DRAWS))
    alone = [LossTarget(*(part[row : row + 1] for part in target)) for row in rows]
    losses = [float(objective.loss(OUTPUT[row : row + 1], alone[row])) for row in rows]
    together = float(objective.loss(OUTPUT, target))
    assert together == pytest.approx(sum(losses) / len(losses), rel=1e-6), "the batch's loss is the mean of its rows'"
    return sigma.tolist(), losses


def assert_same(ours: tuple[list[float], list[float]], sigmas: list[float], losses: list[float]) -> None:
    assert ours[0] == pytest.approx(sigmas, rel=1e-12, abs=1e-15)
    assert ours[1] == pytest.approx(losses, rel=1e-6, abs=1e-12)
    assert max(losses) > 0.1


# --- sd-scripts: sd3_train_utils.get_noisy_model_input_and_timesteps, sd3_train_network.get_noise_pred_and_target ---------


def sd_scripts(density: str, weighting: str, shift: float = 1.0, **parameters: float) -> tuple[list[float], list[float]]:
    """Its sigma and loss: clean-latent space, timesteps cut to whole numbers after the shift."""
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
def test_preset_sd_scripts_computes_what_it_does(shift: float) -> None:
    ours = our_losses(preset="sd_scripts", discrete_flow_shift=shift)
    assert_same(ours, *sd_scripts("uniform", "none", shift))
    assert 0.0 in ours[0], "and its timestep 0 is among them, which teaches nothing"
    assert max(ours[0]) < 1, "it never reaches 1000"


@pytest.mark.parametrize(("mean", "std"), [(0.0, 1.0), (0.6, 0.8)])
def test_sd_scripts_logit_normal_is_a_density_here(mean: float, std: float) -> None:
    ours = our_losses(preset="sd_scripts", timestep_sampling="logit_normal", logit_mean=mean, logit_std=std)
    assert_same(ours, *sd_scripts("logit_normal", "none", mean=mean, std=std))


def test_sd_scripts_mode_is_a_density_here() -> None:
    ours = our_losses(preset="sd_scripts", timestep_sampling="mode", mode_scale=1.29)
    assert_same(ours, *sd_scripts("mode", "none", scale=1.29))


def test_sd_scripts_sigma_sqrt_is_the_plain_velocity_loss() -> None:
    """But for the timestep 0, where it has no number."""
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


def test_sd_scripts_cosmap_is_a_density_here_in_expectation() -> None:
    """E over uniform sigma of cosmap weight times an error = E over the cosmap density of the error."""
    count = 20_000
    u = (torch.arange(count, dtype=torch.float64) + 0.5) / count
    ours = Objective(ObjectiveConfig(preset="sd_scripts", timestep_sampling="cosmap", timestep_grid="none"))
    t = ours.sampler(1.0).draw(u)

    def error(sigma: Tensor) -> Tensor:
        return sigma.square() * (1 + torch.sin(5 * sigma))

    theirs = (error(u) * 2 / (math.pi * (1 - 2 * u + 2 * u**2))).mean()
    assert error(t).mean() == pytest.approx(float(theirs), rel=1e-6)


# --- diffusers: train_dreambooth_sd3.py ----------------------------------------------------------------------------------


@pytest.mark.parametrize("shift", [1.0, 3.0])
@pytest.mark.parametrize("precondition", [True, False])
def test_preset_diffusers_computes_what_it_does(shift: float, precondition: bool) -> None:
    """With its own scheduler's table. Its u counts from noise to data: its normal number is minus ours."""
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
    assert max(ours[0]) == 1, "it does reach pure noise"


# --- SimpleTuner: models/common.py ---------------------------------------------------------------------------------------


def test_preset_simpletuner_computes_what_it_does() -> None:
    sigmas, losses = [], []
    for row, draw_ in enumerate(DRAWS):
        sigma = sigmoid(normal_of(draw_))
        sigma = sigma * 3.0 / (1 + (3.0 - 1) * sigma)
        sigmas.append(sigma)
        losses.append(float((OUTPUT[row] - (NOISE[row] - LATENTS[row])).square().mean() * SAMPLE_WEIGHTS[row]))
    assert_same(our_losses(preset="simpletuner"), sigmas, losses)


# --- the paper -----------------------------------------------------------------------------------------------------------


def test_preset_sd3_paper_is_its_weighted_noise_loss() -> None:
    """Eqs. 5 and 14 to 16: -1/2 w_t lambda'_t |eps error|^2 with w_t = t / (1 - t) and lambda = log((1 - t)^2 / t^2)."""
    ours = our_losses(preset="sd3_paper", discrete_flow_shift=1.0)
    sigmas, losses = [], []
    for row, draw_ in enumerate(DRAWS[2:-3], start=2):  # at the ends (1 - t)^2 has no digits left
        t = sigmoid(normal_of(draw_))
        noisy = (1 - t) * LATENTS[row] + t * NOISE[row]
        predicted_noise = noisy + (1 - t) * OUTPUT[row]
        slope = -2 * (1 / (1 - t) + 1 / t)
        weight = -0.5 * t / (1 - t) * slope
        sigmas.append(t)
        losses.append(float(weight * (predicted_noise - NOISE[row]).square().mean() * SAMPLE_WEIGHTS[row]))
    assert_same((ours[0][2:-3], ours[1][2:-3]), sigmas, losses)


# --- what a preset is ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("preset", sorted(PRESETS))
def test_a_preset_sets_what_it_says_and_written_keys_win(preset: str) -> None:
    plain = ObjectiveConfig(preset=preset).model_dump()
    assert {key: plain[key] for key in PRESETS[preset]} == PRESETS[preset]
    assert ObjectiveConfig(preset=preset, discrete_flow_shift=1.75).discrete_flow_shift == 1.75


@pytest.mark.parametrize("preset", sorted(PRESETS))
def test_the_resolved_table_means_the_same_without_its_preset(preset: str) -> None:
    resolved = ObjectiveConfig(preset=preset).model_dump(exclude={"preset"})
    again = Objective(ObjectiveConfig(**resolved))
    assert levels(again) == levels(Objective(ObjectiveConfig(preset=preset)))
    assert ObjectiveConfig(preset=preset, **resolved) == ObjectiveConfig(preset=preset)


def test_the_default_is_logit_normal_by_sampling() -> None:
    config = ObjectiveConfig()
    assert (config.timestep_sampling, config.weighting_scheme, config.weighting_by) == ("sigma", "logit_normal", "sampling")
    by_density = Objective(ObjectiveConfig(timestep_sampling="logit_normal"))
    # At the very last draw of 2**53 the table's sums have no digits left.
    for ours, theirs in zip(levels(Objective(config))[:-1], levels(by_density)[:-1], strict=True):
        assert ours.t == pytest.approx(theirs.t, abs=1e-6)
        assert ours.weight == pytest.approx(1, abs=1e-6)


@pytest.mark.parametrize("scheme", ["logit_normal", "mode", "cosmap"])
def test_a_density_is_not_squared(scheme: str) -> None:
    with pytest.raises(ValidationError, match="count twice"):
        ObjectiveConfig(timestep_sampling=scheme, weighting_scheme=scheme)
    assert ObjectiveConfig(timestep_sampling=scheme).weighting_scheme == "none", "so a density alone is no mistake"


def test_keys_without_effect_are_named() -> None:
    config = ObjectiveConfig(weighting_scheme="mode", logit_std=2.0, mode_scale=0.5, mode_s_n=0.3, huber_c=0.2)
    assert unread_keys(config) == ["huber_c", "logit_std", "mode_scale"]
    assert unread_keys(ObjectiveConfig(weighting_scheme="none", weighting_by="loss")) == ["weighting_by"]
    assert unread_keys(ObjectiveConfig(preset="simpletuner", timestep_sampling="sigma", logit_mean=0.5)) == ["logit_mean"]
    for preset in PRESETS:
        config = ObjectiveConfig(preset=preset)
        assert unread_keys(config) == unread_keys(ObjectiveConfig(**config.model_dump())) == [], "nor in a run's own copy"


def test_a_weight_that_is_zero_wherever_t_may_be_is_a_error() -> None:
    config = ObjectiveConfig(weighting_scheme="mode", mode_mean=-1.0, mode_s_n=1e-3, min_t=0.5)
    ((key, message),) = objective_errors(config)
    assert key == "objective"
    assert "zero everywhere between min_t and max_t" in message
    for settings in ({"mode_mean": 20.0, "weighting_scheme": "mode"}, {"min_t": 0.999}):
        for by in ("loss", "sampling"):
            (error,) = objective_errors(ObjectiveConfig(weighting_by=by, **settings))
            assert "next to nothing" in error[1] or "zero everywhere" in error[1]
    assert objective_errors(ObjectiveConfig()) == []


# --- weights, masks, sizes -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scheme", ["none", "sigma_sqrt", "logit_normal", "mode", "cosmap"])
def test_loss_and_sampling_have_the_same_expectation(scheme: str) -> None:
    count = 4000
    expectations = []
    for by in ("loss", "sampling"):
        objective = Objective(ObjectiveConfig(weighting_scheme=scheme, weighting_by=by, discrete_flow_shift=2.0))
        found = [objective.noise_level((index + 0.5) / count, PIXELS) for index in range(count)]
        errors = [level.weight * (1 + math.sin(4 * level.sigma)) for level in found]
        expectations.append(sum(errors) / count)
    assert expectations[0] == pytest.approx(expectations[1], rel=1e-4)


@pytest.mark.parametrize("scheme", ["none", "sigma_sqrt", "logit_normal", "mode", "cosmap"])
@pytest.mark.parametrize("by", ["loss", "sampling"])
@pytest.mark.parametrize("grid", ["none", "sd_scripts", "diffusers"])
def test_the_rarest_draws_have_finite_levels(scheme: str, by: str, grid: str) -> None:
    objective = Objective(ObjectiveConfig(weighting_scheme=scheme, weighting_by=by, timestep_grid=grid))
    for level in levels(objective):
        assert 0 <= level.t <= 1
        assert 0 <= level.sigma <= 1
        assert math.isfinite(level.weight) and level.weight >= 0


def test_times_stay_within_their_bounds() -> None:
    for scheme in ("none", "logit_normal"):
        found = levels(Objective(ObjectiveConfig(weighting_scheme=scheme, min_t=0.25, max_t=0.5)))
        assert min(level.t for level in found) == pytest.approx(0.25, abs=1e-4)
        assert max(level.t for level in found) == pytest.approx(0.5, abs=1e-4)
        assert all(0.25 <= level.t <= 0.5 for level in found)


def test_shift_grows_with_the_root_of_the_pixels() -> None:
    """SD3 paper, eq. 23: four times the pixels, twice the shift."""
    objective = Objective(ObjectiveConfig(discrete_flow_shift=3.0, shift_resolution=1024))
    assert objective.shift_at(1024 * 1024) == 3.0
    assert objective.shift_at(512 * 512) == 1.5
    assert objective.shift_at(2048 * 512) == 3.0
    assert Objective(ObjectiveConfig()).shift_at(512 * 512) == 3.0
    small, large = objective.noise_level(0.5, 512 * 512), objective.noise_level(0.5, 1024 * 1024)
    assert small.t == pytest.approx(large.t)
    assert small.sigma == pytest.approx(0.6)
    assert large.sigma == pytest.approx(0.75)


def simple_target(objective: Objective, **changes: Any) -> LossTarget:
    """Target zero for two rows at sigma 0.5, weight 1."""
    zeros = torch.zeros(2, 1, 2, 2)
    arguments = {"sigma": torch.tensor([0.5, 0.5]), "weight": torch.ones(2), "mask": None, **changes}
    return objective.target(zeros, zeros, **arguments)


def test_a_mask_weighs_places_and_not_the_rest_of_the_batch() -> None:
    objective = Objective(ObjectiveConfig())
    output = torch.tensor([[[[1.0, 1.0], [1.0, 1.0]]], [[[2.0, 2.0], [2.0, 2.0]]]])
    mask = torch.tensor([[[[1.0, 0.5], [0.0, 0.0]]], [[[1.0, 1.0], [1.0, 1.0]]]])
    assert float(objective.loss(output, simple_target(objective, mask=mask))) == pytest.approx((1.5 / 4 + 4) / 2)
    assert float(objective.loss(output, simple_target(objective))) == pytest.approx(2.5)


def test_black_places_get_no_gradient_and_grey_ones_their_share() -> None:
    objective = Objective(ObjectiveConfig())
    output = torch.ones(2, 1, 2, 2, requires_grad=True)
    mask = torch.tensor([1.0, 0.5, 0.25, 0.0]).reshape(1, 1, 2, 2).expand(2, 1, 2, 2)
    objective.loss(output, simple_target(objective, mask=mask)).backward()
    assert output.grad is not None
    shares = output.grad[0].flatten() / output.grad[0, 0, 0, 0]
    assert shares.tolist() == pytest.approx([1.0, 0.5, 0.25, 0.0])


def test_weights_stay_with_their_rows() -> None:
    """A weight per row, not their mean over the batch: kohya-ss/sd-scripts multiplies (B,) by (B, 1, 1, 1)."""
    objective = Objective(ObjectiveConfig())
    output = torch.stack([torch.full((1, 2, 2), 1.0), torch.full((1, 2, 2), 3.0)])
    target = simple_target(objective, weight=torch.tensor([1.0, 10.0]))
    assert float(objective.loss(output, target)) == pytest.approx((1 * 1 + 10 * 9) / 2)


def test_clean_latent_errors_are_sigma_times_as_large_under_huber_too() -> None:
    objective = Objective(ObjectiveConfig(model_prediction_type="sigma_scaled", loss_type="huber", huber_c=0.1))
    loss = float(objective.loss(torch.full((2, 1, 2, 2), 3.0), simple_target(objective)))
    assert loss == pytest.approx(2 * 0.1 * (math.sqrt(1.5**2 + 0.1**2) - 0.1))


def test_additive_learns_what_is_missing_to_the_velocity() -> None:
    objective = Objective(ObjectiveConfig(model_prediction_type="additive"))
    noisy = torch.full((2, 1, 2, 2), 0.25)
    target = objective.target(torch.ones(2, 1, 2, 2), noisy, torch.ones(2), torch.ones(2), None)
    assert float(objective.loss(torch.full((2, 1, 2, 2), 0.75), target)) == 0
    velocity = rectified_flow.velocity_of(torch.full((2, 1, 2, 2), 0.75), noisy, "additive")
    assert torch.equal(velocity, torch.ones(2, 1, 2, 2))


def test_loss_is_computed_in_float32_for_a_network_in_bfloat16() -> None:
    objective = Objective(ObjectiveConfig())
    output = torch.full((1, 1, 1, 1), 256.0, dtype=torch.bfloat16)
    velocity = torch.full((1, 1, 1, 1), 255.0)
    target = objective.target(velocity, velocity, torch.ones(1), torch.ones(1), None)
    loss = objective.loss(output, target)
    assert loss.dtype == torch.float32
    assert loss == 1  # bfloat16 has no 255
