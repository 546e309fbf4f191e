"""The base class of all tables and the types of their fields."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Any, Literal, get_args

from pydantic import BaseModel, ConfigDict, Strict

# Strict: TOML has types of its own, so "3" is no number and true is neither 1 nor 1.0. A float may be written as 1.
Int = Annotated[int, Strict()]
Float = Annotated[float, Strict()]
Bool = Annotated[bool, Strict()]
TrainedWeights = Literal["last", "ema"]


class Table(BaseModel):
    """A table of a TOML file: typed, closed, read-only."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


def inner_tables(annotation: Any) -> Iterator[type[BaseModel]]:
    """The tables in the type of a field, alone, in lists or as alternatives."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for part in get_args(annotation):
        yield from inner_tables(part)
