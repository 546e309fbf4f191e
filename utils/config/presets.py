"""Presets of `[objective]`: the objectives of other programs, expressed in this program's keys.

Each preset reproduces the defaults of a program; docs/objective.md has the formulas and compares the terms. Sources:
kohya-ss/sd-scripts 0.10 (sd3_train.py), diffusers 0.42 (train_dreambooth_sd3.py), SimpleTuner 3, and the SD3 paper, arXiv
2403.03206.
"""

from __future__ import annotations

from typing import Any, Literal

Preset = Literal["sd3_paper", "sd_scripts", "diffusers", "simpletuner"]

PRESETS: dict[str, dict[str, Any]] = {
    "sd3_paper": {
        "model_prediction_type": "raw",
        "timestep_sampling": "logit_normal",
        "weighting_scheme": "none",
        "logit_mean": 0.0,
        "logit_std": 1.0,
        "discrete_flow_shift": 3.0,
        "timestep_grid": "none",
        "loss_type": "l2",
        "encoder_dropout_rate": 0.464,
    },
    "sd_scripts": {
        "model_prediction_type": "sigma_scaled",
        "timestep_sampling": "sigma",
        "weighting_scheme": "none",
        "discrete_flow_shift": 1.0,
        "timestep_grid": "sd_scripts",
        "loss_type": "l2",
    },
    "diffusers": {
        "model_prediction_type": "sigma_scaled",
        "timestep_sampling": "logit_normal",
        "weighting_scheme": "none",
        "logit_mean": 0.0,
        "logit_std": 1.0,
        "discrete_flow_shift": 3.0,
        "timestep_grid": "diffusers",
        "loss_type": "l2",
    },
    "simpletuner": {
        "model_prediction_type": "raw",
        "timestep_sampling": "logit_normal",
        "weighting_scheme": "none",
        "logit_mean": 0.0,
        "logit_std": 1.0,
        "discrete_flow_shift": 3.0,
        "timestep_grid": "none",
        "loss_type": "l2",
    },
}
