"""Writes lora_<variant>.txt: every key and shape of a native LoRA file of rank 16 on every module of a released network.

Uses the tensors of the released files (tests/tiny_model.py) and the naming of sd-scripts (networks/lora_sd3.py), not the
program, whose keys are compared with these files.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tests.tiny_model import Shape, native_shapes

RANK = 16
COMMAND = "python -m tests.golden.make_lora_keys"
RELEASED: dict[str, dict[str, Any]] = {
    "SD3-medium": {"depth": 24, "width": 1536, "pos_embed_max_size": 192, "qk_norm": False},
    "SD3.5-medium": {
        "depth": 24,
        "width": 1536,
        "pos_embed_max_size": 384,
        "qk_norm": True,
        "dual_attention_layers": tuple(range(13)),
    },
    "SD3.5-large": {"depth": 38, "width": 2432, "pos_embed_max_size": 192, "qk_norm": True},
}
"""Released variant -> its dimensions, read from the published files."""


def released_shapes(variant: str) -> dict[str, Shape]:
    """Returns key -> shape of the published file of a variant."""
    return native_shapes(context_dim=4096, pooled_dim=2048, **RELEASED[variant])


def lora_shapes(variant: str) -> dict[str, Shape]:
    """Returns key -> shape of the LoRA file; for a convolution `down` has the kernel's size and `up` is 1 x 1."""
    shapes: dict[str, Shape] = {}
    for name, shape in released_shapes(variant).items():
        is_module = name.endswith(".weight") and len(shape) in (2, 4)
        if not is_module:
            continue
        key = "lora_unet_" + name.removesuffix(".weight").replace(".", "_")
        shapes[f"{key}.alpha"] = ()
        shapes[f"{key}.lora_down.weight"] = (RANK, *shape[1:])
        shapes[f"{key}.lora_up.weight"] = (shape[0], RANK) if len(shape) == 2 else (shape[0], RANK, 1, 1)
    return shapes


def _stem(variant: str) -> str:
    """Returns "sd35_medium" for "SD3.5-medium"."""
    return variant.lower().replace(".", "").replace("-", "_")


def golden_text(variant: str) -> str:
    """Returns the content of the golden file: one line per key, followed by its sizes (none for `alpha`)."""
    lines = [f"# Native LoRA of rank {RANK} on every module of {_stem(variant)}; written by `{COMMAND}`"]
    lines += [" ".join([key, *map(str, shape)]) for key, shape in sorted(lora_shapes(variant).items())]
    return "\n".join(lines) + "\n"


def golden_path(variant: str) -> Path:
    return Path(__file__).with_name(f"lora_{_stem(variant)}.txt")


def read_golden(path: Path) -> dict[str, Shape]:
    """Returns key -> shape of a golden file."""
    lines = path.read_text(encoding="utf-8").splitlines()
    fields = [line.split() for line in lines if not line.startswith("#")]
    return {key: tuple(int(size) for size in sizes) for key, *sizes in fields}


if __name__ == "__main__":
    for each in RELEASED:
        golden_path(each).write_text(golden_text(each), encoding="utf-8")
