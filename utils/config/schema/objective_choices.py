"""The choices of `[objective]` by name, and bounds of its numbers. utils/objective implements them."""

from __future__ import annotations

import math
from typing import Literal

PredictionType = Literal["raw", "sigma_scaled", "additive"]
TimestepSampling = Literal["sigma", "logit_normal", "mode", "cosmap"]
TimestepGrid = Literal["none", "sd_scripts", "diffusers"]
WeightingScheme = Literal["none", "sigma_sqrt", "logit_normal", "mode", "cosmap"]
LossType = Literal["l2", "huber", "smooth_l1"]

MIN_MODE_SCALE, MAX_MODE_SCALE = -1.0, 2 / (math.pi - 2)
"""f_mode is monotonic for scales between these (SD3 paper, arXiv 2403.03206, sect. 3.1)."""
