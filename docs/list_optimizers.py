"""Writes the tables of optimizers in docs/optimizers.md:  python -m docs.list_optimizers

State is measured after one step on a matrix: bytes per parameter beside the float32 weight. The table of the optional
packages is written where they are installed, and otherwise stays as it is.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from utils.config.schema.optimizer import OptimizerConfig
from utils.optim.registry import (
    COLLECTION,
    LOW_BIT,
    OWN,
    SCHEDULE_FREE,
    TORCH,
    TORCHAO,
    OptimizerKind,
    all_kinds,
    is_installed,
    state_bytes,
)

PAGE = Path(__file__).with_name("optimizers.md")
REQUIRED, OPTIONAL = "optimizers", "optimizers of optional packages"
"""Marks of the tables."""
PACKAGES = {REQUIRED: (OWN, TORCH, SCHEDULE_FREE, COLLECTION), OPTIONAL: (LOW_BIT, TORCHAO)}
SIZES = {REQUIRED: 128, OPTIONAL: 256}
"""Side of the matrix. torchao keeps a table of codes for each, which small ones have many times."""
HEAD = "| `type` | package | bytes of state per parameter | exact on any layout |\n|---|---|---|---|\n"
ARGUMENTS: dict[str, dict[str, Any]] = {
    f"{LOW_BIT}.{name}{bits}": {"momentum": 0.9} for name in ("SGD", "LARS") for bits in ("", "8bit", "32bit")
}
"""Full name of an optimizer -> the arguments that it cannot do without."""


def full_name(kind: OptimizerKind) -> str:
    """The name by which a configuration chooses it whatever other packages have."""
    return kind.name if kind.package == OWN else f"{kind.package}.{kind.name}"


def rows(packages: Sequence[str], size: int) -> Iterator[str]:
    for kind in all_kinds():
        if kind.package in packages and kind.refusal is not None:
            yield f"| `{kind.name}` | {kind.package} | | refused: {kind.refusal} |\n"
        elif kind.package in packages:
            name = full_name(kind)
            count = state_bytes(OptimizerConfig(type=name, learning_rate=1e-3, args=ARGUMENTS.get(name, {})), size)
            yield f"| `{kind.name}` | {kind.package} | {count:.1f} | yes |\n"


def is_complete(which: str) -> bool:
    """Whether all packages of a table are installed."""
    return all(map(is_installed, PACKAGES[which]))


def table(which: str) -> str:
    """A table with its marks."""
    return _mark(which) + HEAD + "".join(rows(PACKAGES[which], SIZES[which])) + _mark(f"end of {which}")


def _mark(text: str) -> str:
    return f"<!-- {text} -->\n"


def main() -> None:
    text = PAGE.read_text(encoding="utf-8")
    for which in filter(is_complete, PACKAGES):
        before, _, rest = text.partition(_mark(which))
        _, _, after = rest.partition(_mark(f"end of {which}"))
        text = before + table(which) + after
    PAGE.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
