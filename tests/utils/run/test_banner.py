"""The rows and notes of the start banner about the objective."""

from __future__ import annotations

import pytest

from utils.config.presets import PRESETS
from utils.config.schema.objective import ObjectiveConfig
from utils.run.banner import objective_notes, objective_rows


def test_rows_describe_the_objective_in_use() -> None:
    assert objective_rows(ObjectiveConfig()) == [
        ("time density", "sigma"),
        ("loss weight", "logit_normal by sampling"),
        ("shift", "3"),
        ("prediction", "raw"),
        ("loss", "l2"),
        ("numbers", "logit_mean 0, logit_std 1"),
    ]
    config = ObjectiveConfig(timestep_sampling="mode", shift_resolution=512, min_t=0.25, loss_type="huber")
    assert objective_rows(config) == [
        ("time density", "mode"),
        ("loss weight", "none"),
        ("shift", "3 at 512x512, scaled with the resolution elsewhere"),
        ("prediction", "raw"),
        ("loss", "huber"),
        ("t", "from 0.25 to 1"),
        ("numbers", "mode_scale 1.29, huber_c 0.1"),
    ]
    rows = dict(objective_rows(ObjectiveConfig(preset="sd_scripts", encoder_dropout_rate={"clip_l": 0.5})))
    assert rows["rounding"] == "as sd_scripts"
    assert rows["encoder dropout"] == "{'clip_l': 0.5}"


@pytest.mark.parametrize("preset", sorted(PRESETS))
def test_note_lists_what_a_preset_set_and_what_overrides_it(preset: str) -> None:
    (note,) = objective_notes(ObjectiveConfig(preset=preset, discrete_flow_shift=1.25))
    assert note.startswith(f"objective.preset = '{preset}' sets ")
    assert note.endswith("; overridden by discrete_flow_shift = 1.25")
    assert all(f"{key} = {value!r}" in note for key, value in PRESETS[preset].items())
    assert "overridden" not in objective_notes(ObjectiveConfig(preset=preset))[0]


def test_notes_list_keys_without_effect_and_outputs_that_other_programs_cannot_use() -> None:
    assert objective_notes(ObjectiveConfig()) == []
    (note,) = objective_notes(ObjectiveConfig(mode_scale=0.5))
    assert note == "objective.mode_scale has no effect on this objective"
    (note,) = objective_notes(ObjectiveConfig(model_prediction_type="additive"))
    assert "other programs cannot use it" in note
