"""Adapters in public files, out and in: the native file of sd-scripts and ComfyUI, and diffusers' own.

Native keys: lora_unet_<module with underscores>.lora_down.weight, .lora_up.weight, .alpha; for DoRA .dora_scale; for LoKr
.lokr_w1 and .lokr_w2 or their factors. The update's scale is alpha / rank.
diffusers' keys: transformer.<its module>.lora_A.weight, .lora_B.weight; for DoRA .lora_magnitude_vector. Without alpha:
the scale is multiplied into B. No file can hold both: diffusers refuses the one's keys, ComfyUI would apply both.

Read are these two, and what others write of the same things: dotted native names (`diffusion_model.`), peft's own prefix
(`base_model.model.`), OneTrainer's (`lora_transformer_`), and the older suffixes.

Where a file has no alpha, the scale is 1, unless peft's settings come with it: diffusers writes them into the header
(`lora_adapter_metadata`), peft into adapter_config.json beside its adapter_model.safetensors.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from models.family import LoraFile, ModelFilesError, ModuleAdapter
from models.sd3.diffusers_names import swap_halves
from models.sd3.lora_keys import KRONECKER, OTHER_NETWORKS, SUFFIXES, ModulePlace, module_places
from models.sd3.peft_settings import peft_scale, read_peft_settings
from models.sd3.variants import Shape
from models.tensor_files import MAX_ERRORS_SHOWN, TensorFiles, TensorFilesError, open_file

_ROWS = ("up", "magnitude", "w1", "w1_a")
"""What the halves of a weight's rows follow; of kron(w1, w2) they are those of w1, if it has an even number."""


@dataclass(frozen=True)
class _Part:
    """One module of a file, which may be a third of one of the network's."""

    name: str
    place: ModulePlace
    keys: Mapping[str, str]
    """What it is, such as `down` -> key in the file."""
    shapes: Mapping[str, Shape]


