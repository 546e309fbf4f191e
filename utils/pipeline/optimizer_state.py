"""Training state by parameter, read from ZeRO-1's flat partitions and written back.

For each parameter group DeepSpeed keeps one flat float32 vector, partitioned over the replicas, and the optimizer's moments
in the same shape. A checkpoint that any layout can read holds them parameter by parameter instead. Written for DeepSpeed
0.19.8, whose two optimizers under ZeRO-1 (float32 and bfloat16) use different names for the vectors.

All replicas of a stage must call these functions together, parameter by parameter in the same order.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

MASTER = "master"
"""State name of the float32 weights, beside the optimizer's own states."""
EMA = "ema"
"""State name of the average of the float32 weights over the steps. It is kept as one more of the optimizer's own states, and
so is partitioned over the replicas, saved and read back as they are. torch's optimizers (2.13) ignore states they do not
know; tests/distributed/test_ema.py tries them."""


@dataclass(frozen=True)
class Partition:
    """One parameter group of this stage, as ZeRO-1 holds it."""

    parameters: list[nn.Parameter]
    """The group's parameters, whole, in the order in which they are flattened."""
    flat: Tensor
    """This rank's part of the flat float32 weights; the key of the optimizer's state."""
    settings: dict[str, Any]
    """The group as the torch optimizer has it: "lr" and so on."""


def partitions(zero_optimizer: Any) -> list[Partition]:
    """This rank's partition of each parameter group, in the order of the groups."""
    for weights, parameters in (
        ("single_partition_of_fp32_groups", "bit16_groups"),
        ("fp32_groups_flat_partition", "bf16_groups"),
    ):
        if hasattr(zero_optimizer, weights):
            groups = (
                getattr(zero_optimizer, parameters),
                getattr(zero_optimizer, weights),
                zero_optimizer.optimizer.param_groups,
            )
            return [Partition(*group) for group in zip(*groups, strict=True)]
    raise TypeError(f"{type(zero_optimizer).__name__} is not one of DeepSpeed 0.19.8's ZeRO-1 optimizers")


def restore_groups(zero_optimizer: Any, groups: list[dict[str, Any]]) -> None:
    """Gives a new optimizer the parameter groups back that its torch optimizer had before DeepSpeed wrapped it.

    DeepSpeed replaces an Adagrad by one with default settings and a single group for all partitions, and then finds the
    weights of the first group only.
    """
    if zero_optimizer.optimizer.param_groups is not groups:
        zero_optimizer.optimizer.param_groups = groups
        zero_optimizer._link_all_hp_params()


def _partition_of(zero_optimizer: Any, parameter: nn.Parameter) -> Partition:
    for partition in partitions(zero_optimizer):
        if any(member is parameter for member in partition.parameters):
            return partition
    raise KeyError("the parameter is in none of the optimizer's groups")


@torch.no_grad()
def update_ema(zero_optimizer: Any, decay: float) -> None:
    """Updates this rank's average: decay * average + (1 - decay) * weights, or a copy of the weights the first time.

    Must not be called before the optimizer's first step: torch's optimizers create their state when they find none, and
    would take this entry for it.
    """
    is_first = False
    for partition in partitions(zero_optimizer):
        state = zero_optimizer.optimizer.state[partition.flat]
        if EMA in state:
            state[EMA].lerp_(partition.flat, 1 - decay)
        else:
            state[EMA], is_first = partition.flat.detach().clone(), True
    if is_first:
        link_states(zero_optimizer)


def link_states(zero_optimizer: Any) -> None:
    """Lets DeepSpeed find each parameter's part of the optimizer's state vectors.

    DeepSpeed does so once, after the first step of the first group, when the states of further groups do not exist yet.
    """
    zero_optimizer._hp_optimizer_states_linked = False
    zero_optimizer._lazy_init_hp_params_optimizer_state()


def read_weights(parameter: nn.Parameter, *, ema: bool = False) -> Tensor:
    """The float32 weights of one parameter, or their average, whole, in its shape. An average must exist to be read."""
    weights: Tensor = parameter.get_full_hp_param(optim_state_key=EMA if ema else None)  # type: ignore[attr-defined]
    return weights


def read_state(zero_optimizer: Any, parameter: nn.Parameter) -> dict[str, Tensor]:
    """`master` and every optimizer state of one parameter, whole, in its shape, on the CPU. Numbers become scalars."""
    flat = _partition_of(zero_optimizer, parameter).flat
    state = zero_optimizer.optimizer.state.get(flat, {})
    tensors = {MASTER: read_weights(parameter)}
    for name, value in state.items():
        if isinstance(value, Tensor) and value.shape == flat.shape:
            tensors[name] = parameter.get_full_hp_param(optim_state_key=name)  # type: ignore[attr-defined]
        else:
            tensors[name] = torch.as_tensor(value).clone()
    return {name: tensor.cpu() for name, tensor in tensors.items()}


def write_states(zero_optimizer: Any, states: dict[nn.Parameter, dict[str, Tensor]]) -> None:
    """Sets what `read_state` returned, and the working weights from it.

    Optimizer states other than `master` must be given for every parameter of a group or for none.
    """
    if any([_make_states(zero_optimizer, partition, states) for partition in partitions(zero_optimizer)]):
        link_states(zero_optimizer)
    for partition in partitions(zero_optimizer):
        new = zero_optimizer.optimizer.state.get(partition.flat, {})
        for parameter in partition.parameters:
            for name, value in states.get(parameter, {}).items():
                if name == MASTER:
                    parameter.set_full_hp_param(value.to(partition.flat.device))  # type: ignore[attr-defined]
                elif new[name].shape == partition.flat.shape:
                    own = value.to(partition.flat.device)
                    parameter.set_full_hp_param(own, optim_state_key=name)  # type: ignore[attr-defined]
    zero_optimizer.update_lp_params()


def _make_states(zero_optimizer: Any, partition: Partition, states: dict[nn.Parameter, dict[str, Tensor]]) -> bool:
    """Creates the optimizer states of a group from those given: zeros for vectors, copies of numbers. False if none are."""
    flat, fresh = partition.flat, dict[str, Tensor]()
    parameter = next((parameter for parameter in partition.parameters if parameter in states), None)
    if parameter is None:
        return False
    for name, value in states[parameter].items():
        if name == MASTER:
            continue
        if value.dim() > 0 and value.shape == parameter.shape:
            fresh[name] = torch.zeros_like(flat)
        else:
            # As torch's own load_state_dict: a step count stays on the CPU unless the kernels read it.
            on_cpu = name == "step" and not (partition.settings.get("fused") or partition.settings.get("capturable"))
            fresh[name] = value.clone() if on_cpu else value.to(flat.device, copy=True)
    if fresh:
        zero_optimizer.optimizer.state[flat] = fresh
    return bool(fresh)
