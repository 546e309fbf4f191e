"""The `[optimizer]` table with its parameter groups, and the `[ema]` table."""

from __future__ import annotations

import re
from collections import Counter
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationInfo, field_validator

from utils.config.schema.base import Bool, Float, Int, Table

DEFAULT_GROUP = "default"
"""Name of the group of all parameters that no pattern matches."""
NO_DECAY = ".no_decay"
"""What follows a group's name in the name of the group of its norms and biases, if these have no weight decay."""

Course = Literal[
    "constant", "linear", "cosine", "cosine_with_restarts", "polynomial", "inverse_sqrt", "warmup_stable_decay"
]
"""Course of the learning rate after the warm-up."""
MasterKind = Literal["float32", "split", "stochastic"]
"""How float32 weights are kept beside bfloat16 weights; see docs/training.md."""
WarmUp = Annotated[Int, Field(ge=0)] | Annotated[Float, Field(gt=0, lt=1)]
"""Steps, or a fraction of all steps."""


class OptimizerGroupConfig(Table):
    """A group of trained parameters with its own learning rate, schedule or weight decay. Keys that are not set have the
    values of `[optimizer]`. A parameter that several patterns match belongs to the last of these groups."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9_-]+$")] = Field(
        description="Name of the group in logs: letters, digits, `_` and `-`. Unique; `default` is the group of all "
        "parameters that no pattern matches."
    )
    pattern: str = Field(description="Regular expression that must match the whole native name of a parameter.")
    learning_rate: Float | None = Field(
        None, gt=0, description="Peak learning rate of this group. Default: `learning_rate` of `[optimizer]`."
    )
    lr_mult: Float | None = Field(
        None, gt=0, description="Peak learning rate of this group as a multiple of `learning_rate` of `[optimizer]`."
    )
    weight_decay: Float | None = Field(
        None,
        ge=0,
        description="Weight decay of this group; only for optimizers that have the argument `weight_decay`. Default: "
        "`args.weight_decay` of `[optimizer]`, or the optimizer's own default.",
    )
    lr_scheduler: Course | None = Field(
        None, description="Course of the learning rate after the warm-up. Default: `lr_scheduler` of `[optimizer]`."
    )
    lr_warmup_steps: WarmUp | None = Field(
        None,
        description="Warm-up of this group, in steps or as a fraction of all. Default: `lr_warmup_steps` of `[optimizer]`.",
    )
    lr_min_ratio: Float | None = Field(
        None,
        ge=0,
        le=1,
        description="Learning rate of the last step, as a fraction of this group's peak. Default: `lr_min_ratio` of "
        "`[optimizer]`.",
    )
    lr_cycles: Int | None = Field(
        None, ge=1, description="Number of falls from this group's peak. Default: `lr_cycles` of `[optimizer]`."
    )
    lr_power: Float | None = Field(
        None, gt=0, description="Exponent of the course of this group. Default: `lr_power` of `[optimizer]`."
    )
    lr_decay_steps: WarmUp | None = Field(
        None,
        description="Last steps over which the learning rate of this group falls, or a fraction of all. Default: "
        "`lr_decay_steps` of `[optimizer]`.",
    )

    @field_validator("name")
    @classmethod
    def _is_not_reserved(cls, value: str) -> str:
        if value == DEFAULT_GROUP:
            raise ValueError("is reserved for the parameters that no pattern matches; choose another name")
        return value

    @field_validator("lr_mult")
    @classmethod
    def _is_the_only_peak(cls, value: float | None, info: ValidationInfo) -> float | None:
        if value is not None and info.data.get("learning_rate") is not None:
            raise ValueError("learning_rate is set too, and both define the peak; remove one of them")
        return value

    @field_validator("pattern")
    @classmethod
    def _compiles(cls, value: str) -> str:
        try:
            re.compile(value)
        except (re.error, OverflowError) as error:
            raise ValueError(f"is not a regular expression: {error}") from error
        return value


class OptimizerConfig(Table):
    """How weights are updated from gradients."""

    type: str = Field("AdamW", description="Name of an optimizer; docs/optimizers.md lists them.")
    learning_rate: Float = Field(gt=0, description="Peak learning rate: its value after the warm-up.")
    args: dict[str, Any] = Field(
        default_factory=dict, description="Further arguments of that class, such as `weight_decay` or `betas`."
    )
    gradient_clipping: Float = Field(
        1.0,
        ge=0,
        description="Largest norm of the gradient over all stages. Gradients with a larger norm are scaled down to it. "
        "0: no clipping.",
    )
    lr_scheduler: Course = Field(
        "constant",
        description="Course of the learning rate after the warm-up. All but `constant` and `inverse_sqrt` reach "
        "`lr_min_ratio` times the peak at the last step. `warmup_stable_decay`: constant, then linear over the last "
        "`lr_decay_steps`. `inverse_sqrt`: the peak times the root of `lr_warmup_steps` / step.",
    )
    lr_warmup_steps: WarmUp = Field(
        0,
        description="First steps over which the learning rate rises linearly from near 0 to its peak: a number of steps, or "
        "a fraction of all steps such as 0.05.",
    )
    lr_cycles: Int = Field(1, ge=1, description="Number of falls from the peak; for `cosine_with_restarts`.")
    lr_power: Float = Field(2.0, gt=0, description="Exponent of the course; for `polynomial`. 1 is `linear`.")
    lr_decay_steps: WarmUp = Field(
        0.2, description="Last steps over which the learning rate falls, or a fraction of all; for `warmup_stable_decay`."
    )
    lr_min_ratio: Float = Field(
        0.0,
        ge=0,
        le=1,
        description="Learning rate of the last step, as a fraction of the peak; not for `constant` and `inverse_sqrt`.",
    )
    master: MasterKind | None = Field(
        None,
        description="What is kept beside bfloat16 weights so that small updates are not lost. `float32`: float32 weights, 4 "
        "bytes per weight. `split`: the bits that rounding takes away, which make the same float32 weights with 2 bytes. "
        "`stochastic`: nothing; updates are rounded up or down at random. Cannot change when "
        "a run resumes. Default: as in the checkpoint it resumes from; for a new run `float32` for adapters, else `split`. "
        'Only for `dtype = "bfloat16"`.',
    )
    step_in_backward: Bool = Field(
        False,
        description="Update each weight as soon as its gradient is there, which saves the memory of the gradients. Only "
        "with one process, `gradient_accumulation_steps = 1` and `gradient_clipping = 0`.",
    )
    loraplus_lr_ratio: Float | None = Field(
        None,
        gt=0,
        description="LoRA+: learning rate of the `up` matrices (B) of a LoRA, as a multiple of that of their group. For "
        '`adapter.type = "lora"` only. Unset: 1, without groups of their own.',
    )
    decay_norms_and_biases: Bool = Field(
        True,
        description="`false`: norms and biases have no weight decay, in no group. These are the scales of norms, the "
        "magnitudes of a DoRA and all other vectors; matrices and embedding tables keep their weight decay.",
    )
    groups: list[OptimizerGroupConfig] | None = Field(
        None, min_length=1, description="Groups of parameters with other settings. Unset: all parameters share these."
    )

    @field_validator("groups")
    @classmethod
    def _have_unique_names(cls, value: list[OptimizerGroupConfig] | None) -> list[OptimizerGroupConfig] | None:
        counts = Counter(group.name for group in value or [])
        repeated = [repr(name) for name, count in counts.items() if count > 1]
        if repeated:
            raise ValueError(f"each group needs a unique name; used more than once: {', '.join(repeated)}")
        return value


class EmaConfig(Table):
    """Keeps an exponential moving average (EMA) of the trained weights. Without this table there is none."""

    decay: Float = Field(
        0.9999,
        gt=0,
        lt=1,
        description="Factor of the previous average in each step; the new weights have the factor 1 - `decay`.",
    )
    warmup: Bool = Field(
        True,
        description="Use the smaller of `decay` and (1 + n) / (10 + n) after step n, so that early weights fade sooner.",
    )
