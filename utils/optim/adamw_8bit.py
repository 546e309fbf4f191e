"""AdamW with moments of one byte each, in plain torch: 2.03 bytes of state per parameter instead of 8.

Each block of 256 consecutive elements of a parameter has a float32 scale, its largest absolute value. The first moment is
stored as the signed square root of its fraction of the scale, the second as the fourth root, because linear codes make small
second moments zero. Blocks begin at the start of each parameter, so codes do not depend on how parameters are distributed.
Parameters with fewer than 4096 elements keep float32 moments. The weights it updates must be float32.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

BLOCK = 256
MIN_ELEMENTS = 4096


def _blocks(values: Tensor) -> Tensor:
    """The elements in rows of BLOCK, padded with zeros."""
    padding = -values.numel() % BLOCK
    return nn.functional.pad(values.flatten(), (0, padding)).view(-1, BLOCK)


def _unblocked(blocks: Tensor, shape: torch.Size) -> Tensor:
    return blocks.flatten()[: shape.numel()].view(shape)


def encode_signed(values: Tensor) -> tuple[Tensor, Tensor]:
    """Any values -> (int8 codes (blocks, 256), float32 scales (blocks, 1)): signed square roots in 127 steps."""
    blocks = _blocks(values)
    scales = blocks.abs().amax(dim=1, keepdim=True)
    fractions = blocks / torch.where(scales > 0, scales, 1.0)
    return (fractions.sign() * fractions.abs().sqrt() * 127).round().to(torch.int8), scales


def decode_signed(codes: Tensor, scales: Tensor, shape: torch.Size) -> Tensor:
    roots = codes.float() / 127
    return _unblocked(roots.sign() * roots.square() * scales, shape)


def encode_positive(values: Tensor) -> tuple[Tensor, Tensor]:
    """Values >= 0 -> (uint8 codes (blocks, 256), float32 scales (blocks, 1)): fourth roots in 255 steps.

    The code of a value above zero is at least 1, because the update is divided by the root of the value.
    """
    blocks = _blocks(values)
    scales = blocks.amax(dim=1, keepdim=True)
    fractions = blocks / torch.where(scales > 0, scales, 1.0)
    codes = (fractions.sqrt().sqrt() * 255).round()
    return torch.where(blocks > 0, codes.clamp(min=1), codes).to(torch.uint8), scales


def decode_positive(codes: Tensor, scales: Tensor, shape: torch.Size) -> Tensor:
    return _unblocked((codes.float() / 255).square().square() * scales, shape)


class AdamW8bit(torch.optim.Optimizer):
    """AdamW (decoupled weight decay); arguments and update as torch's."""

    def __init__(
        self,
        params: Iterable[nn.Parameter] | Iterable[dict[str, Any]],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """One update of every parameter that has a gradient."""
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._update(parameter, group)

    def _update(self, parameter: nn.Parameter, group: dict[str, Any]) -> None:
        state, gradient, shape = self.state[parameter], parameter.grad, parameter.shape
        assert gradient is not None
        is_coded = parameter.numel() >= MIN_ELEMENTS
        if not state:
            state["step"] = torch.zeros(())
            first, second = torch.zeros_like(parameter), torch.zeros_like(parameter)
        elif is_coded:
            first = decode_signed(state["exp_avg"], state["exp_avg_scale"], shape)
            second = decode_positive(state["exp_avg_sq"], state["exp_avg_sq_scale"], shape)
        else:
            first, second = state["exp_avg"], state["exp_avg_sq"]
        state["step"] += 1
        (beta1, beta2), count = group["betas"], float(state["step"])
        first.lerp_(gradient, 1 - beta1)
        second.mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
        parameter.mul_(1 - group["lr"] * group["weight_decay"])
        root = (second / (1 - beta2**count)).sqrt_().add_(group["eps"])
        parameter.addcdiv_(first, root, value=-group["lr"] / (1 - beta1**count))
        if is_coded:
            state["exp_avg"], state["exp_avg_scale"] = encode_signed(first)
            state["exp_avg_sq"], state["exp_avg_sq_scale"] = encode_positive(second)
        else:
            state["exp_avg"], state["exp_avg_sq"] = first, second
