"""The state that an optimizer keeps of a parameter, as named tensors and back.

Besides tensors, optimizers keep numbers, and lists of tensors. A checkpoint holds tensors only: a number is a scalar tensor
under its name and the mark "#", an element of a list has its index in brackets, and a missing element is an empty tensor
with the mark "!". A tensor that is not contiguous, such as a matrix that is stored by columns, has the mark "^" and the
order of its dimensions in memory: products with it have other last bits if it is stored by rows. A low-bit tensor of torchao
is several tensors, whose names have the mark "@", its class and the name of the part. Tensors of torch's optimizers are
stored under their own names.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from utils.optim import torchao_optimizers

NUMBER, NOTHING, ORDER, LOW_BIT = "#", "!", "^", "@"
_ELEMENT = re.compile(r"(.*)\[(\d+)\]")


def to_tensors(state: Mapping[str, Any]) -> dict[str, Tensor]:
    """Raises TypeError for a value that cannot be stored."""
    tensors: dict[str, Tensor] = {}
    for name, value in state.items():
        _flatten(name, value, tensors)
    return tensors


def _flatten(name: str, value: Any, tensors: dict[str, Tensor]) -> None:
    if isinstance(value, Tensor) and torchao_optimizers.is_low_bit(value):
        for part, inner in torchao_optimizers.taken_apart(value).items():
            _flatten(f"{name}{LOW_BIT}{type(value).__name__}.{part}", inner, tensors)
    elif isinstance(value, Tensor):
        if type(value) not in (Tensor, torch.nn.Parameter):
            raise TypeError(f"{name} is a {type(value).__name__}, of which no checkpoint can be made")
        order = sorted(range(value.dim()), key=lambda dim: -value.stride()[dim])
        permuted = value.detach().permute(order)
        if not value.is_contiguous() and permuted.is_contiguous():
            tensors[name + ORDER + ",".join(map(str, order))] = permuted
        else:
            tensors[name] = value.detach().contiguous()
    elif value is None:
        tensors[name + NOTHING] = torch.empty(0)
    elif isinstance(value, bool | int | float):
        tensors[name + NUMBER] = torch.tensor(value, dtype=torch.float64 if isinstance(value, float) else None)
    elif isinstance(value, list | tuple):
        for index, element in enumerate(value):
            _flatten(f"{name}[{index}]", element, tensors)
        if not value:
            tensors[f"{name}[]"] = torch.empty(0)
    else:
        raise TypeError(f"{name} is a {type(value).__name__}, of which no checkpoint can be made")


def from_tensors(tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """The inverse of `to_tensors`; tuples become lists."""
    state: dict[str, Any] = {}
    tensors = _with_low_bit(tensors)
    for name in sorted(tensors, key=_place):
        value: Any = tensors[name]
        if name.endswith(NUMBER):
            name, value = name.removesuffix(NUMBER), value.item()
        elif name.endswith(NOTHING):
            name, value = name.removesuffix(NOTHING), None
        elif ORDER in name:
            name, _, text = name.partition(ORDER)
            order = [int(dim) for dim in text.split(",")]
            value = value.permute([order.index(dim) for dim in range(len(order))])
        _put(state, name, value)
    return state


def _with_low_bit(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors with the parts of each low-bit one put together."""
    whole = {name: tensor for name, tensor in tensors.items() if LOW_BIT not in name}
    parts: dict[tuple[str, str], dict[str, Tensor]] = {}
    for name in tensors.keys() - whole.keys():
        state, _, rest = name.partition(LOW_BIT)
        class_name, _, part = rest.partition(".")
        parts.setdefault((state, class_name), {})[part] = tensors[name]
    for (state, class_name), inner in parts.items():
        whole[state] = torchao_optimizers.put_together(class_name, inner)
    return whole


def _place(name: str) -> tuple[str, list[int]]:
    """Sorts the elements of a list by index."""
    return name.partition("[")[0], [int(index) for index in re.findall(r"\[(\d+)\]", name)]


def _put(state: dict[str, Any], name: str, value: Any) -> None:
    if name.endswith("[]"):
        name, value = name.removesuffix("[]"), []
    if (match := _ELEMENT.fullmatch(name)) is not None:
        _list_at(state, match[1]).append(value)
    else:
        state[name] = value


def _list_at(state: dict[str, Any], name: str) -> list[Any]:
    """The list of that name, made if there is none; lists may be nested."""
    match = _ELEMENT.fullmatch(name)
    if match is None:
        found: list[Any] = state.setdefault(name, [])
        return found
    outer = _list_at(state, match[1])
    if len(outer) <= int(match[2]):
        outer.append([])
    inner: list[Any] = outer[int(match[2])]
    return inner
