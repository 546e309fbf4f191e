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

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from models.family import LoraFile, ModelFilesError, ModuleAdapter
from models.sd3.diffusers_names import diffusers_modules, swap_halves, swaps_halves
from models.tensor_files import MAX_ERRORS_SHOWN, TensorFiles, TensorFilesError, open_file

Shape = tuple[int, ...]

NATIVE_PREFIX = "lora_unet_"
DIFFUSERS_PREFIX = "transformer."
_OTHER_NETWORKS = ("lora_te_", "lora_te1_", "lora_te2_", "lora_te3_", "text_encoder", "lora_prior_te")
_KRONECKER = {name: f"lokr_{name}" for name in ("w1", "w1_a", "w1_b", "w2", "w2_a", "w2_b")}


# --- what an adapter does ----------------------------------------------------------------------------------------------


def update(adapter: ModuleAdapter, shape: Shape) -> Tensor:
    """What a low-rank or Kronecker adapter adds to a weight of this shape, magnitude aside; float32."""
    tensors = {name: tensor.float() for name, tensor in adapter.tensors.items()}
    if "down" in tensors:
        delta = tensors["up"].flatten(1) @ tensors["down"].flatten(1)
    else:
        delta = torch.kron(_factor(tensors, "w1"), _factor(tensors, "w2"))
    return adapter.scale * delta.reshape(shape)


def _factor(tensors: Mapping[str, Tensor], name: str) -> Tensor:
    return tensors[name] if name in tensors else tensors[f"{name}_a"] @ tensors[f"{name}_b"]


def merged(weight: Tensor, adapter: ModuleAdapter, strength: float) -> Tensor:
    """The weight as the adapter makes it, `strength` of the way there; float32."""
    changed = weight + update(adapter, tuple(weight.shape))
    if "magnitude" in adapter.tensors:
        length = changed.flatten(1).norm(dim=1)
        factor = adapter.tensors["magnitude"].float() / length
        changed = changed * factor.reshape(-1, *[1] * (weight.dim() - 1))
    return weight + strength * (changed - weight)


# --- writing -----------------------------------------------------------------------------------------------------------


def native_adapter(modules: Mapping[str, ModuleAdapter]) -> dict[str, Tensor]:
    """Adapters by native module name under the native file's keys. `alpha` is float32: it need not be a round number."""
    tensors: dict[str, Tensor] = {}
    for module, adapter in modules.items():
        key = NATIVE_PREFIX + module.replace(".", "_")
        write = _native_low_rank if "down" in adapter.tensors else _native_kronecker
        tensors.update({f"{key}.{name}": tensor for name, tensor in write(adapter).items()})
    return tensors


def _native_low_rank(adapter: ModuleAdapter) -> dict[str, Tensor]:
    down, up = adapter.tensors["down"], adapter.tensors["up"]
    named = {"lora_down.weight": down, "lora_up.weight": up, "alpha": _scalar(adapter.scale * down.shape[0], down)}
    if "magnitude" in adapter.tensors:
        named["dora_scale"] = adapter.tensors["magnitude"].reshape(-1, *[1] * (down.dim() - 1))
    return named


def _native_kronecker(adapter: ModuleAdapter) -> dict[str, Tensor]:
    """Readers apply alpha / rank only where a factor is a product, so otherwise the scale goes into the first factor."""
    tensors = dict(adapter.tensors)
    ranks = [tensor.shape[0] for name, tensor in tensors.items() if name.endswith("_b")]
    if ranks:
        alpha = adapter.scale * ranks[0]
    else:
        alpha = 1.0
        tensors["w1"] = (tensors["w1"].float() * adapter.scale).to(tensors["w1"].dtype)
    named = {_KRONECKER[name]: tensor for name, tensor in tensors.items()}
    return {**named, "alpha": _scalar(alpha, next(iter(tensors.values())))}


def _scalar(value: float, like: Tensor) -> Tensor:
    return torch.tensor(value, dtype=torch.float32, device=like.device)


