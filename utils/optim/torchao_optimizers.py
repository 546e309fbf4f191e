"""The low-bit optimizers of the optional package torchao 0.18, as this program can use them.

Their steps are compiled for each shape of a weight, which needs a C++ compiler on a CPU and takes minutes for a network;
here they run without compilation. They accept the learning rate as a tensor only. Their states are tensors of classes of
torchao that hold other tensors, such as codes and scales; `taken_apart` and `put_together` convert them.
"""

from __future__ import annotations

import importlib
import json
from collections.abc import Mapping
from functools import cache
from typing import Any

import torch
from torch import Tensor

CONTEXT = "context"
"""Name of the tensor with the bytes of a JSON list: what a class of tensors needs besides its inner tensors."""
_MODULES = {
    "OptimState8bit": "torchao.optim.subclass_8bit",
    "OptimState4bit": "torchao.optim.subclass_4bit",
    "OptimStateFp8": "torchao.optim.subclass_fp8",
}
"""The classes that a checkpoint may name, and where they are."""
_FLOAT8 = torch.float8_e4m3fn


@cache
def without_compiler(optimizer: type[torch.optim.Optimizer]) -> type[torch.optim.Optimizer]:
    """The class of torchao with a step that is not compiled and accepts learning rates that are numbers."""

    class Eager(optimizer):  # type: ignore[valid-type,misc]
        def step(self, closure: None = None) -> None:
            for group in self.param_groups:
                if not isinstance(group["lr"], Tensor):
                    group["lr"] = torch.tensor(group["lr"], dtype=torch.float32)
            with torch.compiler.set_stance("force_eager"):
                super().step()

    Eager.__name__ = optimizer.__name__
    return Eager


def is_low_bit(value: Tensor) -> bool:
    """Whether it is one of torchao's states."""
    return type(value).__name__ in _MODULES and type(value).__module__ == _MODULES[type(value).__name__]


def taken_apart(value: Tensor) -> dict[str, Tensor]:
    """The inner tensors of a state by name, and its CONTEXT. Float8 codes become bytes: gloo sends no float8 tensors."""
    low_bit: Any = value
    names, context = low_bit.__tensor_flatten__()
    text = json.dumps([str(one).removeprefix("torch.") if isinstance(one, torch.dtype) else one for one in context])
    inner = {name: getattr(value, name) for name in names}
    inner = {name: part.view(torch.uint8) if part.dtype == _FLOAT8 else part for name, part in inner.items()}
    return {**inner, CONTEXT: torch.tensor(list(text.encode()), dtype=torch.uint8)}


def put_together(class_name: str, parts: Mapping[str, Tensor]) -> Tensor:
    """The inverse of `taken_apart`. Raises KeyError for a class that is none of torchao's."""
    kind = getattr(importlib.import_module(_MODULES[class_name]), class_name)
    inner = {name: tensor for name, tensor in parts.items() if name != CONTEXT}
    if class_name == "OptimStateFp8":
        inner["codes"] = inner["codes"].view(_FLOAT8)
    context = [_decoded(one) for one in json.loads(bytes(parts[CONTEXT].tolist()))]
    whole: Tensor = kind.__tensor_unflatten__(inner, context)
    return whole


def _decoded(value: Any) -> Any:
    """A bool, a shape or a dtype, from JSON."""
    if isinstance(value, str):
        return getattr(torch, value)
    return torch.Size(value) if isinstance(value, list) else value
