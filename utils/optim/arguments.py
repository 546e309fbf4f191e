"""Checks of `optimizer.args` against the signature of the optimizer: names, types and ranges."""

from __future__ import annotations

import difflib
import inspect
import math
from collections.abc import Mapping
from typing import Any

RESERVED = ("self", "params", "lr", "closure", "kwargs", "args", "fsdp_in_use")
"""Arguments that a configuration cannot set here; the learning rate is `optimizer.learning_rate`."""
_FRACTIONS = ("beta", "momentum", "rho", "alpha")
"""Beginnings of the names of decay factors, which must be from 0 to 1."""
_NOT_NEGATIVE = ("eps", "weight_decay", "d0", "d_coef")


def allowed_arguments(optimizer: type) -> dict[str, inspect.Parameter]:
    """Name -> parameter of the arguments that `optimizer.args` can set."""
    parameters = inspect.signature(optimizer).parameters.values()
    kinds = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    return {one.name: one for one in parameters if one.kind in kinds and one.name not in RESERVED}


def argument_errors(name: str, optimizer: type, arguments: Mapping[str, Any]) -> list[tuple[str, str]]:
    """The errors of the arguments of an optimizer of that name as (argument, message)."""
    allowed = allowed_arguments(optimizer)
    errors = []
    for argument, value in arguments.items():
        if argument == "lr":
            errors.append((argument, "is set by optimizer.learning_rate"))
        elif argument not in allowed:
            errors.append((argument, f"not an argument of {name}{_advice(argument, list(allowed))}"))
        elif (text := _value_error(argument, value, allowed[argument].default)) is not None:
            errors.append((argument, f"= {value!r}: {text}"))
    return errors


def _advice(argument: str, allowed: list[str]) -> str:
    close = difflib.get_close_matches(argument, allowed, n=1)
    return (f"; did you mean {close[0]}?" if close else "") + f"; its arguments are {', '.join(allowed)}"


def _value_error(argument: str, value: Any, default: Any) -> str | None:
    """What is wrong with the value of an argument that has this default; None if nothing is found."""
    if argument == "maximize" and value is not False:
        return "must be false: the loss is minimized"
    if isinstance(default, bool):
        return None if isinstance(value, bool) else "must be true or false, without quotes"
    if isinstance(default, tuple | list):
        return _list_error(argument, value, default)
    if isinstance(default, int | float):
        return _number_error(argument, value, allows_infinity=math.isinf(default), is_int=isinstance(default, int))
    if isinstance(default, str) and not isinstance(value, str):
        return "must be a string"
    if isinstance(value, float) and not math.isfinite(value):
        return "must be a finite number"
    return None


def _list_error(argument: str, value: Any, default: tuple[Any, ...] | list[Any]) -> str | None:
    if not isinstance(value, list | tuple) or len(value) != len(default):
        return f"must be a list of {len(default)} numbers, such as {list(default)}"
    texts = (_number_error(argument, one, allows_infinity=False, is_int=False) for one in value)
    return next((f"each {text}" for text in texts if text is not None), None)


def _number_error(argument: str, value: Any, *, allows_infinity: bool, is_int: bool) -> str | None:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return "must be a number"
    if math.isnan(value) or (math.isinf(value) and not allows_infinity):
        return "must be a finite number"
    if is_int and argument.endswith(("steps", "size", "freq", "frequency", "interval")) and not isinstance(value, int):
        return "must be an integer"
    if argument.startswith(_FRACTIONS) and not 0 <= value <= 1:
        return "must be from 0 to 1"
    if argument.startswith(_NOT_NEGATIVE) and value < 0:
        return "must not be negative"
    return None
