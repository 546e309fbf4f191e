"""Objectives with the shift rule of SD3, for tests."""

from __future__ import annotations

from typing import Any

from models.sd3.family import SD3Family
from utils.config.schema.objective import ObjectiveConfig
from utils.objective.objective import Objective


def sd3_objective(**settings: Any) -> Objective:
    """Returns the objective of an `[objective]` table with these keys."""
    return Objective(ObjectiveConfig(**settings), SD3Family.shift_at)
