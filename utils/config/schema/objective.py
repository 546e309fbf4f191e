"""The `[objective]` table."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, ValidationInfo, field_validator, model_validator

from utils.config.presets import PRESETS, Preset
from utils.config.schema.base import Float, Int, Table
from utils.objective.loss import LossType
from utils.objective.rectified_flow import PredictionType
from utils.objective.timestep_sampling import MAX_MODE_SCALE, MIN_MODE_SCALE, TimestepGrid, TimestepSampling
from utils.objective.weighting import WeightingScheme


class ObjectiveConfig(Table):
    """What the network is trained to do. docs/objective.md has every formula, with plots."""

    preset: Preset | None = Field(
        None,
        description="Sets this table to what another program computes: `sd3_paper`, `sd_scripts`, `diffusers` or "
        "`simpletuner`. Keys that are written too win.",
    )
    model_prediction_type: PredictionType = Field(
        "raw",
        description="`raw`: the output is the velocity. `sigma_scaled`: it is, and errors are those of the clean latents, "
        "sigma times as large. `additive`: output and noisy latents together are the velocity.",
    )
    timestep_sampling: TimestepSampling = Field(
        "sigma",
        description="How the flow time t is drawn: `sigma` (uniform), or by the SD3 paper's densities `logit_normal` "
        "(eq. 19), `mode` (eq. 20) and `cosmap` (eq. 21).",
    )
    weighting_scheme: WeightingScheme = Field(
        "logit_normal",
        description="How much each t counts: `none`, `sigma_sqrt`, `logit_normal`, `mode` or `cosmap`. Default: "
        "logit_normal, and none where `timestep_sampling` is not sigma.",
    )
    weighting_by: Literal["sampling", "loss"] = Field(
        "sampling",
        description="`sampling`: t is drawn so much more often where it counts more; `loss`: its loss is multiplied. The "
        "same in expectation; sampling varies far less.",
    )
    logit_mean: Float = Field(0.0, description="Of logit_normal, as density or weight: mean of logit(t). Above 0: noisier.")
    logit_std: Float = Field(1.0, ge=0.01, description="Of logit_normal: standard deviation of logit(t).")
    mode_scale: Float = Field(
        1.29,
        ge=MIN_MODE_SCALE,
        le=MAX_MODE_SCALE,
        description="Of the density mode: above 0 prefers the middle, below 0 the ends; from -1 to 2 / (pi - 2).",
    )
    mode_mean: Float = Field(0.5, description="Of the weight mode: the t that counts most.")
    mode_s_n: Float = Field(0.2, ge=0.001, description="Of the weight mode: its width s_n.")
    min_t: Float = Field(0.0, ge=0, lt=1, description="No t below this is drawn; before the shift.")
    max_t: Float = Field(1.0, gt=0, le=1, description="No t above this is drawn; before the shift.")
    discrete_flow_shift: Float = Field(
        3.0, ge=0.01, le=100, description="sigma = s t / (1 + (s - 1) t). SD3 and SD3.5 are sampled with 3.0 at 1024 pixels."
    )
    shift_resolution: Int | None = Field(
        None,
        ge=16,
        description="Side in pixels of the square at which the shift holds; elsewhere it is multiplied by sqrt(m / n) for m "
        "pixels against n (SD3 paper, eq. 23). Unset: the same shift at every size.",
    )
    timestep_grid: TimestepGrid = Field(
        "none",
        description="Rounding to thousandths, for comparison with programs that do it: `sd_scripts` (sigma, down), "
        "`diffusers` (t, up).",
    )
    loss_type: LossType = Field(
        "l2", description="Penalty of an error: `l2` (its square), `huber` or `smooth_l1` (less for large ones)."
    )
    huber_c: Float = Field(
        0.1,
        gt=0,
        description="Of huber and smooth_l1: the error (with sigma_scaled, of clean latents) above which it counts less.",
    )
    caption_dropout_rate: Float = Field(
        0.0, ge=0, le=1, description="Share of draws at which the caption is replaced by an empty one, for guidance."
    )
    encoder_dropout_rate: float | dict[str, float] = Field(
        0.0,
        description="Share of draws at which a text encoder's output is replaced by zeros, each encoder for itself: one "
        "number for all, or a table such as { clip_l = 0.1, t5xxl = 0.2 }.",
    )

    @field_validator("encoder_dropout_rate", mode="before")
    @classmethod
    def _rates(cls, value: Any) -> Any:
        rates = {f"{name} = ": rate for name, rate in value.items()} if isinstance(value, dict) else {"": value}
        for name, rate in rates.items():
            if isinstance(rate, bool) or not isinstance(rate, int | float) or not 0 <= rate <= 1:
                raise ValueError(f"{name}{rate!r} is no number from 0 to 1")
        return value

    @model_validator(mode="before")
    @classmethod
    def _fill_in(cls, written: Any) -> Any:
        """The preset's values under what is written, and the default that depends on another key."""
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
    def _no_square(cls, value: str, info: ValidationInfo) -> str:
        if value == info.data.get("timestep_sampling"):
            raise ValueError(
                f"timestep_sampling is {value!r} too: the density would count twice; set timestep_sampling = "
                '"sigma", or weighting_scheme = "none"'
            )
        return value
