"""Where the float32 weights of an owned parameter are kept between steps, and how the working weights are made of them.

The optimizer updates float32 weights, because updates are smaller than the steps of bfloat16. What is kept besides working
weights in bfloat16: "float32": the float32 weights, 4 bytes per weight. "split": the 16 bits that rounding takes away, from
which the float32 weights are restored exactly for each step, 2 bytes. "stochastic": nothing; the update is rounded up or
down at random, so that its mean is exact. Working weights in float32 are the float32 weights themselves.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from utils import randomness
from utils.config.schema.optimizer import MasterKind
from utils.optim.rounding import join, round_stochastically, split


class Master(ABC):
    """The float32 weights of a parameter."""

    keeps_weight: bool
    """Whether the working weights are a part of them, so that they must come back after others were put in their place."""

    def __init__(self, weight: nn.Parameter, parameter: nn.Parameter) -> None:
        self.weight = weight
        """The working weights."""
        self.parameter = parameter
        """What the optimizer updates. It has values from `open` to `close` only, unless all float32 weights are kept."""

    @abstractmethod
    def open(self) -> None:
        """Gives `parameter` the float32 weights."""

    @abstractmethod
    def close(self, step: int) -> None:
        """Rounds the updated float32 weights to the working weights."""

    @abstractmethod
    def read(self, weight: Tensor | None = None) -> Tensor:
        """The float32 weights. `weight`: the working weights, where others are in their place now."""

    @abstractmethod
    def write(self, weights: Tensor) -> None:
        """Sets the float32 weights and the working weights."""


class SharedMaster(Master):
    """Working weights in float32."""

    keeps_weight = True

    def __init__(self, weight: nn.Parameter) -> None:
        super().__init__(weight, weight)

    def open(self) -> None:
        pass

    def close(self, step: int) -> None:
        pass

    def read(self, weight: Tensor | None = None) -> Tensor:
        return self.weight.detach() if weight is None else weight

    def write(self, weights: Tensor) -> None:
        self.weight.detach().copy_(weights)


class Float32Master(Master):
    """All float32 weights are kept."""

    keeps_weight = False

    def __init__(self, weight: nn.Parameter) -> None:
        super().__init__(weight, nn.Parameter(weight.detach().float()))

    def open(self) -> None:
        pass

    def close(self, step: int) -> None:
        self.weight.detach().copy_(self.parameter.detach())

    def read(self, weight: Tensor | None = None) -> Tensor:
        return self.parameter.detach()

    def write(self, weights: Tensor) -> None:
        self.parameter.detach().copy_(weights)
        self.weight.detach().copy_(weights)


class _Transient(Master):
    """Float32 weights that exist during the update only."""

    keeps_weight = True

    def __init__(self, weight: nn.Parameter) -> None:
        empty = torch.zeros((), dtype=torch.float32, device=weight.device).expand(weight.shape)
        super().__init__(weight, nn.Parameter(empty))
        self._empty = empty
        """Has the right shape and takes no memory."""

    def open(self) -> None:
        self.parameter.data = self.read()

    def close(self, step: int) -> None:
        self._round(self.parameter.data, step)
        self.parameter.data = self._empty

    @abstractmethod
    def _round(self, weights: Tensor, step: int) -> None: ...


class SplitMaster(_Transient):
    """The bits that rounding takes away are kept."""

    def __init__(self, weight: nn.Parameter) -> None:
        super().__init__(weight)
        self._remainder = torch.zeros_like(weight, dtype=torch.int16)

    def read(self, weight: Tensor | None = None) -> Tensor:
        return join(self.weight.detach() if weight is None else weight, self._remainder)

    def write(self, weights: Tensor) -> None:
        self._round(weights.to(self.weight.device, torch.float32), 0)

    def _round(self, weights: Tensor, step: int) -> None:
        rounded, self._remainder = split(weights)
        self.weight.detach().copy_(rounded)


class StochasticMaster(_Transient):
    """Nothing is kept."""

    def __init__(self, weight: nn.Parameter, seed: int, name: str) -> None:
        super().__init__(weight)
        self._seed, self._name = seed, name

    def read(self, weight: Tensor | None = None) -> Tensor:
        return (self.weight.detach() if weight is None else weight).float()

    def write(self, weights: Tensor) -> None:
        self.weight.detach().copy_(weights)

    def _round(self, weights: Tensor, step: int) -> None:
        generator = randomness.generator(weights.device, self._seed, "rounding", self._name, step)
        self.weight.detach().copy_(round_stochastically(weights, generator))


def make_master(kind: MasterKind, weight: nn.Parameter, name: str, seed: int) -> Master:
    """The float32 weights of an owned parameter of that native name."""
    if weight.dtype == torch.float32:
        return SharedMaster(weight)
    if kind == "split":
        return SplitMaster(weight)
    return StochasticMaster(weight, seed, name) if kind == "stochastic" else Float32Master(weight)


def close_all(masters: Sequence[Master], step: int) -> None:
    """Rounds the updated float32 weights of several parameters to the working weights."""
    kept = [master for master in masters if isinstance(master, Float32Master)]
    if kept:
        torch._foreach_copy_([master.weight.detach() for master in kept], [master.parameter.detach() for master in kept])
    for master in masters:
        if not isinstance(master, Float32Master):
            master.close(step)


def round_weights(kind: MasterKind, weight: nn.Parameter, weights: Tensor) -> None:
    """Sets working weights that another replica owns, as that replica's `Master.write` does."""
    if kind == "split" and weight.dtype == torch.bfloat16:
        weights = split(weights.float())[0]
    weight.detach().copy_(weights)
