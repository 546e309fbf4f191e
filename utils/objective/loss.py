"""The loss of the network's output: penalty of the error, mask, weight, and mean. Pure functions.

Shapes: B batch, C latent channels, H W latent height and width.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from utils.config.schema.objective_choices import LossType


class LossTarget(NamedTuple):
    """What the last stage compares the network's output with. A tuple, because the engine moves tuples of tensors."""

    output: Tensor
    """(B, C, H, W) float32: the output to be predicted."""
    error_scale: Tensor
    """(B,) float32: factor of the error before it is penalized."""
    weight: Tensor
    """(B,) float32: factor of each row's loss."""
    mask: Tensor
    """(B, 1, H, W) float32 in [0, 1]: factor of the penalty at each latent pixel; ones (B, 1, 1, 1) without masks."""


NO_TARGET = LossTarget(*(torch.empty(0) for _ in range(4)))
"""The target on every stage but the last."""


def penalty(error: Tensor, loss_type: LossType, huber_c: float) -> Tensor:
    """Returns the penalty of each error, elementwise.

    l2         e^2
    huber      2 c (sqrt(e^2 + c^2) - c)     e^2 where e << c, 2 c |e| where e >> c; differentiable everywhere
    smooth_l1  2 (sqrt(e^2 + c^2) - c)       2 |e| where e >> c
    Source of the smooth forms: arXiv 2403.16728, scaled as in the programs that docs/objective.md compares.
    """
    if loss_type == "l2":
        return error.square()
    # sqrt(e^2 + c^2) - c, in a form without cancellation where e << c.
    distance = error.square() / ((error.square() + huber_c**2).sqrt() + huber_c)
    return 2 * (huber_c * distance if loss_type == "huber" else distance)


def mean_loss(output: Tensor, target: LossTarget, loss_type: LossType, huber_c: float) -> Tensor:
    """Returns the mean loss over the batch, computed in float32; output (B, C, H, W).

    The mean is taken over all latent pixels: those whose mask is 0 add nothing to the sum but are counted.
    """
    error = (output.float() - target.output) * target.error_scale[:, None, None, None]
    penalties = penalty(error, loss_type, huber_c) * target.mask
    return (penalties.mean(dim=(1, 2, 3)) * target.weight).mean()
