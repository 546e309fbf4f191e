"""Activations that are computed again in the backward pass instead of being kept for it.

Losses and gradients keep their bits: the network draws no random numbers, and the same kernels run on the same inputs.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, TypeVar

import torch
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

Result = TypeVar("Result")


def recomputed(function: Callable[..., Result], *arguments: Any) -> Result:
    """Calls the function. For its backward pass only the arguments are kept.

    The second run ends once everything that backward needs is there. A matrix product at the end of the function, of which
    backward needs the input alone, is therefore computed once.
    """
    return _checkpoint(function, *arguments)


def recomputed_but_products(function: Callable[..., Result], *arguments: Any) -> Result:
    """Calls the function. Kept are the arguments, the outputs of linear layers with a bias, and those of attention."""
    return _checkpoint(function, *arguments, context_fn=partial(create_selective_checkpoint_contexts, _policy))


def _checkpoint(function: Callable[..., Result], *arguments: Any, **options: Any) -> Result:
    result: Result = checkpoint(
        function, *arguments, use_reentrant=False, preserve_rng_state=False, determinism_check="none", **options
    )
    return result


def _overloads(*names: str) -> frozenset[Any]:
    """The default overloads of those operators of ATen that this build of torch has."""
    return frozenset(getattr(torch.ops.aten, name).default for name in names if hasattr(torch.ops.aten, name))


_KEPT = _overloads(
    "addmm",
    "_scaled_dot_product_flash_attention",
    "_scaled_dot_product_efficient_attention",
    "_scaled_dot_product_cudnn_attention",
    "_scaled_dot_product_flash_attention_for_cpu",
)
"""Not `mm`: the small products of LoRA have no bias, and their outputs are as large as those of the layers they adapt."""


def _policy(_context: Any, operator: Any, *_arguments: Any, **_options: Any) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if operator in _KEPT else CheckpointPolicy.PREFER_RECOMPUTE
