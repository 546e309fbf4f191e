"""Prodigy: Adam that estimates its own step size d, with the same result on any layout of processes.

The estimate is a ratio of two sums over all trained parameters of the network. A step therefore has two phases: `sums`
returns this process's part of them, one row for each parameter, and `finish` takes the totals over all processes. The
algorithm is that of Mishchenko and Defazio, "Prodigy: An Expeditiously Adaptive Parameter-Free Learner" (2023), with the
arguments of the package prodigyopt 1.1; the sums are float64.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

NUMBERS = ("d", "d_max", "d_numerator", "k")
"""What all parameters share. Each parameter's state has a copy, so that checkpoints by parameter are complete."""


class Prodigy(torch.optim.Optimizer):
    """The learning rate is a factor of d and is normally 1. All parameter groups share one d."""

    num_sums = 2

    def __init__(
        self,
        params: Iterable[nn.Parameter] | Iterable[dict[str, Any]],
        lr: float = 1.0,
        betas: tuple[float, float] = (0.9, 0.999),
        beta3: float | None = None,
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        decouple: bool = True,
        use_bias_correction: bool = False,
        safeguard_warmup: bool = False,
        d0: float = 1e-6,
        d_coef: float = 1.0,
        growth_rate: float = math.inf,
    ) -> None:
        """`beta3`: decay of the sums; None: root of the second beta. `growth_rate`: largest factor of d in one step."""
        defaults: dict[str, Any] = {"lr": lr, "betas": betas, "beta3": beta3, "eps": eps}
        defaults |= {"weight_decay": weight_decay, "decouple": decouple}
        defaults |= {"use_bias_correction": use_bias_correction, "safeguard_warmup": safeguard_warmup}
        super().__init__(params, defaults | {"d0": d0, "d_coef": d_coef, "growth_rate": growth_rate})

    def _members(self) -> Iterator[tuple[nn.Parameter, dict[str, Any], dict[str, Any]]]:
        """(parameter, state, group) of each parameter that has a gradient."""
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    yield parameter, self.state[parameter], group

    @torch.no_grad()
    def sums(self) -> Tensor:
        """Updates moments and returns (parameters, 2) float64: the parts of numerator and denominator of d."""
        rows = []
        for parameter, state, group in self._members():
            if not state:
                _start(parameter, state, group)
            gradient, d, (beta1, beta2) = parameter.grad, float(state["d"]), group["betas"]
            assert gradient is not None
            if group["weight_decay"] and not group["decouple"]:
                gradient = gradient.add(parameter, alpha=group["weight_decay"])
            rate, scale = _rate(state, group), d / group["d0"]
            product = torch.dot(gradient.flatten().double(), (state["p0"] - parameter).flatten().double())
            state["exp_avg"].mul_(beta1).add_(gradient, alpha=d * (1 - beta1))
            state["exp_avg_sq"].mul_(beta2).addcmul_(gradient, gradient, value=d * d * (1 - beta2))
            state["s"].mul_(_beta3(group)).add_(gradient, alpha=scale * (d if group["safeguard_warmup"] else rate))
            rows.append(torch.stack([scale * rate * product, state["s"].abs().sum(dtype=torch.float64)]))
        return torch.stack(rows)

    @torch.no_grad()
    def finish(self, totals: Sequence[float]) -> None:
        """Updates d and the weights, given both sums over the parameters of all processes."""
        numerator, denominator = totals
        for parameter, state, group in self._members():
            rate, d = _rate(state, group), float(state["d"])
            total = float(state["d_numerator"]) * _beta3(group) + numerator
            state["d_numerator"].fill_(total)
            if denominator > 0:
                estimate = group["d_coef"] * total / denominator if group["lr"] > 0 else d
                if d == group["d0"]:
                    d = max(d, estimate)
                state["d_max"].fill_(max(float(state["d_max"]), estimate))
                d = min(float(state["d_max"]), d * group["growth_rate"])
                state["d"].fill_(d)
                if group["weight_decay"] and group["decouple"]:
                    # Not mul_(1 - decay), which float32 cannot represent while d is small.
                    parameter.add_(parameter, alpha=-group["weight_decay"] * rate)
                root = state["exp_avg_sq"].sqrt().add_(d * group["eps"])
                parameter.addcdiv_(state["exp_avg"], root, value=-rate)
            state["k"] += 1

    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """One update, where this process has all parameters."""
        self.finish(self.sums().sum(dim=0).tolist())


def _start(parameter: nn.Parameter, state: dict[str, Any], group: dict[str, Any]) -> None:
    state["p0"] = parameter.detach().clone()
    for name in ("s", "exp_avg", "exp_avg_sq"):
        state[name] = torch.zeros_like(parameter)
    values = {"d": group["d0"], "d_max": group["d0"], "d_numerator": 0.0, "k": 0.0}
    state.update({name: torch.tensor(values[name], dtype=torch.float64) for name in NUMBERS})


def _beta3(group: dict[str, Any]) -> float:
    beta3: float | None = group["beta3"]
    return math.sqrt(group["betas"][1]) if beta3 is None else beta3


def _rate(state: dict[str, Any], group: dict[str, Any]) -> float:
    """d times the learning rate, with Adam's bias correction if that is wanted."""
    rate = float(state["d"]) * float(group["lr"])
    if group["use_bias_correction"]:
        beta1, beta2 = group["betas"]
        count = float(state["k"]) + 1
        rate *= math.sqrt(1 - beta2**count) / (1 - beta1**count)
    return rate
