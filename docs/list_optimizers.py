"""Writes the table of optimizers in docs/optimizers.md:  python -m docs.list_optimizers

State is measured after one step on matrices of a block: bytes per weight beside the float32 weight.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from utils.config.schema.optimizer import OptimizerConfig
from utils.optim.registry import COLLECTION, OWN, SCHEDULE_FREE, TORCH, all_kinds, state_bytes

PAGE = Path(__file__).with_name("optimizers.md")
START, END = "<!-- optimizers -->\n", "<!-- end of optimizers -->\n"
DOCUMENTED = (OWN, TORCH, SCHEDULE_FREE, COLLECTION)


def rows() -> Iterator[str]:
    for kind in all_kinds():
        if kind.package not in DOCUMENTED:
            continue
        if kind.refusal is not None:
            yield f"| `{kind.name}` | {kind.package} | | no: {kind.refusal} |\n"
        else:
            name = kind.name if kind.package == OWN else f"{kind.package}.{kind.name}"
            bytes_ = state_bytes(OptimizerConfig(type=name, learning_rate=1e-3))
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
