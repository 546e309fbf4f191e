"""Writes the table of optimizers in docs/optimizers.md:  python -m docs.list_optimizers

State is measured after one step on matrices of a block: bytes per weight beside the float32 weight.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor, nn

from utils.config.schema.optimizer import OptimizerConfig
from utils.optim.registry import COLLECTION, OWN, SCHEDULE_FREE, TORCH, OptimizerKind, all_kinds, make_optimizer
from utils.optim.state_tensors import to_tensors

PAGE = Path(__file__).with_name("optimizers.md")
START, END = "<!-- optimizers -->\n", "<!-- end of optimizers -->\n"
DOCUMENTED = (OWN, TORCH, SCHEDULE_FREE, COLLECTION)
SIZE = 128


def state_bytes(kind: OptimizerKind) -> float:
    """Bytes of state per weight of a matrix of SIZE x SIZE; weights kept as zeros in a scalar are not counted."""
    name = kind.name if kind.package == OWN else f"{kind.package}.{kind.name}"
    weight = nn.Parameter(torch.randn(SIZE, SIZE, generator=torch.Generator().manual_seed(0)))
    weight.grad = torch.ones_like(weight)
    entry = {"name": "all", "names": ["blocks.0.weight"], "params": [weight], "lr": 1e-3}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        optimizer = make_optimizer(OptimizerConfig(type=name, learning_rate=1e-3), [entry])
        optimizer.step()
    tensors: dict[str, Tensor] = to_tensors(optimizer.state.get(weight, {}))
    return sum(tensor.nbytes for tensor in tensors.values()) / weight.numel()


def rows() -> Iterator[str]:
    for kind in all_kinds():
        if kind.package not in DOCUMENTED:
            continue
        if kind.refusal is not None:
            yield f"| `{kind.name}` | {kind.package} | | no: {kind.refusal} |\n"
        else:
            bytes_ = state_bytes(kind)
            yield f"| `{kind.name}` | {kind.package} | {bytes_:.1f} | yes |\n"


def table() -> str:
    """The table with its marks."""
    head = "| `type` | package | bytes of state per weight | usable |\n|---|---|---|---|\n"
    return START + head + "".join(rows()) + END


def main() -> None:
    text = PAGE.read_text(encoding="utf-8")
    before, _, rest = text.partition(START)
    _, _, after = rest.partition(END)
    PAGE.write_text(before + table() + after, encoding="utf-8")


if __name__ == "__main__":
    main()
