"""Muon for the matrices of the blocks and AdamW for everything else, as one optimizer.

Muon replaces the momentum of a weight matrix by the nearest orthogonal matrix. Its authors use it for hidden layers only;
embedders, the output layer, biases and norms are updated by AdamW. The attention's query, key and value are one matrix in
the native layout, and it is orthogonalized whole.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

_HIDDEN = re.compile(r"(^|\.)\w*blocks\.\d+\.")


def is_hidden_matrix(name: str, parameter: Tensor) -> bool:
    """Whether a parameter (native name) is a matrix of one of the repeated blocks."""
    return parameter.dim() == 2 and min(parameter.shape) > 1 and _HIDDEN.search(name) is not None


def split_matrices(entries: Sequence[dict[str, Any]]) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """torch's dictionaries of groups, each with "names" beside "params" -> those of hidden matrices, and of the rest."""
    halves: tuple[list[dict[str, Any]], list[dict[str, Any]]] = ([], [])
    for entry in entries:
        pairs = list(zip(entry["names"], entry["params"], strict=True))
        for half, is_matrix in zip(halves, (True, False), strict=True):
            chosen = [pair for pair in pairs if is_hidden_matrix(*pair) == is_matrix]
            if chosen:
                names, parameters = zip(*chosen, strict=True)
                half.append({**entry, "names": list(names), "params": list(parameters)})
    return halves


class MuonWithAdamW:
    """Two optimizers that look like one: `param_groups`, `state` and `step` cover both."""

    def __init__(
        self, matrices: list[dict[str, Any]], rest: list[dict[str, Any]], lr: float, arguments: dict[str, Any]
    ) -> None:
        """`arguments` of torch.optim.Muon; AdamW gets the weight decay. Updates of matrices have the size of AdamW's."""
        arguments = {"adjust_lr_fn": "match_rms_adamw", **arguments}
        decay = {name: value for name, value in arguments.items() if name == "weight_decay"}
        self._parts: list[torch.optim.Optimizer] = []
        if matrices:
            self._parts.append(torch.optim.Muon(matrices, lr=lr, **arguments))
        if rest:
            self._parts.append(torch.optim.AdamW(rest, lr=lr, **decay))

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        return [group for part in self._parts for group in part.param_groups]

    @property
    def state(self) -> _States:
        return _States(self._parts)

    def step(self) -> None:
        for part in self._parts:
            part.step()


class _States:
    """The states of several optimizers, by parameter."""

    def __init__(self, parts: Sequence[torch.optim.Optimizer]) -> None:
        self._of = {parameter: part for part in parts for group in part.param_groups for parameter in group["params"]}

    def get(self, parameter: nn.Parameter, default: dict[str, Any]) -> dict[str, Any]:
        found: dict[str, Any] = self._of[parameter].state.get(parameter, default)
        return found

    def __setitem__(self, parameter: nn.Parameter, state: dict[str, Any]) -> None:
        self._of[parameter].state[parameter] = state
