"""The optimizer by name; learning rate and EMA decay as functions of the step. Pure but for making the optimizer."""

from __future__ import annotations

import difflib
import inspect
import math
from collections.abc import Iterable

import torch
from torch import nn

from utils.config.schema.tables import EmaConfig, OptimizerConfig

# ZeRO-1 hands the optimizer one flat vector of all parameters, cut over the replicas.
_UNSUITABLE = {
    "LBFGS": "it calls the network several times a step",
    "SparseAdam": "it takes sparse gradients only",
    "Adafactor": "its update depends on each weight's shape, and weights reach the optimizer as one flat vector",
    "Muon": "its update depends on each weight's shape, and weights reach the optimizer as one flat vector",
}
_NOT_ARGUMENTS = ("self", "params", "lr")


def optimizer_names() -> list[str]:
    """Every class of torch.optim that a run can use."""
    found = [name for name in dir(torch.optim) if _is_optimizer(name)]
    return sorted(name for name in found if name not in _UNSUITABLE)


def _is_optimizer(name: str) -> bool:
    member = getattr(torch.optim, name, None)
    return isinstance(member, type) and issubclass(member, torch.optim.Optimizer) and member is not torch.optim.Optimizer


def optimizer_errors(config: OptimizerConfig) -> list[tuple[str, str]]:
    """What is wrong with the optimizer's name and arguments, as (key, message)."""
    if config.type in _UNSUITABLE:
        return [("optimizer.type", f"= {config.type!r}: cannot be used here: {_UNSUITABLE[config.type]}")]
    if config.type not in optimizer_names():
        close = difflib.get_close_matches(config.type, optimizer_names(), n=1)
        advice = f"did you mean {close[0]!r}?" if close else f"torch.optim has {', '.join(optimizer_names())}"
        return [("optimizer.type", f"= {config.type!r}: unknown; {advice}")]
    signature = inspect.signature(getattr(torch.optim, config.type))
    allowed = [name for name in signature.parameters if name not in _NOT_ARGUMENTS]
    unknown = [name for name in config.args if name not in allowed]
    if unknown:
        return [
            (f"optimizer.args.{name}", f"{config.type} takes no such argument; it takes {', '.join(allowed)}")
            for name in unknown
        ]
    try:
        make_optimizer(config, [nn.Parameter(torch.zeros(1))])
    except Exception as error:  # each class checks its arguments in its own way, or trips over them
        return [("optimizer.args", f"{config.type} refuses them: {error if isinstance(error, ValueError) else repr(error)}")]
    return []


def make_optimizer(config: OptimizerConfig, parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
    """The optimizer of checked settings over one group of parameters."""
    arguments = {key: tuple(value) if isinstance(value, list) else value for key, value in config.args.items()}
    return getattr(torch.optim, config.type)(list(parameters), lr=config.learning_rate, **arguments)


def learning_rate(config: OptimizerConfig, step: int, num_steps: int) -> float:
    """The rate of `step` (counted from 0) in a run of `num_steps`.

    Rises linearly over the warm-up, reaching its height in the first step after it; then constant, linear or cosine, the
    last two reaching lr_min_ratio exactly in step num_steps - 1.
    """
    warmup = config.lr_warmup_steps
    if step < warmup:
        return config.learning_rate * (step + 1) / (warmup + 1)
    progress = (step - warmup) / max(1, num_steps - 1 - warmup)
    if config.lr_scheduler == "constant":
        share = 1.0
    elif config.lr_scheduler == "linear":
        share = 1.0 - progress
    else:
        share = 0.5 * (1.0 + math.cos(math.pi * progress))
    return config.learning_rate * (config.lr_min_ratio + (1.0 - config.lr_min_ratio) * share)


def ema_decay(config: EmaConfig, step: int) -> float:
    """The share of the average, in (0, 1), that is left when the weights after `step` optimizer steps (from 1) go into it.

    With the warm-up, min(decay, (1 + step) / (10 + step)), which looks back over step / 9 steps: without, the average would
    be mostly its beginning for the first 1 / (1 - decay) steps.
    """
    if not config.warmup:
        return config.decay
    return min(config.decay, (1 + step) / (10 + step))
