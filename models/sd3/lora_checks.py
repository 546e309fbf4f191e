"""Checks the tensor shapes of adapter files against the modules of the network."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from models.sd3.lora_keys import KRONECKER, ModulePlace
from models.sd3.variants import Shape


@dataclass(frozen=True)
class LoraPart:
    """The tensors a file has for one module, or for one of the three parts of a fused qkv."""

    name: str
    """The module's name in the file."""
    place: ModulePlace
    keys: Mapping[str, str]
    """Tensor name of ModuleAdapter, or "alpha" -> key in the file."""
    shapes: Mapping[str, Shape]
    """Tensor name of ModuleAdapter -> shape."""


def part_errors(part: LoraPart, weight: Shape) -> list[str]:
    """Returns one line for each error in the shapes of a part. weight: shape of the whole module's weight."""
    rows = weight[0] // part.place.num_parts
    is_kronecker = not part.shapes.keys().isdisjoint(KRONECKER)
    if is_kronecker and not part.shapes.keys().isdisjoint(("down", "up")):
        return ["is a low-rank and a Kronecker adapter at once"]
    errors = _kronecker_errors(part, weight) if is_kronecker else _low_rank_errors(part, (rows, *weight[1:]))
    magnitude = part.shapes.get("magnitude")
    if magnitude is not None and magnitude[:1] == (1,) and part.keys["magnitude"].endswith(".dora_scale"):
        errors.append(f"has one magnitude per column, {magnitude}; only DoRA with one per row, ({rows}, 1), is supported")
    elif magnitude is not None and math.prod(magnitude) != rows:
        errors.append(f"has magnitudes of shape {magnitude}, expected {rows} rows")
    return errors


def _low_rank_errors(part: LoraPart, weight: Shape) -> list[str]:
    """weight: shape of the part's rows of the weight."""
    shapes = part.shapes
    missing = [name for name in ("down", "up") if name not in shapes]
    if missing:
        return [f"has no {' and no '.join(missing)}"]
    rank = shapes["down"][:1]
    expected = {"down": (*rank, *weight[1:]), "up": (weight[0], *rank, *[1] * (len(weight) - 2))}
    return [f"has {name} of {shapes[name]}, expected {shape}" for name, shape in expected.items() if shapes[name] != shape]


def _kronecker_errors(part: LoraPart, weight: Shape) -> list[str]:
    if part.place.num_parts > 1:
        return [
            "is a Kronecker adapter of one part of a fused qkv; only Kronecker adapters with native keys are supported there"
        ]
    if len(weight) > 2:
        return ["is a Kronecker adapter of a convolution, which is not supported"]
    factors = {name: _factor_shape(part.shapes, name) for name in ("w1", "w2")}
    missing = [
        f"has neither {name} nor {name}_a and {name}_b of matching shapes" for name, shape in factors.items() if not shape
    ]
    if missing:
        return missing
    if part.place.swaps and factors["w1"][0] % 2:
        return ["is a Kronecker adapter whose halves cannot be swapped; only native keys are supported for this module"]
    product = tuple(a * b for a, b in zip(factors["w1"], factors["w2"], strict=True))
    return [] if product == weight else [f"has an update of shape {product}, expected {weight}"]


def _factor_shape(shapes: Mapping[str, Shape], name: str) -> Shape:
    """Returns (rows, columns) of a factor, given whole or as a product; () where it is neither."""
    a, b = shapes.get(f"{name}_a", ()), shapes.get(f"{name}_b", ())
    whole = shapes.get(name, (a[0], b[1]) if len(a) == len(b) == 2 and a[1] == b[0] else ())
    return whole if len(whole) == 2 else ()
