"""The base class of all tables and the types of their fields."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Any, Literal, get_args

from pydantic import BaseModel, ConfigDict, Strict

# Strict because TOML has its own types: "3" is not an integer, and true is neither 1 nor 1.0. A float may be written as 1.
Int = Annotated[int, Strict()]
Float = Annotated[float, Strict()]
Bool = Annotated[bool, Strict()]
TrainedWeights = Literal["last", "ema"]
"""Weights that previews and evaluations use: the current ones or their moving average."""


class Table(BaseModel):
    """A table of a TOML file: typed, read-only, without unknown keys."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


def inner_tables(annotation: Any) -> Iterator[type[BaseModel]]:
    """Yields the tables in the type of a field, whether alone, in a list or in a union."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for part in get_args(annotation):
        yield from inner_tables(part)