def diffusers_adapter(modules: Mapping[str, ModuleAdapter], depth: int) -> dict[str, Tensor]:
    """Low-rank adapters by native module name under diffusers' keys, their scale multiplied into B.

    A fused qkv becomes three modules that share A and take a third of B's rows each; where diffusers stores (scale, shift)
    for our (shift, scale), rows change places.
    """
    tensors: dict[str, Tensor] = {}
    for module, adapter in modules.items():
        down, up = adapter.tensors["down"], adapter.tensors["up"]
        rows = {"lora_B.weight": (up.float() * adapter.scale).to(up.dtype)}
        if "magnitude" in adapter.tensors:
            rows["lora_magnitude_vector.weight"] = adapter.tensors["magnitude"]
        if swaps_halves(module, depth):
            rows = {suffix: swap_halves(tensor) for suffix, tensor in rows.items()}
        names = diffusers_modules(module)
        for index, name in enumerate(names):
            key = DIFFUSERS_PREFIX + name
            tensors[f"{key}.lora_A.weight"] = down.clone()
            for suffix, tensor in rows.items():
                part = tensor.chunk(len(names))[index].contiguous()
                is_of_convolution = suffix.startswith("lora_magnitude") and down.dim() == 4
                tensors[f"{key}.{suffix}"] = part.reshape(1, -1, 1, 1) if is_of_convolution else part
    return tensors


# --- reading -----------------------------------------------------------------------------------------------------------

_SUFFIXES = {
    "lora_down.weight": "down",
    "lora_up.weight": "up",
    "lora_A.weight": "down",
    "lora_B.weight": "up",
    "lora_A.default.weight": "down",
    "lora_B.default.weight": "up",
    "lora.down.weight": "down",
    "lora.up.weight": "up",
    "lora_linear_layer.down.weight": "down",
    "lora_linear_layer.up.weight": "up",
    "lora_A": "down",
    "lora_B": "up",
    "alpha": "alpha",
    "dora_scale": "magnitude",
    "lora_magnitude_vector": "magnitude",
    "lora_magnitude_vector.weight": "magnitude",
    "lora_magnitude_vector.default.weight": "magnitude",
    **{suffix: name for name, suffix in _KRONECKER.items()},
}
"""What stands after a module's name in a key -> what it is."""
_ROWS = ("up", "magnitude", "w1", "w1_a")
"""What the halves of a weight's rows follow; of kron(w1, w2) they are those of w1, if it has an even number."""


@dataclass(frozen=True)
class _Place:
    """Where a module of a file belongs in the network."""

    module: str
    part: int
    num_parts: int
    """3 where the file has query, key and value of a fused qkv as modules of their own, else 1."""
    swaps: bool
    """Whether the file has the module's rows in diffusers' order and that is another one."""


@dataclass(frozen=True)
class _Part:
    """One module of a file, which may be a third of one of the network's."""

    name: str
    place: _Place
    keys: Mapping[str, str]
    """What it is, such as `down` -> key in the file."""
    shapes: Mapping[str, Shape]


