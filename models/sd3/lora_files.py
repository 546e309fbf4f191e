"""Reads adapters from public files in every format in use.

Native keys (sd-scripts, ComfyUI): lora_unet_<module with underscores>.lora_down.weight, .lora_up.weight, .alpha; for DoRA
.dora_scale; for LoKr .lokr_w1 and .lokr_w2 or their factors. The scale of the update is alpha / rank.
diffusers' keys: transformer.<its module>.lora_A.weight, .lora_B.weight; for DoRA .lora_magnitude_vector. There is no alpha:
the scale is multiplied into B. One file cannot hold both: diffusers rejects native keys, and ComfyUI would apply both.

Other spellings: dotted native names (`diffusion_model.`), peft's prefix (`base_model.model.`), OneTrainer's
(`lora_transformer_`), and older suffixes.

Without an alpha the scale is 1, unless the file comes with peft's settings: diffusers stores them in the header
(`lora_adapter_metadata`), peft in adapter_config.json next to adapter_model.safetensors.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from models.family import LoraFile, ModelFilesError, ModuleAdapter
from models.sd3.diffusers_names import swap_halves
from models.sd3.lora_checks import LoraPart, part_errors
from models.sd3.lora_keys import OTHER_NETWORKS, SUFFIXES, ModulePlace, module_places
from models.sd3.peft_settings import peft_scale, read_peft_settings
from models.sd3.variants import Shape
from models.tensor_files import MAX_ERRORS_SHOWN, TensorFiles, TensorFilesError, open_file

_ROWS = ("up", "magnitude", "w1", "w1_a")
"""Tensors whose rows correspond to the weight's rows: their halves are swapped with those of the weight (w1: if even)."""


