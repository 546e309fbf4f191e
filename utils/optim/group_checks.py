"""Errors of the keys that give parameters other learning rates or weight decays: does the optimizer honour them?

An optimizer may have no weight decay, may ignore the learning rate, or may need one rate for all parameters. Whether it uses
the learning rate is found out by training a few numbers at two rates, because it can depend on other arguments.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from utils.config.schema.optimizer import OptimizerConfig
from utils.optim.arguments import allowed_arguments
from utils.optim.registry import find, make_optimizer, num_sums
from utils.optim.schedules import schedule_of

NUM_STEPS = 12


def group_key_errors(config: OptimizerConfig) -> list[tuple[str, str]]:
    """Returns (key, message) of each; for a configuration without errors in the optimizer's name and arguments."""
    return [*_decay_errors(config), *_rate_errors(config)]


def _decay_errors(config: OptimizerConfig) -> Iterator[tuple[str, str]]:
    kind = find(config.type)
    assert kind is not None
    if "weight_decay" in allowed_arguments(kind.load()):
        return
    text = f"{config.type} has no weight decay; remove the key"
    for index, group in enumerate(config.groups or []):
        if group.weight_decay is not None:
            yield f"optimizer.groups[{index}].weight_decay", f"= {group.weight_decay}: {text}"
    if not config.decay_norms_and_biases:
        yield "optimizer.decay_norms_and_biases", f"= false: {text}"


def _rate_errors(config: OptimizerConfig) -> Iterator[tuple[str, str]]:
    schedules = enumerate(schedule_of(config, group) for group in config.groups or [])
    indices = [index for index, schedule in schedules if schedule != schedule_of(config)]
    has_ratio = config.loraplus_lr_ratio not in (None, 1)
    if not indices and not has_ratio:
        return
    if num_sums(config):
        text = f"{config.type} finds one step size for all parameters, which must have the same learning rate"
    elif not uses_learning_rate(config):
        text = f"{config.type} does not use the learning rate with these arguments"
    else:
        return
    for index in indices:
        yield f"optimizer.groups[{index}]", f"{text}; remove learning_rate, lr_mult and the keys of the schedule"
    if has_ratio:
        yield "optimizer.loraplus_lr_ratio", f"= {config.loraplus_lr_ratio}: {text}; remove the key"


def uses_learning_rate(config: OptimizerConfig) -> bool:
    """Whether twice the learning rate gives other weights."""
    return not torch.equal(_trained(config, config.learning_rate), _trained(config, 2 * config.learning_rate))


def _trained(config: OptimizerConfig, rate: float) -> Tensor:
    weight = nn.Parameter(torch.linspace(-1.0, 1.0, 16).view(4, 4))
    entry = {"name": "all", "names": ["blocks.0.weight"], "params": [weight], "lr": rate}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        optimizer = make_optimizer(config, [entry])
        for step in range(NUM_STEPS):
            for group in optimizer.param_groups:
                group["lr"] = rate
            weight.grad = (10.0 * torch.arange(16) + step).sin().view(4, 4)
            optimizer.step()
    return weight.detach()