class _Reader:
    """Finds out at once what the file holds; reads the numbers of a module when asked."""

    def __init__(self, tensors: TensorFiles, adaptable: Mapping[str, Shape], depth: int) -> None:
        self._tensors, self._adaptable = tensors, adaptable
        self.skipped_keys: list[str] = []
        errors = tensors.without(lambda name: name.endswith(".alpha")).storage_errors()  # some write alpha as an integer
        self._peft_settings: Mapping[str, Any] = {}
        try:
            self._peft_settings = read_peft_settings(tensors.source)
        except (ValueError, OSError) as error:
            errors.append(f"comes with settings of peft that cannot be read: {error}")
        self.parts: dict[str, list[_Part]] = {}
        """Native module -> its parts in the file, in the order of its rows."""
        for part in sorted(self._find_parts(module_places(adaptable, depth), errors), key=lambda part: part.place.part):
            self.parts.setdefault(part.place.module, []).append(part)
        unfit = [text for module, parts in self.parts.items() for text in self._module_errors(module, parts)]
        if len(unfit) > MAX_ERRORS_SHOWN:
            unfit[MAX_ERRORS_SHOWN:] = [f"and {len(unfit) - MAX_ERRORS_SHOWN} more that do not fit"]
        self.errors = [f"{tensors.source}: {text}" for text in [*errors, *unfit]]

    def _find_parts(self, places: Mapping[str, ModulePlace], errors: list[str]) -> list[_Part]:
        keys: dict[str, dict[str, str]] = {}
        unknown = []
        for key in self._tensors.shapes:
            if key.startswith(OTHER_NETWORKS):
                self.skipped_keys.append(key)
                continue
            suffix = next((suffix for suffix in SUFFIXES if key.endswith("." + suffix)), "")
            name, what = key.removesuffix("." + suffix), SUFFIXES.get(suffix, "")
            if name not in places or not what:
                unknown.append(key)
            elif what in keys.setdefault(name, {}):
                errors.append(f"has one thing twice, as {keys[name][what]} and {key}")
            else:
                keys[name][what] = key
        if unknown:
            more = f" and {len(unknown) - 3} more" if len(unknown) > 3 else ""
            errors.append(f"has tensors of no module of this network: {', '.join(unknown[:3])}{more}")
        if not keys and not unknown:
            what_else = f"; its {len(self.skipped_keys)} tensors are for text encoders" if self.skipped_keys else ""
            errors.append(f"holds no adapter of this network{what_else}")
        shapes = self._tensors.shapes
        return [
            _Part(name, places[name], found, {what: shapes[key] for what, key in found.items() if what != "alpha"})
            for name, found in keys.items()
        ]

    def _module_errors(self, module: str, parts: list[_Part]) -> list[str]:
        weight = self._adaptable[module]
        if len({part.place.part for part in parts}) < len(parts) or len({part.place.num_parts for part in parts}) > 1:
            return [f"{module} is there twice, as {' and '.join(part.name for part in parts)}"]
        errors = [f"{part.name} {text}" for part in parts for text in _part_errors(part, weight)]
        alphas = [part.keys["alpha"] for part in parts if "alpha" in part.keys]
        errors += [f"{key} is not one number" for key in alphas if math.prod(self._tensors.shapes[key]) != 1]
        if not errors:
            errors += [f"{part.name} has no scale that is a number" for part in parts if not self._has_scale(part)]
        if sum("magnitude" in part.shapes for part in parts) not in (0, parts[0].place.num_parts):
            errors.append(f"DoRA of only some of query, key and value of {module}")
        return errors

    def shapes(self, module: str) -> dict[str, Shape]:
        """Of the tensors that `read` will give."""
        parts, weight = self.parts[module], self._adaptable[module]
        magnitude = {"magnitude": weight[:1]} if "magnitude" in parts[0].shapes else {}
        if "down" not in parts[0].shapes:
            return {**parts[0].shapes, **magnitude}
        rank = parts[0].shapes["down"][0]
        if parts[0].place.num_parts > 1 and not self._shares_down(parts):
            rank = sum(part.shapes["down"][0] for part in parts)
        return {"down": (rank, *weight[1:]), "up": (weight[0], rank, *[1] * (len(weight) - 2)), **magnitude}

    def _shares_down(self, parts: list[_Part]) -> bool:
        """Whether query, key and value are all there with one and the same `down`, as from a fused qkv."""
        if len(parts) < parts[0].place.num_parts or len({part.shapes["down"] for part in parts}) > 1:
            return False
        first, *others = (self._tensor(part, "down") for part in parts)
        return all(torch.equal(first, other) for other in others)

    def _tensor(self, part: _Part, what: str) -> Tensor:
        return self._tensors.read_one(part.keys[what], torch.float32)

    def read(self, module: str) -> ModuleAdapter:
        parts = self.parts[module]
        if parts[0].place.num_parts > 1:
            adapter = self._read_thirds(module, parts)
        else:
            tensors = {what: self._tensor(parts[0], what) for what in parts[0].shapes}
            adapter = ModuleAdapter(tensors, self._scale(parts[0]))
        tensors = dict(adapter.tensors)
        if "magnitude" in tensors:
            tensors["magnitude"] = tensors["magnitude"].flatten()
        if parts[0].place.swaps:
            tensors.update({what: swap_halves(tensors[what]) for what in _ROWS if what in tensors})
        return ModuleAdapter(tensors, adapter.scale)

    def _read_thirds(self, module: str, parts: list[_Part]) -> ModuleAdapter:
        """Query, key and value as one module: their rows below each other, over one `down` or over all there are."""
        ups = [self._tensor(part, "up") * self._scale(part) for part in parts]
        if self._shares_down(parts):
            tensors = {"down": self._tensor(parts[0], "down"), "up": torch.cat(ups)}
        else:
            rows = self._adaptable[module][0] // parts[0].place.num_parts
            whole, start = torch.zeros(self._adaptable[module][0], sum(up.shape[1] for up in ups)), 0
            for part, up in zip(parts, ups, strict=True):
                whole[part.place.part * rows :, start:][:rows, : up.shape[1]] = up
                start += up.shape[1]
            tensors = {"down": torch.cat([self._tensor(part, "down") for part in parts]), "up": whole}
        if "magnitude" in parts[0].shapes:
            tensors["magnitude"] = torch.cat([self._tensor(part, "magnitude").flatten() for part in parts])
        return ModuleAdapter(tensors, 1.0)

    def _has_scale(self, part: _Part) -> bool:
        try:
            return math.isfinite(self._scale(part))
        except (ValueError, TypeError, ArithmeticError, AttributeError, re.error):  # alphas and patterns of any kind
            return False

    def _scale(self, part: _Part) -> float:
        ranks = [shape[0] for what, shape in part.shapes.items() if what == "down" or what.endswith("_b")]
        if "alpha" not in part.keys:
            return peft_scale(self._peft_settings, part.name, ranks[0] if ranks else None)
        return float(self._tensor(part, "alpha")) / ranks[0] if ranks else 1.0


