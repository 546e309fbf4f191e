"""Training state by parameter name, out of ZeRO-1's flat partitions and back.

DeepSpeed keeps one flat float32 vector for each parameter group, cut over the replicas, and the optimizer's moments in the
same shape. A checkpoint that any layout can read holds them parameter by parameter instead. Written for DeepSpeed 0.19.8,
whose two optimizers under ZeRO-1 (float32 and bfloat16) name the vectors differently.

All replicas of a stage must call these functions together, parameter by parameter in the same order.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

MASTER = "master"
"""The float32 weights, as an entry beside the optimizer's own."""
EMA = "ema"
"""The average of the float32 weights over the steps: kept as one more of the optimizer's own, it is cut over the replicas,
saved and read back as they are. torch's optimizers (2.13) pass over entries they do not know; tests/distributed/test_ema.py
tries them."""


def flat_partitions(zero_optimizer: Any) -> list[Tensor]:
    """This rank's part of each group's flat float32 weights."""
    for name in ("single_partition_of_fp32_groups", "fp32_groups_flat_partition"):
        if hasattr(zero_optimizer, name):
            return list(getattr(zero_optimizer, name))
    raise TypeError(f"{type(zero_optimizer).__name__} is not one of DeepSpeed 0.19.8's ZeRO-1 optimizers")


@torch.no_grad()
def update_ema(zero_optimizer: Any, decay: float) -> None:
    """Of this rank's partition: average = decay * average + (1 - decay) * weights, or a copy of the weights at first.

    To be called after the optimizer's step, never before its first: torch's optimizers make their state when they find none,
    and would take this entry for it.
    """
    (flat,) = flat_partitions(zero_optimizer)
    state = zero_optimizer.optimizer.state[flat]
    if EMA in state:
        state[EMA].lerp_(flat, 1 - decay)
    else:
        state[EMA] = flat.detach().clone()
        _link_states(zero_optimizer)


def _link_states(zero_optimizer: Any) -> None:
    """Let DeepSpeed find each parameter's part of the state vectors, which it looks for once, after its first step."""
    zero_optimizer._hp_optimizer_states_linked = False
    zero_optimizer._lazy_init_hp_params_optimizer_state()


def read_weights(parameter: nn.Parameter, *, ema: bool = False) -> Tensor:
    """The float32 weights of one parameter, or their average, whole, in its shape. There must be an average to read one."""
    weights: Tensor = parameter.get_full_hp_param(optim_state_key=EMA if ema else None)  # type: ignore[attr-defined]
    return weights


def read_state(zero_optimizer: Any, parameter: nn.Parameter) -> dict[str, Tensor]:
    """`master` and every optimizer state of one parameter, whole, in its shape; per-group numbers as scalars."""
    (flat,) = flat_partitions(zero_optimizer)
    state = zero_optimizer.optimizer.state.get(flat, {})
    tensors = {MASTER: read_weights(parameter)}
    for name, value in state.items():
        if isinstance(value, Tensor) and value.shape == flat.shape:
            tensors[name] = parameter.get_full_hp_param(optim_state_key=name)  # type: ignore[attr-defined]
        else:
            tensors[name] = torch.as_tensor(value).clone()
    return {name: tensor.cpu() for name, tensor in tensors.items()}


def write_states(zero_optimizer: Any, states: dict[nn.Parameter, dict[str, Tensor]]) -> None:
    """Set what `read_state` gave, for every trainable parameter of this rank, and the working weights from it."""
    (flat,) = flat_partitions(zero_optimizer)
    (group,) = zero_optimizer.optimizer.param_groups
    parameter, one = next(iter(states.items()))
    fresh: dict[str, Tensor] = {}
    for name, value in one.items():
        if name == MASTER:
            continue
        if value.dim() > 0 and value.shape == parameter.shape:
            fresh[name] = torch.zeros_like(flat)
        else:
            # As torch's own load_state_dict: a step count stays on the CPU unless the kernels read it.
            on_cpu = name == "step" and not (group.get("fused") or group.get("capturable"))
            fresh[name] = value.clone() if on_cpu else value.to(flat.device, copy=True)
    if fresh:
        zero_optimizer.optimizer.state[flat] = fresh
        _link_states(zero_optimizer)
    for parameter, tensors in states.items():
        for name, value in tensors.items():
            if name == MASTER:
                parameter.set_full_hp_param(value.to(flat.device))  # type: ignore[attr-defined]
            elif fresh[name].shape == flat.shape:
                parameter.set_full_hp_param(value.to(flat.device), optim_state_key=name)  # type: ignore[attr-defined]
    zero_optimizer.update_lp_params()
