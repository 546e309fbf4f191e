"""Where the float32 weights of an owned parameter are kept between steps, and how the working weights are made of them.

The optimizer updates float32 weights, because updates are smaller than the steps of bfloat16. What is kept besides working
weights in bfloat16: "float32": the float32 weights, 4 bytes per weight. "split": the 16 bits that rounding takes away, from
which the float32 weights are restored exactly for each step, 2 bytes. "stochastic": nothing; the update is rounded up or
down at random, so that its mean is exact. Working weights in float32 are the float32 weights themselves.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from utils import randomness
from utils.config.schema.optimizer import MasterKind
from utils.optim.rounding import NUM_RANDOM, join, round_at_random, split


class Master(ABC):
    """The float32 weights of a parameter."""

    keeps_weight: bool
    """Whether the working weights are a part of them, so that they must come back after others were put in their place."""

    def __init__(self, weight: nn.Parameter, parameter: nn.Parameter) -> None:
        self.weight = weight
        """The working weights."""
        self.parameter = parameter
        """What the optimizer updates. Unless float32 weights are kept, it has values between `open_all` and `close_all`."""

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

    def read(self, weight: Tensor | None = None) -> Tensor:
        return self.weight.detach() if weight is None else weight

    def write(self, weights: Tensor) -> None:
        self.weight.detach().copy_(weights)


class Float32Master(Master):
    """All float32 weights are kept."""

    keeps_weight = False

    def __init__(self, weight: nn.Parameter) -> None:
        super().__init__(weight, nn.Parameter(weight.detach().float()))

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

    def release(self) -> None:
        """Ends the time in which `parameter` has values."""
        self.parameter.data = self._empty


class SplitMaster(_Transient):
    """The bits that rounding takes away are kept."""

    def __init__(self, weight: nn.Parameter) -> None:
        super().__init__(weight)
        self.remainder = torch.zeros_like(weight, dtype=torch.int16)

    def read(self, weight: Tensor | None = None) -> Tensor:
        return join(self.weight.detach() if weight is None else weight, self.remainder)

    def write(self, weights: Tensor) -> None:
        rounded, self.remainder = split(weights.to(self.weight.device, torch.float32))
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

    def round(self, step: int) -> None:
        """Rounds the float32 weights after step number `step`."""
        weights = self.parameter.data
        drawn = randomness.device_integers(self._seed, "rounding", self._name, step, high=NUM_RANDOM, like=weights)
        self.weight.detach().copy_(round_at_random(weights, drawn))


def make_master(kind: MasterKind, weight: nn.Parameter, name: str, seed: int) -> Master:
    """The float32 weights of an owned parameter of that native name."""
    if weight.dtype == torch.float32:
        return SharedMaster(weight)
    if kind == "split":
        return SplitMaster(weight)
    return StochasticMaster(weight, seed, name) if kind == "stochastic" else Float32Master(weight)


def open_all(masters: Sequence[Master]) -> None:
    """Gives each master's `parameter` its float32 weights. A few operations on all of them at once."""
    halves = [master for master in masters if isinstance(master, SplitMaster)]
    if halves:
        weights = torch.cat([master.weight.detach().flatten() for master in halves])
        joined = join(weights, torch.cat([master.remainder.flatten() for master in halves]))
        for half, part in _parts(halves, joined):
            half.parameter.data = part
    for master in masters:
        if isinstance(master, StochasticMaster):
            master.parameter.data = master.read()


def close_all(masters: Sequence[Master], step: int) -> None:
    """Rounds the updated float32 weights to the working weights. `masters` as in the last call of `open_all`."""
    kept = [master for master in masters if isinstance(master, Float32Master)]
    if kept:
        torch._foreach_copy_([master.weight.detach() for master in kept], [master.parameter.detach() for master in kept])
    halves = [master for master in masters if isinstance(master, SplitMaster)]
    if halves:
        rounded, remainders = split(torch.cat([master.parameter.data.flatten() for master in halves]))
        for half, part in _parts(halves, remainders):
            half.remainder = part
        torch._foreach_copy_([master.weight.detach() for master in halves], [part for _, part in _parts(halves, rounded)])
    for master in masters:
        if isinstance(master, StochasticMaster):
            master.round(step)
        if isinstance(master, _Transient):
            master.release()


def _parts(masters: Sequence[SplitMaster], vector: Tensor) -> Iterator[tuple[SplitMaster, Tensor]]:
    """Each master with its part of the vector, in its shape."""
    parts = vector.split([master.weight.numel() for master in masters])
    return ((master, part.view_as(master.weight)) for master, part in zip(masters, parts, strict=True))


def round_weights(kind: MasterKind, weight: nn.Parameter, weights: Tensor) -> None:
    """Sets working weights that another replica owns, as that replica's `Master.write` does."""
    if kind == "split" and weight.dtype == torch.bfloat16:
        weights = split(weights.float())[0]
    weight.detach().copy_(weights)
