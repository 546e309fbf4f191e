"""utils/previews/samplers.py against exact solutions and other implementations, in float64; guidance."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from utils.objective import rectified_flow
from utils.previews import samplers
from utils.previews.samplers import SamplerName, make_sampler, sampling_sigmas

F64 = torch.float64
NAMES: tuple[SamplerName, ...] = ("euler", "dpmpp_2m")


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, dtype=F64, generator=torch.Generator().manual_seed(seed))


def follow(name: SamplerName, velocity: Callable[[Tensor, float], Tensor], start: Tensor, sigmas: Tensor) -> Tensor:
    sampler, latents = make_sampler(name), start
    for sigma, next_sigma in itertools.pairwise(sigmas.tolist()):
        latents = sampler.step(latents, velocity(latents, sigma), sigma, next_sigma)
    return latents


# --- sigma -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_steps", [1, 4, 28])
def test_sigma_decreases_from_1_to_0(num_steps: int) -> None:
    sigmas = sampling_sigmas(num_steps, 3.0)
    assert len(sigmas) == num_steps + 1
    assert sigmas[0] == 1
    assert sigmas[-1] == 0
    assert (sigmas.diff() < 0).all()


# --- against exact solutions -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("shift", [1.0, 3.0])
@pytest.mark.parametrize("num_steps", [1, 2, 7])
def test_a_straight_path_is_integrated_exactly(name: SamplerName, num_steps: int, shift: float) -> None:
    latents, noise = draw(2, 3, 4, 4), draw(2, 3, 4, 4, seed=1)
    velocity = rectified_flow.velocity_target(latents, noise)
    sampler, current = make_sampler(name), noise
    for sigma, next_sigma in itertools.pairwise(sampling_sigmas(num_steps, shift).tolist()):
        on_path = rectified_flow.add_noise(latents, noise, torch.full((2,), sigma, dtype=F64))
        torch.testing.assert_close(current, on_path, rtol=0, atol=1e-13)
        current = sampler.step(current, velocity, sigma, next_sigma)
    torch.testing.assert_close(current, latents, rtol=0, atol=1e-13)


MEAN, STD = 0.7, 0.4
"""Mean and standard deviation of normally distributed data, for which the optimal velocity and its solution are known."""


def std_at(sigma: float) -> float:
    """Returns the standard deviation of (1 - sigma) data + sigma noise."""
    return math.hypot((1 - sigma) * STD, sigma)


def optimal_velocity(x: Tensor, sigma: float) -> Tensor:
    """Returns the mean of noise - data given x: the prediction of a perfectly trained network."""
    centered = x - (1 - sigma) * MEAN
    return centered * (sigma - (1 - sigma) * STD**2) / std_at(sigma) ** 2 - MEAN


def exact(noise: Tensor, sigma: float) -> Tensor:
    """Returns the solution of the flow from `noise`: points of a normal distribution keep their quantiles."""
    return (1 - sigma) * MEAN + std_at(sigma) * noise


def test_the_exact_solution_satisfies_the_flow_equation() -> None:
    noise, sigma, step = draw(100), 0.4, 1e-6
    slope = (exact(noise, sigma + step) - exact(noise, sigma - step)) / (2 * step)
    torch.testing.assert_close(slope, optimal_velocity(exact(noise, sigma), sigma), rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize(
    ("name", "last_sigma", "order", "tolerance"),
    [("euler", 0.0, 1, 0.05), ("euler", 0.1, 1, 0.05), ("dpmpp_2m", 0.1, 2, 0.1), ("dpmpp_2m", 0.0, 2, 0.3)],
)
def test_order_of_convergence(name: SamplerName, last_sigma: float, order: int, tolerance: float) -> None:
    """Doubling the number of steps divides the error by 2**order; the exponent is measured between 64 and 512 steps.

    Down to sigma 0 the steps of lambda do not become small, which adds a factor log(steps) to the error of the second
    order: the measured exponents are 1.72, 1.78 and 1.81, increasing.
    """
    noise = draw(1000)
    errors = []
    for num_steps in (64, 128, 256, 512):
        sigmas = torch.linspace(1, last_sigma, num_steps + 1, dtype=F64)
        end = follow(name, optimal_velocity, noise, sigmas)
        errors.append(float((end - exact(noise, last_sigma)).abs().max()))
    orders = [math.log2(coarse / fine) for coarse, fine in itertools.pairwise(errors)]
    assert orders == pytest.approx([order] * 3, abs=tolerance), errors


@pytest.mark.parametrize(("num_steps", "times"), [(8, 1.1), (16, 2), (28, 4), (50, 4)])
def test_the_second_order_has_a_smaller_error_at_equal_numbers_of_steps(num_steps: int, times: float) -> None:
    noise, sigmas = draw(1000), sampling_sigmas(num_steps, 3.0)
    euler, second = (float((follow(name, optimal_velocity, noise, sigmas) - exact(noise, 0)).norm()) for name in NAMES)
    assert second < euler / times


# --- against other programs --------------------------------------------------------------------------------------------


def curved_velocity(x: Tensor, sigma: float) -> Tensor:
    """A velocity that is nonlinear and differs between places."""
    return torch.sin(3 * x) + x.roll(1, -1) * sigma - 0.3


@pytest.mark.parametrize("num_steps", [1, 5, 28])
def test_euler_equals_diffusers(num_steps: int) -> None:
    from diffusers import FlowMatchEulerDiscreteScheduler

    noise = draw(2, 16, 4, 6)
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    scheduler.set_timesteps(sigmas=torch.linspace(1, 0, num_steps + 1)[:-1].tolist())
    latents = noise.float()
    for timestep in scheduler.timesteps:
        velocity = curved_velocity(latents, float(timestep) / 1000)
        latents = scheduler.step(velocity, timestep, latents, return_dict=False)[0]
    ours = follow("euler", curved_velocity, noise, sampling_sigmas(num_steps, 3.0))
    torch.testing.assert_close(ours, latents.double(), rtol=1e-5, atol=1e-5)


def published_2m(velocity: Callable[[Tensor, float], Tensor], start: Tensor, sigmas: list[float]) -> Tensor:
    """DPM-Solver++(2M) in the paper's form (alg. 2, data prediction), for x = alpha data + sigma noise with alpha = 1.

    alg. 2: h_i = lambda_i - lambda_{i-1}, r_i = h_{i-1} / h_i,
    D_i = (1 + 1 / (2 r_i)) x_theta(x_{i-1}) - 1 / (2 r_i) x_theta(x_{i-2}),
    x_i = sigma_i / sigma_{i-1} x_{i-1} - alpha_i (exp(-h_i) - 1) D_i.
    """
    lambdas = [-math.log(sigma) if sigma > 0 else math.inf for sigma in sigmas]
    x, predictions = start, []
    for i in range(1, len(sigmas)):
        predictions.append(x - sigmas[i - 1] * velocity(x, sigmas[i - 1]))
        h = lambdas[i] - lambdas[i - 1]
        estimate = predictions[-1]
        if 1 < i < len(sigmas) - 1:
            r = (lambdas[i - 1] - lambdas[i - 2]) / h
            estimate = (1 + 1 / (2 * r)) * predictions[-1] - 1 / (2 * r) * predictions[-2]
        x = sigmas[i] / sigmas[i - 1] * x - math.expm1(-h) * estimate
    return x


@pytest.mark.parametrize("num_steps", [1, 2, 3, 28])
def test_dpmpp_2m_equals_the_published_algorithm(num_steps: int) -> None:
    noise, sigmas = draw(2, 16, 4, 6), sampling_sigmas(num_steps, 3.0)
    ours = follow("dpmpp_2m", curved_velocity, noise, sigmas)
    torch.testing.assert_close(ours, published_2m(curved_velocity, noise, sigmas.tolist()), rtol=1e-12, atol=1e-12)


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
def test_the_result_is_close_to_that_of_the_diffusers_solver_of_the_same_name() -> None:
    """Its lambda is log((1 - sigma) / sigma), so its steps differ; its result is closer to ours than Euler's is."""
    from diffusers import DPMSolverMultistepScheduler

    noise = draw(1000)
    scheduler = DPMSolverMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0)
    scheduler.set_timesteps(28)
    sigmas, theirs = scheduler.sigmas.double(), noise
    for timestep, sigma in zip(scheduler.timesteps, sigmas.tolist(), strict=False):
        theirs = scheduler.step(optimal_velocity(theirs, sigma), timestep, theirs, return_dict=False)[0]
    euler, ours = (follow(name, optimal_velocity, noise, sigmas) for name in NAMES)
    assert 1e-4 < float((ours - theirs).norm() / noise.norm()) < float((euler - theirs).norm() / noise.norm()) / 4


