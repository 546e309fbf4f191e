"""Writes lora_<variant>.txt: every key and shape of a native LoRA file of rank 16 on every module of a released network.

Knows the released files' tensors (tests/tiny_model.py) and sd-scripts' way of naming (networks/lora_sd3.py), and nothing of
the program, whose own keys are compared with what this writes.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tests.tiny_model import Shape, native_shapes

RANK = 16
COMMAND = "python -m tests.golden.make_lora_keys"
RELEASED: dict[str, dict[str, Any]] = {
    "sd3_medium": {"depth": 24, "width": 1536, "pos_embed_max_size": 192, "qk_norm": False},
    "sd35_medium": {
        "depth": 24,
        "width": 1536,
        "pos_embed_max_size": 384,
        "qk_norm": True,
        "dual_attention_layers": tuple(range(13)),
    },
    "sd35_large": {"depth": 38, "width": 2432, "pos_embed_max_size": 192, "qk_norm": True},
}


def released_shapes(variant: str) -> dict[str, Shape]:
    """Key -> shape of the released network's own file."""
    return native_shapes(context_dim=4096, pooled_dim=2048, **RELEASED[variant])


def lora_shapes(variant: str) -> dict[str, Shape]:
    """Key -> shape of the LoRA file; of a convolution `down` has the kernel and `up` is one by one."""
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


def golden_text(variant: str) -> str:
    """The file: a key a line, then its sizes, of which `alpha` has none."""
    lines = [f"# Native LoRA of rank {RANK} on every module of {variant}; written by `{COMMAND}`"]
    lines += [" ".join([key, *map(str, shape)]) for key, shape in sorted(lora_shapes(variant).items())]
    return "\n".join(lines) + "\n"


def golden_path(variant: str) -> Path:
    return Path(__file__).with_name(f"lora_{variant}.txt")


def read_golden(variant: str) -> dict[str, Shape]:
    """Key -> shape, as the file has them."""
    lines = golden_path(variant).read_text(encoding="utf-8").splitlines()
    fields = [line.split() for line in lines if not line.startswith("#")]
    return {key: tuple(int(size) for size in sizes) for key, *sizes in fields}


if __name__ == "__main__":
    for each in RELEASED:
        golden_path(each).write_text(golden_text(each), encoding="utf-8")
