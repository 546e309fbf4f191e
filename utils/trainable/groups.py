"""Parameter groups: which trained parameters share a learning rate schedule and a weight decay.

`[[optimizer.groups]]` names groups by regular expressions over whole native parameter names. A parameter that several
patterns match belongs to the last of these groups, as with the targets of an adapter: general entries first, special ones
after them. Parameters that no pattern matches form the group DEFAULT_GROUP.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

from torch import nn

from utils.config.schema.optimizer import DEFAULT_GROUP, OptimizerConfig
from utils.optim.schedules import LearningRateSchedule, schedule_of
from utils.trainable.base import ErrorList, ParameterGroup
from utils.trainable.name_lists import shortened

_SCHEDULE_KEYS = ("learning_rate", "lr_scheduler", "lr_warmup_steps", "lr_min_ratio")


def make_groups(named: Mapping[str, nn.Parameter], config: OptimizerConfig) -> list[ParameterGroup]:
    """Sorts parameters (native name -> parameter) into groups: the default one, then in the order of the configuration.

    Leaves out groups that have none of them, so ranks can have different groups.
    """
    members: dict[str, dict[str, nn.Parameter]] = {}
    for name, parameter in named.items():
        members.setdefault(group_of(name, config), {})[name] = parameter
    decays = {group.name: group.weight_decay for group in config.groups or []}
    return [
        ParameterGroup(name, members[name], schedule, decays.get(name))
        for name, schedule in group_schedules(config).items()
        if name in members
    ]


def group_of(parameter: str, config: OptimizerConfig) -> str:
    """Returns the name of the group that a parameter (native name) belongs to."""
    matching = [group.name for group in config.groups or [] if re.fullmatch(group.pattern, parameter)]
    return matching[-1] if matching else DEFAULT_GROUP


def group_schedules(config: OptimizerConfig) -> dict[str, LearningRateSchedule]:
    """Returns group name -> learning rate schedule for all groups, whichever rank has their parameters; default first."""
    schedules = {DEFAULT_GROUP: schedule_of(config)}
    for group in config.groups or []:
        own = group.model_dump(include=set(_SCHEDULE_KEYS), exclude_none=True)
        schedules[group.name] = schedule_of(config.model_copy(update=own))
    return schedules


def group_identity(config: OptimizerConfig) -> dict[str, Any]:
    """Returns the entry of a run's identity: name and pattern of each group. Empty without groups, as before there were any.

    Learning rates and weight decays are not in it: like those of `[optimizer]`, they may change when a run is resumed.
    """
    if config.groups is None:
        return {}
    return {"optimizer.groups": [[group.name, group.pattern] for group in config.groups]}


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
