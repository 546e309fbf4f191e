"""Parameter groups: which trained parameters share a learning rate schedule and a weight decay.

`[[optimizer.groups]]` names groups by regular expressions over whole native parameter names. A parameter that several
patterns match belongs to the last of these groups, as with the targets of an adapter: general entries first, special ones
after them. Parameters that no pattern matches form the group DEFAULT_GROUP.

Two keys of `[optimizer]` divide each of these groups further. LoRA+ (Hayou and others, "LoRA+: Efficient Low Rank
Adaptation of Large Models", arXiv 2402.12354) gives the `up` matrices of a LoRA, which are zero at first, a multiple of the
learning rate: they are the group "NAME.up". Norms and biases without weight decay are the group "NAME.no_decay". No name in
the configuration has a dot.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from utils.config.schema.optimizer import DEFAULT_GROUP, NO_DECAY, OptimizerConfig
from utils.optim.schedules import LearningRateSchedule, schedule_of
from utils.trainable.base import ErrorList, ParameterGroup
from utils.trainable.name_lists import shortened
from utils.trainable.peft_layers import PARAMETER_SUFFIXES

UP = ".up"
"""What follows a group's name in the name of the group of its `up` matrices."""


def make_groups(named: Mapping[str, nn.Parameter], config: OptimizerConfig) -> list[ParameterGroup]:
    """Sorts parameters (native name -> parameter) into groups: the default one, then in the order of the configuration.

    Leaves out groups that have none of them, so ranks can have different groups.
    """
    members: dict[str, dict[str, nn.Parameter]] = {}
    for name, parameter in named.items():
        whole = group_of(name, config) + _part(name, parameter, config)
        members.setdefault(whole, {})[name] = parameter
    decays = {group.name: group.weight_decay for group in config.groups or []}

    def decay_of(name: str) -> float | None:
        return 0.0 if name.endswith(NO_DECAY) else decays.get(name.removesuffix(UP))

    schedules = group_schedules(config).items()
    return [ParameterGroup(name, members[name], one, decay_of(name)) for name, one in schedules if name in members]


def group_of(parameter: str, config: OptimizerConfig) -> str:
    """Returns the name of the configured group that a parameter (native name) belongs to."""
    matching = [group.name for group in config.groups or [] if re.fullmatch(group.pattern, parameter)]
    return matching[-1] if matching else DEFAULT_GROUP


def _part(name: str, parameter: Tensor, config: OptimizerConfig) -> str:
    """What follows the name of the configured group in that of the parameter's group."""
    if config.loraplus_lr_ratio is not None and name.endswith(PARAMETER_SUFFIXES["up"]):
        return UP
    return NO_DECAY if not config.decay_norms_and_biases and is_norm_or_bias(name, parameter) else ""


def is_norm_or_bias(name: str, parameter: Tensor) -> bool:
    """Whether a parameter (native name) is a scale or a bias: a vector, or the magnitudes of a DoRA of any shape."""
    return parameter.dim() <= 1 or name.endswith((".bias", PARAMETER_SUFFIXES["magnitude"]))


def group_schedules(config: OptimizerConfig) -> dict[str, LearningRateSchedule]:
    """Returns group name -> learning rate schedule for all groups, whichever rank has their parameters; default first."""
    own = {group.name: schedule_of(config, group) for group in config.groups or []}
    configured = {DEFAULT_GROUP: schedule_of(config), **own}
    schedules: dict[str, LearningRateSchedule] = {}
    for name, schedule in configured.items():
        schedules[name] = schedule
        if not config.decay_norms_and_biases:
            schedules[name + NO_DECAY] = schedule
        if config.loraplus_lr_ratio is not None:
            schedules[name + UP] = replace(schedule, peak=config.loraplus_lr_ratio * schedule.peak)
    return schedules


def group_identity(config: OptimizerConfig) -> dict[str, Any]:
    """Returns the entries of a run's identity: name and pattern of each group, and whether `up` matrices have their own.

    Empty without groups, as before there were any. Learning rates and weight decays are not in it: like those of
    `[optimizer]`, they may change when a run is resumed.
    """
    identity: dict[str, Any] = {}
    if config.groups is not None:
        identity["optimizer.groups"] = [[group.name, group.pattern] for group in config.groups]
    if config.loraplus_lr_ratio is not None:
        identity["optimizer.loraplus_lr_ratio"] = "set"
    return identity


def group_errors(names: Iterable[str], config: OptimizerConfig) -> ErrorList:
    """Returns an error for each group that none of the trained parameters (native names, whole network) belongs to."""
    names, errors = list(names), ErrorList()
    used = {group_of(name, config) for name in names} if config.groups else set()
    for index, group in enumerate(config.groups or []):
        if group.name in used:
            continue
        matched = [name for name in names if re.fullmatch(group.pattern, name)]
        reason = (
            f"all parameters that it matches belong to later groups: {shortened(matched)}; move this group after them"
            if matched
            else f"matches no trained parameter; it must match whole names, such as {shortened(names)}"
        )
        errors.append((f"optimizer.groups[{index}].pattern", f"= {group.pattern!r}: {reason}"))
    return errors