class _Reader:
    """Checks the header of a file when constructed; reads the tensors of a module on request."""

    def __init__(self, tensors: TensorFiles, adaptable: Mapping[str, Shape], depth: int) -> None:
        self._tensors, self._adaptable = tensors, adaptable
        self.skipped_keys: list[str] = []
        errors = tensors.without(
            lambda name: name.endswith(".alpha")
        ).storage_errors()  # some programs write alpha as an integer
        self._peft_settings: Mapping[str, Any] = {}
        try:
            self._peft_settings = read_peft_settings(tensors.source)
        except (ValueError, OSError) as error:
            errors.append(f"comes with peft settings that cannot be read: {error}")
        self.parts: dict[str, list[LoraPart]] = {}
        """Native module -> its parts in the file, in the order of its rows."""
        for part in sorted(self._find_parts(module_places(adaptable, depth), errors), key=lambda part: part.place.part):
            self.parts.setdefault(part.place.module, []).append(part)
        shape_errors = [text for module, parts in self.parts.items() for text in self._module_errors(module, parts)]
        if len(shape_errors) > MAX_ERRORS_SHOWN:
            shape_errors[MAX_ERRORS_SHOWN:] = [f"and {len(shape_errors) - MAX_ERRORS_SHOWN} more tensors that do not match"]
        self.errors = [f"{tensors.source}: {text}" for text in [*errors, *shape_errors]]

    def _find_parts(self, places: Mapping[str, ModulePlace], errors: list[str]) -> list[LoraPart]:
        keys: dict[str, dict[str, str]] = {}
        unknown = []
        for key in self._tensors.shapes:
            if key.startswith(OTHER_NETWORKS):
                self.skipped_keys.append(key)
                continue
            suffix = next((suffix for suffix in SUFFIXES if key.endswith("." + suffix)), "")
            name, kind = key.removesuffix("." + suffix), SUFFIXES.get(suffix, "")
            if name not in places or not kind:
                unknown.append(key)
            elif kind in keys.setdefault(name, {}):
                errors.append(f"has the same tensor twice, as {keys[name][kind]} and {key}")
            else:
                keys[name][kind] = key
        if unknown:
            more = f" and {len(unknown) - 3} more" if len(unknown) > 3 else ""
            errors.append(f"has tensors that belong to no module of this network: {', '.join(unknown[:3])}{more}")
        if not keys and not unknown:
            other = f"; its {len(self.skipped_keys)} tensors are for text encoders" if self.skipped_keys else ""
            errors.append(f"contains no adapter for this network{other}")
        shapes = self._tensors.shapes
        return [
            LoraPart(name, places[name], found, {kind: shapes[key] for kind, key in found.items() if kind != "alpha"})
            for name, found in keys.items()
        ]

    def _module_errors(self, module: str, parts: list[LoraPart]) -> list[str]:
        weight = self._adaptable[module]
        if len({part.place.part for part in parts}) < len(parts) or len({part.place.num_parts for part in parts}) > 1:
            return [f"{module} occurs twice, as {' and '.join(part.name for part in parts)}"]
        errors = [f"{part.name} {text}" for part in parts for text in part_errors(part, weight)]
        alphas = [part.keys["alpha"] for part in parts if "alpha" in part.keys]
        errors += [f"{key} is not a single number" for key in alphas if math.prod(self._tensors.shapes[key]) != 1]
        if not errors:
            errors += [f"{part.name} has no finite scale" for part in parts if not self._has_scale(part)]
        if sum("magnitude" in part.shapes for part in parts) not in (0, parts[0].place.num_parts):
            errors.append(f"{module} has DoRA for only some of query, key and value")
        return errors

    def shapes(self, module: str) -> dict[str, Shape]:
        """Returns tensor name of ModuleAdapter -> shape, as `read` returns them."""
        parts, weight = self.parts[module], self._adaptable[module]
        magnitude = {"magnitude": weight[:1]} if "magnitude" in parts[0].shapes else {}
        if "down" not in parts[0].shapes:
            return {**parts[0].shapes, **magnitude}
        rank = parts[0].shapes["down"][0]
        if parts[0].place.num_parts > 1 and not self._shares_down(parts):
            rank = sum(part.shapes["down"][0] for part in parts)
        return {"down": (rank, *weight[1:]), "up": (weight[0], rank, *[1] * (len(weight) - 2)), **magnitude}

    def _shares_down(self, parts: list[LoraPart]) -> bool:
        """Returns whether query, key and value are all present with equal `down`, as exported from a fused qkv."""
        if len(parts) < parts[0].place.num_parts or len({part.shapes["down"] for part in parts}) > 1:
            return False
        first, *others = (self._tensor(part, "down") for part in parts)
        return all(torch.equal(first, other) for other in others)

    def _tensor(self, part: LoraPart, kind: str) -> Tensor:
        return self._tensors.read_one(part.keys[kind], torch.float32)

    def read(self, module: str) -> ModuleAdapter:
        """Returns the adapter of a module (native name), float32."""
        parts = self.parts[module]
        if parts[0].place.num_parts > 1:
            adapter = self._read_thirds(module, parts)
        else:
            tensors = {kind: self._tensor(parts[0], kind) for kind in parts[0].shapes}
            adapter = ModuleAdapter(tensors, self._scale(parts[0]))
        tensors = dict(adapter.tensors)
        if "magnitude" in tensors:
            tensors["magnitude"] = tensors["magnitude"].flatten()
        if parts[0].place.swaps:
            tensors.update({kind: swap_halves(tensors[kind]) for kind in _ROWS if kind in tensors})
        return ModuleAdapter(tensors, adapter.scale)

    def _read_thirds(self, module: str, parts: list[LoraPart]) -> ModuleAdapter:
        """Joins query, key and value into one module. With a shared `down` the rank stays; otherwise the ranks add up."""
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

    def _has_scale(self, part: LoraPart) -> bool:
        try:
            return math.isfinite(self._scale(part))
        except (
            ValueError,
            TypeError,
            ArithmeticError,
            AttributeError,
            re.error,
        ):  # alphas and patterns come from the file unchecked
            return False

    def _scale(self, part: LoraPart) -> float:
        ranks = [shape[0] for kind, shape in part.shapes.items() if kind == "down" or kind.endswith("_b")]
        if "alpha" not in part.keys:
            return peft_scale(self._peft_settings, part.name, ranks[0] if ranks else None)
        return float(self._tensor(part, "alpha")) / ranks[0] if ranks else 1.0


def _adapter_file(folder: Path) -> Path:
    """Returns the adapter's file in a folder saved by diffusers or peft. Raises TensorFilesError when there is none."""
    for name in ("pytorch_lora_weights.safetensors", "adapter_model.safetensors"):
        if (folder / name).is_file():
            return folder / name
    raise TensorFilesError(f"{folder} is a folder without an adapter; set the path of a .safetensors file")


def open_lora_file(path: Path, adaptable: Mapping[str, Shape], depth: int) -> LoraFile:
    """Opens an adapter for a network with these modules (native name -> shape of the weight) and this number of blocks.

    Raises ModelFilesError with every error; their keys are empty.
    """
    try:
        tensors = open_file(_adapter_file(path) if path.is_dir() else path)
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