class _Reader:
    """Finds out at once what the file holds; reads the numbers of a module when asked."""

    def __init__(self, tensors: TensorFiles, adaptable: Mapping[str, Shape], depth: int) -> None:
        self._tensors, self._adaptable = tensors, adaptable
        self.left_out: list[str] = []
        errors = tensors.without(lambda name: name.endswith(".alpha")).unreadable()  # some write alpha as an integer
        self._peft_settings: Mapping[str, Any] = {}
        try:
            self._peft_settings = _read_peft_settings(tensors.source)
        except (ValueError, OSError) as error:
            errors.append(f"comes with settings of peft that cannot be read: {error}")
        self.parts: dict[str, list[_Part]] = {}
        """Native module -> its parts in the file, in the order of its rows."""
        for part in sorted(self._find_parts(_places(adaptable, depth), errors), key=lambda part: part.place.part):
            self.parts.setdefault(part.place.module, []).append(part)
        unfit = [text for module, parts in self.parts.items() for text in self._module_errors(module, parts)]
        if len(unfit) > MAX_ERRORS_SHOWN:
            unfit[MAX_ERRORS_SHOWN:] = [f"and {len(unfit) - MAX_ERRORS_SHOWN} more that do not fit"]
        self.errors = [f"{tensors.source}: {text}" for text in [*errors, *unfit]]

    def _find_parts(self, places: Mapping[str, _Place], errors: list[str]) -> list[_Part]:
        keys: dict[str, dict[str, str]] = {}
        unknown = []
        for key in self._tensors.shapes:
            if key.startswith(_OTHER_NETWORKS):
                self.left_out.append(key)
                continue
            suffix = next((suffix for suffix in _SUFFIXES if key.endswith("." + suffix)), "")
            name, what = key.removesuffix("." + suffix), _SUFFIXES.get(suffix, "")
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
            what_else = f"; its {len(self.left_out)} tensors are for text encoders" if self.left_out else ""
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
            return _scale_in_peft(self._peft_settings, part.name, ranks[0] if ranks else None)
        return float(self._tensor(part, "alpha")) / ranks[0] if ranks else 1.0


def _part_errors(part: _Part, weight: Shape) -> list[str]:
    """What does not fit of one module of a file; `weight`: shape of the weight it is for, all of it."""
    rows = weight[0] // part.place.num_parts
    is_kronecker = not part.shapes.keys().isdisjoint(_KRONECKER)
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
        return ["is a Kronecker adapter of a convolution, which is not read"]
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


def _places(adaptable: Mapping[str, Shape], depth: int) -> dict[str, _Place]:
    """Every name a file may have for a module of the network -> where it belongs."""
    places: dict[str, _Place] = {}
    for module in adaptable:
        native = _Place(module, 0, 1, swaps=False)
        places[NATIVE_PREFIX + module.replace(".", "_")] = places["diffusion_model." + module] = native
        names = diffusers_modules(module)
        for index, name in enumerate(names):
            place = _Place(module, index, len(names), swaps_halves(module, depth))
            for prefix in (DIFFUSERS_PREFIX, "base_model.model.", "base_model.model.transformer."):
                places[prefix + name] = place
            places["lora_transformer_" + name.replace(".", "_")] = place
    return places


def _read_peft_settings(path: Path) -> Mapping[str, Any]:
    """The settings that come with a file; empty where there are none. Raises ValueError or OSError."""
    beside = path.with_name("adapter_config.json")
    with safe_open(path, "pt") as file:
        header: str | None = (file.metadata() or {}).get("lora_adapter_metadata")
    if header is None and not (path.name == "adapter_model.safetensors" and beside.is_file()):
        return {}
    settings = json.loads(beside.read_text(encoding="utf-8") if header is None else header)
    if not isinstance(settings, dict):
        raise ValueError("they are no table")
    if header is None:
        return settings
    return {key.removeprefix(DIFFUSERS_PREFIX): value for key, value in settings.items() if key.startswith(DIFFUSERS_PREFIX)}


def _scale_in_peft(settings: Mapping[str, Any], name: str, rank: int | None) -> float:
    """The scale of a module (its name in the file) as peft computes it; of LoKr even where no factor has a rank."""
    module = re.sub(r"^(base_model\.model\.)?(transformer\.)?", "", name)

    def of_module(patterns: str, otherwise: Any) -> Any:
        found: Mapping[str, Any] = settings.get(patterns) or {}
        return next((value for key, value in found.items() if re.match(rf"(.*\.)?({key})$", module)), otherwise)

    alpha = of_module("alpha_pattern", settings.get("lora_alpha", settings.get("alpha")))
    rank = rank or of_module("rank_pattern", settings.get("r"))
    if alpha is None or not rank:
        return 1.0
    return float(alpha) / (rank**0.5 if settings.get("use_rslora") else rank)


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
        left_out=tuple(reader.left_out),
    )
