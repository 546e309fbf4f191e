"""Which blocks of a stage compute activations again in the backward pass, and the least of it that fits into memory.

The stages choose for themselves: losses and gradients have the same bits in every mode.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Self, get_args

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from models.family import BlockLayer
from models.shared.recompute import recomputed, recomputed_but_products
from models.streams import Streams

Mode = Literal["norms", "matmuls", "all"]
"""What is computed again: the inputs of qkv, fc1 and fc2; everything but matrix products and attention; everything."""

RELATIVE_TIME: Mapping[Mode, float] = {"norms": 0.12, "matmuls": 0.34, "all": 0.39}
"""Mode -> time that it adds to forward and backward of a block, as a fraction of them.

Of LoRA of SD3.5-medium, 1024 pixels, four images, one H100 (tests/benchmarks/LOG.md). "matmuls" takes Python time for each
operator.
"""
_PEAK_OF_BACKWARD = 1.25
"""What the backward pass of a recomputed block needs at once, as a multiple of what the block keeps otherwise."""


@dataclass(frozen=True)
class Recompute:
    """The first `num_blocks` blocks of a stage, or all if it has fewer, run in this mode."""

    mode: Mode = "all"
    num_blocks: int = 0

    @classmethod
    def from_key(cls, key: int | Literal["none", "norms", "matmuls", "all", "auto"], num_blocks: int) -> Self:
        """What `pipeline.recompute` says for a network of `num_blocks` blocks; for "auto" nothing until stages are built."""
        if key == "none" or key == "auto":
            return cls()
        return cls("all", key) if isinstance(key, int) else cls(key, num_blocks)

    @property
    def num_whole_blocks(self) -> int:
        """The blocks of each stage whose backward pass begins with a whole forward pass."""
        return self.num_blocks if self.mode == "all" else 0

    def describe(self, num_blocks: int) -> str:
        """In words, for a stage of `num_blocks` blocks; empty if nothing is computed again."""
        count = min(self.num_blocks, num_blocks)
        what = {"norms": "norms", "matmuls": "activations but products", "all": "activations"}[self.mode]
        return f"{what} of its {count} blocks recomputed" if count else ""


def run_block(block: BlockLayer, streams: Streams, mode: Mode | None) -> Streams:
    """Runs a block; in the modes "all" and "matmuls" without keeping what the mode computes again."""
    if mode == "all" and torch.is_grad_enabled():
        return recomputed(block, streams)
    if mode == "matmuls" and torch.is_grad_enabled():
        return recomputed_but_products(block, streams)
    return block(streams)


# --- the least that fits -------------------------------------------------------------------------------------------------


class CreatedBytes(TorchDispatchMode):
    """Counts the bytes of the tensors that operators create within it and that are still alive."""

    def __init__(self) -> None:
        super().__init__()
        self._sizes: dict[int, int] = {}

    def __torch_dispatch__(self, function: Any, _types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        known = {one.untyped_storage()._cdata for one in tree_iter((args, kwargs)) if isinstance(one, Tensor)}
        for tensor in tree_iter(result):
            if isinstance(tensor, Tensor) and (storage := tensor.untyped_storage())._cdata not in known:
                key = id(storage)
                self._sizes[key] = storage.nbytes()
                weakref.finalize(storage, self._sizes.pop, key, None)
        return result

    @property
    def alive(self) -> int:
        return sum(self._sizes.values())


KeptBytes = Mapping[Mode | None, int]
"""Mode -> bytes that a block keeps of one micro-batch; None: nothing is computed again."""


def measure_block(run: Callable[[Mode | None], Streams]) -> KeptBytes:
    """Runs a block's forward pass in each mode and counts what it keeps, its output included."""
    kept: dict[Mode | None, int] = {}
    for mode in (None, *get_args(Mode)):
        with CreatedBytes() as created:
            output = run(mode)
        kept[mode] = created.alive
        del output
    return kept


def least_recompute(blocks: Sequence[KeptBytes], in_flight: int, free: int) -> Recompute | None:
    """The fastest choice for a stage whose activations may take `free` bytes; None if nothing fits.

    `in_flight`: the micro-batches whose activations the stage keeps at once.
    """
    fitting = []
    for mode in get_args(Mode):
        for count in range(len(blocks) + 1):
            kept = sum(block[mode] for block in blocks[:count]) + sum(block[None] for block in blocks[count:])
            peak = _PEAK_OF_BACKWARD * max((block[None] for block in blocks[:count]), default=0)
            if in_flight * kept + peak <= free:
                fitting.append((count * RELATIVE_TIME[mode], Recompute(mode, count)))
    return min(fitting, key=lambda choice: choice[0])[1] if fitting else None