# --- guidance ----------------------------------------------------------------------------------------------------------


def test_cfg_1_is_conditional_and_cfg_0_unconditional() -> None:
    conditional, unconditional = draw(1, 2, 2, 2), draw(1, 2, 2, 2, seed=1)
    torch.testing.assert_close(samplers.guide(conditional, unconditional, 1.0), conditional, rtol=0, atol=1e-15)
    assert torch.equal(samplers.guide(conditional, unconditional, 0.0), unconditional)
    expected = 4.5 * conditional - 3.5 * unconditional
    torch.testing.assert_close(samplers.guide(conditional, unconditional, 4.5), expected)


def test_each_image_of_a_batch_has_its_own_cfg() -> None:
    conditional, unconditional = draw(2, 2, 2, 2), draw(2, 2, 2, 2, seed=1)
    together = samplers.guide(conditional, unconditional, torch.tensor([2.0, 5.0], dtype=F64)[:, None, None, None])
    for row, cfg in enumerate((2.0, 5.0)):
        assert torch.equal(together[row], samplers.guide(conditional[row], unconditional[row], cfg))


def test_skip_layer_guidance_adds_the_scaled_difference_of_the_skipped_blocks() -> None:
    conditional, unconditional, skipped = (draw(1, 2, 2, 2, seed=seed) for seed in range(3))
    guided = samplers.guide_from_skipped(samplers.guide(conditional, unconditional, 4.0), conditional, skipped, 2.5)
    torch.testing.assert_close(guided, 6.5 * conditional - 3.0 * unconditional - 2.5 * skipped)
    assert torch.equal(samplers.guide_from_skipped(conditional, conditional, conditional, 2.5), conditional)


@pytest.mark.parametrize(
    ("num_steps", "expected"),
    [(28, [1, 2, 3, 4, 5]), (40, [1, 2, 3, 4, 5, 6, 7]), (50, [1, 2, 3, 4, 5, 6, 7, 8, 9]), (5, []), (1, [])],
)
def test_steps_with_skip_layer_guidance(num_steps: int, expected: list[int]) -> None:
    """The fractions of SD3.5-medium, 0.01 to 0.2; both ends are excluded."""
    assert [step for step in range(num_steps) if samplers.skips_layers(step, num_steps, 0.01, 0.2)] == expected


def test_skip_layer_guidance_excludes_both_ends() -> None:
    assert [step for step in range(10) if samplers.skips_layers(step, 10, 0.0, 0.5)] == [1, 2, 3, 4]
