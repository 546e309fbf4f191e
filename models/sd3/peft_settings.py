"""The settings peft stores with an adapter."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import safe_open

from models.sd3.lora_keys import DIFFUSERS_PREFIX


def read_peft_settings(path: Path) -> Mapping[str, Any]:
    """Returns the settings stored in a file's header or next to it; {} if there are none. Raises ValueError or OSError."""
    config_file = path.with_name("adapter_config.json")
    with safe_open(path, "pt") as file:
        header: str | None = (file.metadata() or {}).get("lora_adapter_metadata")
    if header is None and not (path.name == "adapter_model.safetensors" and config_file.is_file()):
        return {}
    settings = json.loads(config_file.read_text(encoding="utf-8") if header is None else header)
    if not isinstance(settings, dict):
        raise ValueError("not a table")
    if header is None:
        return settings
    return {key.removeprefix(DIFFUSERS_PREFIX): value for key, value in settings.items() if key.startswith(DIFFUSERS_PREFIX)}


def peft_scale(settings: Mapping[str, Any], name: str, rank: int | None) -> float:
    """Returns the scale of a module (its name in the file) as peft computes it, also for LoKr with two whole factors."""
    module = re.sub(r"^(base_model\.model\.)?(transformer\.)?", "", name)

    def for_module(patterns: str, otherwise: Any) -> Any:
        found: Mapping[str, Any] = settings.get(patterns) or {}
        return next((value for key, value in found.items() if re.match(rf"(.*\.)?({key})$", module)), otherwise)

    alpha = for_module("alpha_pattern", settings.get("lora_alpha", settings.get("alpha")))
    rank = rank or for_module("rank_pattern", settings.get("r"))
    if alpha is None or not rank:
        return 1.0
    return float(alpha) / (rank**0.5 if settings.get("use_rslora") else rank)
