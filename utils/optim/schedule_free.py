"""The weights that a schedule-free optimizer would have evaluated.

Schedule-free optimizers (Defazio and others, "The Road Less Scheduled", 2024) train at one point y of the weights, keep a
second point z, and are evaluated at the average x with y = (1 - beta) z + beta x. Their own `eval` method moves the weights
to x and `train` moves them back, with rounding errors; x is computed here instead.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor


def evaluation_weights(weights: Tensor, state: Mapping[str, Any], group: Mapping[str, Any]) -> Tensor:
    """The weights to evaluate, export and generate previews with: `weights` itself for any other optimizer."""
    if "train_mode" not in group or "z" not in state:
        return weights
    beta = group["momentum"] if "momentum" in group else group["betas"][0]
    return weights.lerp(state["z"].to(weights.dtype), 1 - 1 / beta)
