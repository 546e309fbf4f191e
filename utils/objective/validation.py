"""Errors in the `[objective]` table that involve several keys, and keys that have no effect."""

from __future__ import annotations

from utils.config.presets import PRESETS
from utils.config.schema.objective import ObjectiveConfig
from utils.objective.objective import make_sampler

MIN_MEAN_WEIGHT = 1e-4
"""With a lower mean weight all losses are close to zero; usually min_t or max_t was written as a timestep from 0 to 1000."""


def keys_in_use(config: ObjectiveConfig) -> dict[str, bool]:
    """Returns for each key that only some objectives use whether this objective uses it."""
    normal = "logit_normal" in (config.timestep_sampling, config.weighting_scheme)
    return {
        "logit_mean": normal,
        "logit_std": normal,
        "mode_scale": config.timestep_sampling == "mode",
        "mode_mean": config.weighting_scheme == "mode",
        "mode_s_n": config.weighting_scheme == "mode",
        "huber_c": config.loss_type != "l2",
        "weighting_by": config.weighting_scheme != "none",
    }


def unread_keys(config: ObjectiveConfig) -> list[str]:
    """Returns the keys that have no effect on this objective but differ from the preset's value or the default."""
    defaults = {name: field.default for name, field in type(config).model_fields.items()}
    usual = {**defaults, **(PRESETS[config.preset] if config.preset is not None else {})}
    values = config.model_dump()
    return sorted(key for key, used in keys_in_use(config).items() if not used and values[key] != usual[key])


def objective_errors(config: ObjectiveConfig) -> list[tuple[str, str]]:
    """Returns, as (key, message), combinations of valid values that leave nothing or almost nothing to train."""
    advice = "widen min_t to max_t, or change timestep_sampling or weighting_scheme"
    by_sampling = config.model_copy(update={"weighting_by": "sampling"})
    try:
        mean = make_sampler(by_sampling, config.discrete_flow_shift).mean_weight
    except ValueError as error:
        return [("objective", f"{error}; {advice}")]
    if mean < MIN_MEAN_WEIGHT:
        message = f"the mean weight {config.weighting_scheme} between min_t and max_t is almost zero: {mean:.1g}"
        return [("objective", f"{message}; {advice}")]
    return []
