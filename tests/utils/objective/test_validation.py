"""utils/objective/validation.py: combinations of keys that are errors, and keys that have no effect."""

from __future__ import annotations

import pytest
from pydantic import ValidationError

from utils.config.presets import PRESETS
from utils.config.schema.objective import ObjectiveConfig
from utils.objective.validation import objective_errors, unread_keys


@pytest.mark.parametrize("scheme", ["logit_normal", "mode", "cosmap"])
def test_the_same_scheme_as_density_and_weight_is_an_error(scheme: str) -> None:
    with pytest.raises(ValidationError, match="applied twice"):
        ObjectiveConfig(timestep_sampling=scheme, weighting_scheme=scheme)
    assert ObjectiveConfig(timestep_sampling=scheme).weighting_scheme == "none", "a density alone is valid"


def test_unread_keys_are_those_without_effect() -> None:
    config = ObjectiveConfig(weighting_scheme="mode", logit_std=2.0, mode_scale=0.5, mode_s_n=0.3, huber_c=0.2)
    assert unread_keys(config) == ["huber_c", "logit_std", "mode_scale"]
    assert unread_keys(ObjectiveConfig(weighting_scheme="none", weighting_by="loss")) == ["weighting_by"]
    assert unread_keys(ObjectiveConfig(preset="simpletuner", timestep_sampling="sigma", logit_mean=0.5)) == ["logit_mean"]
    for preset in PRESETS:
        config = ObjectiveConfig(preset=preset)
        assert unread_keys(config) == unread_keys(ObjectiveConfig(**config.model_dump())) == [], (
            "also in the copy that a run saves"
        )


def test_a_weight_that_is_almost_zero_between_the_bounds_is_an_error() -> None:
    config = ObjectiveConfig(weighting_scheme="mode", mode_mean=-1.0, mode_s_n=1e-3, min_t=0.5)
    ((key, message),) = objective_errors(config)
    assert key == "objective"
    assert "zero everywhere between min_t and max_t" in message
    for settings in ({"mode_mean": 20.0, "weighting_scheme": "mode"}, {"min_t": 0.999}):
        for by in ("loss", "sampling"):
            (error,) = objective_errors(ObjectiveConfig(weighting_by=by, **settings))
            assert "almost zero" in error[1] or "zero everywhere" in error[1]
    assert objective_errors(ObjectiveConfig()) == []
