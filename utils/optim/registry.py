"""Optimizers of torch.optim by name: which of them can be used, the errors of their arguments, and their construction."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from utils.config.schema.optimizer import OptimizerConfig

# DeepSpeed's ZeRO-1 passes each parameter group to the optimizer as one flat vector, partitioned over the replicas.
_UNSUITABLE = {
    "LBFGS": "it evaluates the network several times per step",
    "SparseAdam": "it accepts sparse gradients only",
    "Adafactor": "its update depends on each weight's shape, but weights reach the optimizer as one flat vector",
    "Muon": "its update depends on each weight's shape, but weights reach the optimizer as one flat vector",
}
_RESERVED_ARGUMENTS = ("self", "params", "lr")


def optimizer_names() -> list[str]:
    """Returns the names of all classes of torch.optim that a run can use, sorted."""
    found = [name for name in dir(torch.optim) if _is_optimizer(name)]
    return sorted(name for name in found if name not in _UNSUITABLE)


def _is_optimizer(name: str) -> bool:
    member = getattr(torch.optim, name, None)
    return isinstance(member, type) and issubclass(member, torch.optim.Optimizer) and member is not torch.optim.Optimizer


def optimizer_errors(config: OptimizerConfig) -> list[tuple[str, str]]:
    """Returns the errors of the optimizer's name and arguments as (key, message)."""
    if config.type in _UNSUITABLE:
        return [("optimizer.type", f"= {config.type!r}: cannot be used here: {_UNSUITABLE[config.type]}")]
    if config.type not in optimizer_names():
        close = difflib.get_close_matches(config.type, optimizer_names(), n=1)
        advice = f"did you mean {close[0]!r}?" if close else f"torch.optim has {', '.join(optimizer_names())}"
        return [("optimizer.type", f"= {config.type!r}: unknown; {advice}")]
    signature = inspect.signature(getattr(torch.optim, config.type))
    allowed = [name for name in signature.parameters if name not in _RESERVED_ARGUMENTS]
    unknown = [name for name in config.args if name not in allowed]
    if unknown:
        return [
            (f"optimizer.args.{name}", f"not an argument of {config.type}; its arguments are {', '.join(allowed)}")
            for name in unknown
        ]
    try:
        make_optimizer(config, [nn.Parameter(torch.zeros(1))])
    except Exception as error:  # some classes check their arguments, others fail on them with any exception
        return [("optimizer.args", f"{config.type} rejects them: {error if isinstance(error, ValueError) else repr(error)}")]
    if "weight_decay" in allowed:
        return []
    return [
        (
            f"optimizer.groups[{index}].weight_decay",
            f"= {group.weight_decay}: {config.type} has no weight decay; remove the key",
        )
        for index, group in enumerate(config.groups or [])
        if group.weight_decay is not None
    ]


def make_optimizer(
    config: OptimizerConfig, parameters: Iterable[nn.Parameter] | Iterable[dict[str, Any]]
) -> torch.optim.Optimizer:
    """Returns the configured optimizer over parameters, or over torch's dictionaries of parameter groups.

    Keys that a group's dictionary lacks ("lr", "weight_decay", ...) have the values of the config.
    """
    arguments = {key: tuple(value) if isinstance(value, list) else value for key, value in config.args.items()}
    return getattr(torch.optim, config.type)(list(parameters), lr=config.learning_rate, **arguments)
