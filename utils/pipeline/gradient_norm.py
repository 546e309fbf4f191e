"""The gradient norm of DeepSpeed's two ZeRO-1 optimizers, made independent of the number of stages.

Written for DeepSpeed 0.19.8, which rounds each stage's sum of squares to float32 before it adds up the stages. The last
bits of its norm, and with clipping all further weights, would depend on where the network is cut. Here squares are summed
in float64 over parameters, groups, replicas and stages, and rounded to float32 once at the end.
tests/distributed/test_layouts.py fails without this file: runs on one and two stages then differ.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from deepspeed.runtime.bf16_optimizer import BF16_Optimizer
from torch import Tensor

from utils.pipeline.optimizer_state import partitions


def use_exact_norm(engine: Any, max_norm: float) -> None:
    """Replaces the norm by which an engine's ZeRO-1 optimizer clips; `max_norm` 0 means no clipping."""
    if isinstance(engine.optimizer, BF16_Optimizer):
        _clip_before_step(engine.optimizer, max_norm, engine.grid.get_pipe_parallel_group())
    else:
        _replace_norm(engine.optimizer)


def _exact_norm(gradients: Sequence[Tensor], device: torch.device, group: dist.ProcessGroup | None) -> Tensor:
    """The norm over the gradients of every rank in the process group (None: all ranks), a float32 scalar."""
    squares = [gradient.double().square().sum() for gradient in gradients]
    total = torch.stack(squares).sum() if squares else torch.zeros((), dtype=torch.float64, device=device)
    dist.all_reduce(total, group=group)
    return total.sqrt().float()


def _replace_norm(optimizer: Any) -> None:
    """Changes the float32 optimizer, whose gradients are partitioned over the replicas; it clips by the norm itself."""

    def scaled_global_norm(norm_type: int = 2) -> Tensor:
        parts = [part for group in range(len(optimizer.bit16_groups)) for part in optimizer.averaged_gradients[group]]
        own = [part for part in parts if not getattr(part, "_zero_padding", False)]
        return _exact_norm(own, partitions(optimizer)[0].flat.device, None)

    optimizer.scaled_global_norm = scaled_global_norm


def _clip_before_step(optimizer: Any, max_norm: float, pipe_group: dist.ProcessGroup) -> None:
    """Changes the bfloat16 optimizer, where each replica has whole float32 gradients: clips them, then lets it step."""
    deepspeeds_step = optimizer.step
    optimizer.clip_grad = 0.0

    def step(closure: None = None) -> None:
        gradients = optimizer.get_grads_for_norm(for_clipping=True)
        norm = _exact_norm(gradients, partitions(optimizer)[0].flat.device, pipe_group)
        if max_norm > 0:
            factor = (max_norm / (norm + 1e-6)).clamp(max=1.0)
            for gradient in gradients:
                gradient.mul_(factor)
        deepspeeds_step()
        optimizer._global_grad_norm = norm

    optimizer.step = step
