"""The `[adapter]` table."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, ValidationInfo, field_serializer, field_validator

from utils.config.schema.base import Bool, Float, Int, Table


class TargetConfig(Table):
    """An entry of `targets` with a rank or alpha of its own: `{ pattern = "attn", rank = 8 }`."""

    pattern: str = Field(description="Name of a group of modules, or regular expression over whole native module names.")
    rank: Int | None = Field(None, ge=1, description="Rank of these modules. Default: that of `[adapter]`.")
    alpha: Float | None = Field(
        None, gt=0, description="Alpha of these modules. Default: that of `[adapter]`, and where it has none, their rank."
    )


def _as_target(entry: Any) -> Any:
    if isinstance(entry, str):
        return {"pattern": entry}
    if not isinstance(entry, dict | TargetConfig):
        raise ValueError("must be a string, or a table such as { pattern = 'attn', rank = 8 }")
    return entry


class AdapterConfig(Table):
    """Train a small adapter; without this table the whole network is trained."""

    type: Literal["lora", "lokr"] = Field(
        description="Kind of adapter: `lora`, two thin matrices (low rank); `lokr`, a Kronecker product, smaller still."
    )
    rank: Int = Field(16, ge=1, description="Rank of the update; of `lokr`, rank of the product's second factor.")
    alpha: Float | None = Field(None, gt=0, description="Strength: the update is scaled by alpha / rank. Default: rank.")
    rank_stabilized: Bool = Field(
        False, description="Scale by alpha / sqrt(rank) instead (rsLoRA), so that high ranks learn as fast. `lora` only."
    )
    dora: Bool = Field(False, description="Train the length of each row of the weights apart (DoRA). `lora` only.")
    targets: list[Annotated[TargetConfig, BeforeValidator(_as_target)]] | None = Field(
        None,
        min_length=1,
        description="Modules that get an adapter. Each entry is a string, the name of a group (docs/training.md) or a "
        "regular expression over whole native module names, or a table with rank and alpha of its own; the last that "
        "matches a module decides them. Default: the groups attn, mlp and final_layer.",
    )
    blocks: str | None = Field(
        None, description='Only these blocks\' modules, such as "0-11,20". Modules outside of blocks are not touched by it.'
    )
    init_from: Path | None = Field(
        None, description="An adapter file to start from, with native or diffusers' keys. Unset: a fresh start."
    )

    @field_validator("rank_stabilized", "dora")
    @classmethod
    def _low_rank_only(cls, value: bool, info: ValidationInfo) -> bool:
        if value and info.data.get("type") == "lokr":
            raise ValueError('goes with type = "lora" only; leave it out, or change the type')
        return value

    @field_serializer("targets")
    def _plain_strings(self, targets: list[TargetConfig] | None) -> list[str] | list[dict[str, Any]] | None:
        """Strings where no entry says more: as it was written, and as toml can write it."""
        if targets is None:
            return None
        if all(target.rank is None and target.alpha is None for target in targets):
            return [target.pattern for target in targets]
        return [target.model_dump(exclude_none=True) for target in targets]
