"""The `[optimizer]` and `[ema]` tables."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field

from utils.config.schema.base import Bool, Float, Int, Table


class OptimizerConfig(Table):
    """How weights follow gradients."""

    type: str = Field("AdamW", description="Name of a class in torch.optim.")
    learning_rate: Float = Field(gt=0, description="Highest learning rate.")
    args: dict[str, Any] = Field(
        default_factory=dict, description="Further arguments of that class, such as `weight_decay` or `betas`."
    )
    gradient_clipping: Float = Field(
        1.0, ge=0, description="Largest norm of the gradient over all stages; larger ones are scaled down. 0: off."
    )
    lr_scheduler: Literal["constant", "linear", "cosine"] = Field(
        "constant", description="Course of the learning rate after the warm-up; linear and cosine end at the last step."
    )
    lr_warmup_steps: Int = Field(0, ge=0, description="Steps over which the learning rate rises linearly from near 0.")
    lr_min_ratio: Float = Field(0.0, ge=0, le=1, description="Learning rate of the last step, as a share of the highest.")


class EmaConfig(Table):
    """Keep an exponential moving average (EMA) of the trained weights; without this table there is none."""

    decay: Float = Field(
        0.9999, gt=0, lt=1, description="Share of the average that one step leaves; the rest is new weights."
    )
    warmup: Bool = Field(
        True, description="Leave less at first: (1 + n) / (10 + n) after step n, until that is more than `decay`."
    )
