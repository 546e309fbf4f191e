"""The `[objective]` table."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, ValidationInfo, field_validator, model_validator

from utils.config.presets import PRESETS, Preset
from utils.config.schema.base import Float, Int, Table
from utils.config.schema.objective_choices import (
    MAX_MODE_SCALE,
    MIN_MODE_SCALE,
    LossType,
    PredictionType,
    TimestepGrid,
    TimestepSampling,
    WeightingScheme,
)


class ObjectiveConfig(Table):
    """What the network is trained to predict, at which noise levels, and with which loss. docs/objective.md has the formulas
    and plots."""

    preset: Preset | None = Field(
        None,
        description="Sets the keys of this table to what another program computes by default: `sd3_paper`, `sd_scripts`, "
        "`diffusers` or `simpletuner`. Keys that are also written override the preset.",
    )
    model_prediction_type: PredictionType = Field(
        "raw",
        description="What the network's output means. `raw`: the velocity; the loss is the velocity's error. "
        "`sigma_scaled`: the velocity; the loss is the error of the clean latents, sigma times the velocity's. `additive`: "
        "the velocity minus the noisy latents; the loss is the velocity's error.",
    )
    timestep_sampling: TimestepSampling = Field(
        "sigma",
        description="Density of the flow time t: `sigma` (uniform), or the SD3 paper's `logit_normal` (eq. 19), `mode` "
        "(eq. 20) or `cosmap` (eq. 21).",
    )
    weighting_scheme: WeightingScheme = Field(
        "logit_normal",
        description="Weight of each t in the loss: `none`, `sigma_sqrt`, `logit_normal`, `mode` or `cosmap`. Default: "
        '`logit_normal`, or `none` when `timestep_sampling` is not `"sigma"`.',
    )
    weighting_by: Literal["sampling", "loss"] = Field(
        "sampling",
        description="How the weight is applied. `sampling`: t is drawn in proportion to density times weight. `loss`: t is "
        "drawn from the density and its loss is multiplied by the weight. The expected gradient is the same; with "
        "`sampling` its variance is lower.",
    )
    logit_mean: Float = Field(
        0.0, description="For `logit_normal`, as density or weight: mean of logit(t). Positive values favour noisier t."
    )
    logit_std: Float = Field(
        1.0, ge=0.01, description="For `logit_normal`, as density or weight: standard deviation of logit(t)."
    )
    mode_scale: Float = Field(
        1.29,
        ge=MIN_MODE_SCALE,
        le=MAX_MODE_SCALE,
        description="For the density `mode`: positive values favour the middle of t, negative ones its ends, 0 is uniform. "
        "From -1 to 2 / (pi - 2).",
    )
    mode_mean: Float = Field(0.5, description="For the weight `mode`: the t with the largest weight.")
    mode_s_n: Float = Field(0.2, ge=0.001, description="For the weight `mode`: width of the peak, in units of t.")
    min_t: Float = Field(0.0, ge=0, lt=1, description="Smallest t that is drawn, before the shift.")
    max_t: Float = Field(1.0, gt=0, le=1, description="Largest t that is drawn, before the shift.")
    discrete_flow_shift: Float = Field(
        3.0,
        ge=0.01,
        le=100,
        description="Shift s of the noise levels: sigma = s t / (1 + (s - 1) t). Values above 1 favour noisier levels. Use "
        "the shift that the model is sampled with.",
    )
    shift_resolution: Int | None = Field(
        None,
        ge=16,
        description="Side in pixels of the square image for which `discrete_flow_shift` is meant. An image of m pixels has "
        "that shift times sqrt(m) / `shift_resolution` (SD3 paper, eq. 23). Unset: the same shift for all image sizes.",
    )
    timestep_grid: TimestepGrid = Field(
        "none",
        description="Rounding to multiples of 1/1000, for comparison with other programs: `sd_scripts` rounds sigma down, "
        "`diffusers` rounds t up.",
    )
    loss_type: LossType = Field(
        "l2",
        description="Penalty of an error: `l2` (its square), or `huber` or `smooth_l1` (quadratic for small errors, linear "
        "for large ones).",
    )
    huber_c: Float = Field(
        0.1,
        gt=0,
        description="For `huber` and `smooth_l1`: the error at which the penalty changes from quadratic to linear. An error "
        "of the clean latents with `sigma_scaled`, else of the velocity.",
    )
    caption_dropout_rate: Float = Field(
        0.0,
        ge=0,
        le=1,
        description="Probability that a caption is replaced by the empty caption at one draw of an image (for "
        "classifier-free guidance).",
    )
    encoder_dropout_rate: float | dict[str, float] = Field(
        0.0,
        description="Probability that the output of a text encoder is replaced by zeros at one draw of an image, "
        "independently for each encoder: one number for all, or a table of encoder names with a number each.",
    )

    @field_validator("encoder_dropout_rate", mode="before")
    @classmethod
    def _rates(cls, value: Any) -> Any:
        rates = {f"{name} = ": rate for name, rate in value.items()} if isinstance(value, dict) else {"": value}
        for name, rate in rates.items():
            if isinstance(rate, bool) or not isinstance(rate, int | float) or not 0 <= rate <= 1:
                raise ValueError(f"{name}{rate!r} is not a number from 0 to 1")
        return value

    @model_validator(mode="before")
    @classmethod
    def _fill_in(cls, written: Any) -> Any:
        """Adds the values of the preset for keys that are not written, and the default that depends on another key."""
        if not isinstance(written, dict):
            return written
        preset = written.get("preset")
        values = {**(PRESETS.get(preset, {}) if isinstance(preset, str) else {}), **written}
        if values.get("timestep_sampling", "sigma") != "sigma":
            values.setdefault("weighting_scheme", "none")
        return values

    @field_validator("max_t")
    @classmethod
    def _above_min_t(cls, value: float, info: ValidationInfo) -> float:
        if value <= info.data.get("min_t", 0.0):
            raise ValueError(f"must be above min_t, {info.data['min_t']}")
        return value

    @field_validator("weighting_scheme")
    @classmethod
    def _is_not_the_density(cls, value: str, info: ValidationInfo) -> str:
        if value == info.data.get("timestep_sampling"):
            raise ValueError(
                f"timestep_sampling is also {value!r}, so the density would be applied twice; set timestep_sampling = "
                '"sigma", or weighting_scheme = "none"'
            )
        return value