def _part_errors(part: _Part, weight: Shape) -> list[str]:
    """What does not fit of one module of a file; `weight`: shape of the weight it is for, all of it."""
    rows = weight[0] // part.place.num_parts
    is_kronecker = not part.shapes.keys().isdisjoint(KRONECKER)
    if is_kronecker and not part.shapes.keys().isdisjoint(("down", "up")):
        return ["is a low-rank and a Kronecker adapter at once"]
    errors = _kronecker_errors(part, weight) if is_kronecker else _low_rank_errors(part, (rows, *weight[1:]))
    magnitude = part.shapes.get("magnitude")
    if magnitude is not None and magnitude[:1] == (1,) and part.keys["magnitude"].endswith(".dora_scale"):
        errors.append(f"has a length for each column, {magnitude}; only DoRA of rows is read, ({rows}, 1)")
    elif magnitude is not None and math.prod(magnitude) != rows:
        errors.append(f"has a magnitude of {magnitude}, expected {rows} rows")
    return errors


def _low_rank_errors(part: _Part, weight: Shape) -> list[str]:
    """`weight`: the shape of that part of it."""
    shapes = part.shapes
    missing = [what for what in ("down", "up") if what not in shapes]
    if missing:
        return [f"has no {' and no '.join(missing)}"]
    rank = shapes["down"][:1]
    expected = {"down": (*rank, *weight[1:]), "up": (weight[0], *rank, *[1] * (len(weight) - 2))}
    return [f"has {what} of {shapes[what]}, expected {shape}" for what, shape in expected.items() if shapes[what] != shape]


def _kronecker_errors(part: _Part, weight: Shape) -> list[str]:
    if part.place.num_parts > 1:
        return ["is a Kronecker adapter of a third of a module that is one here; it can be used with native keys only"]
    if len(weight) > 2:
        return ["is a Kronecker adapter of a convolution, which is not supported"]
    factors = {name: _factor_shape(part.shapes, name) for name in ("w1", "w2")}
    missing = [f"has no {name}, nor {name}_a and {name}_b to multiply" for name, shape in factors.items() if not shape]
    if missing:
        return missing
    if part.place.swaps and factors["w1"][0] % 2:
        return ["is a Kronecker adapter whose halves cannot change places; it can be used with native keys only"]
    product = tuple(a * b for a, b in zip(factors["w1"], factors["w2"], strict=True))
    return [] if product == weight else [f"makes a weight of {product}, expected {weight}"]


def _factor_shape(shapes: Mapping[str, Shape], name: str) -> Shape:
    """Rows and columns of a factor, whole or a product; () where it is neither."""
    a, b = shapes.get(f"{name}_a", ()), shapes.get(f"{name}_b", ())
    whole = shapes.get(name, (a[0], b[1]) if len(a) == len(b) == 2 and a[1] == b[0] else ())
    return whole if len(whole) == 2 else ()


def _adapter_in(folder: Path) -> Path:
    """The adapter's file in a folder as diffusers or peft saves it. Raises TensorFilesError when there is none."""
    for name in ("pytorch_lora_weights.safetensors", "adapter_model.safetensors"):
        if (folder / name).is_file():
            return folder / name
    raise TensorFilesError(f"{folder} is a folder; give the adapter's .safetensors file")


def open_lora_file(path: Path, adaptable: Mapping[str, Shape], depth: int) -> LoraFile:
    """An adapter for a network of these modules. Raises ModelFilesError with every error, their keys empty."""
    try:
        tensors = open_file(_adapter_in(path) if path.is_dir() else path)
    except TensorFilesError as error:
        raise ModelFilesError([("", str(error))]) from error
    reader = _Reader(tensors, adaptable, depth)
    if reader.errors:
        raise ModelFilesError([("", text) for text in reader.errors])
    return LoraFile(
        path=tensors.source,
        shapes={module: reader.shapes(module) for module in reader.parts},
        read=reader.read,
        skipped_keys=tuple(reader.skipped_keys),
    )
