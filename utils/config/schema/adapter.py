"""The `[adapter]` table."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, ValidationInfo, field_serializer, field_validator

from utils.config.schema.base import Bool, Float, Int, Table


class TargetConfig(Table):
    """An entry of `targets` with its own rank or alpha, such as `{ pattern = "attn", rank = 8 }`."""

    pattern: str = Field(
        description="Name of a group of modules (docs/training.md), or regular expression that must match the whole native "
        "name of a module."
    )
    rank: Int | None = Field(None, ge=1, description="Rank for these modules. Default: `rank` of `[adapter]`.")
    alpha: Float | None = Field(
        None, gt=0, description="Alpha for these modules. Default: `alpha` of `[adapter]`, or their rank when that is unset."
    )


def _as_target(entry: Any) -> Any:
    if isinstance(entry, str):
        return {"pattern": entry}
    if not isinstance(entry, dict | TargetConfig):
        raise ValueError("must be a string, or a table such as { pattern = 'attn', rank = 8 }")
    return entry


class AdapterConfig(Table):
    """Trains a small adapter and keeps the network's own weights frozen. Without this table the whole network is trained."""

    type: Literal["lora", "lokr"] = Field(
        description="Kind of adapter. `lora`: the product of two low-rank matrices. `lokr`: a Kronecker product, which has "
        "fewer parameters."
    )
    rank: Int = Field(16, ge=1, description="Rank of the update. For `lokr`: rank of the Kronecker product's second factor.")
    alpha: Float | None = Field(
        None, gt=0, description="The update is multiplied by alpha / rank. Default: the rank, so that the factor is 1."
    )
    rank_stabilized: Bool = Field(
        False,
        description="Multiply the update by alpha / sqrt(rank) instead (rsLoRA), so that high ranks learn as fast as low "
        "ones. For `lora` only.",
    )
    dora: Bool = Field(
        False, description="Train the norm of each row of a weight separately from its direction (DoRA). For `lora` only."
    )
    targets: list[Annotated[TargetConfig, BeforeValidator(_as_target)]] | None = Field(
        None,
        min_length=1,
        description="Modules that get an adapter. Each entry is the name of a group of modules (docs/training.md), a "
        "regular expression that must match the whole native name of a module, or a table with either of them and its own "
        "rank or alpha. The last entry that matches a module applies. Default: the default groups of the model family.",
    )
    blocks: str | None = Field(
        None,
        description='Indices of the transformer blocks whose modules get an adapter, such as `"0-11,20"`. Modules outside '
        "of the blocks are not affected. Unset: all blocks.",
    )
    init_from: Path | None = Field(
        None,
        description="Adapter file with the initial weights, with native or diffusers keys. Unset: an adapter that does not "
        "change the network's output.",
    )

    @field_validator("rank_stabilized", "dora")
    @classmethod
    def _low_rank_only(cls, value: bool, info: ValidationInfo) -> bool:
        if value and info.data.get("type") == "lokr":
            raise ValueError('is for type = "lora" only; remove the key, or change the type')
        return value

    @field_serializer("targets")
    def _plain_strings(self, targets: list[TargetConfig] | None) -> list[str] | list[dict[str, Any]] | None:
        """Returns strings when no entry has a rank or alpha, else tables: the toml package cannot write a mixed list."""
        if targets is None:
            return None
        if all(target.rank is None and target.alpha is None for target in targets):
            return [target.pattern for target in targets]
        return [target.model_dump(exclude_none=True) for target in targets]
