"""Named tensors in safetensors files: a single file, or shards with an index. Headers are read first, tensors on request.

Float64, float32, float16 and bfloat16 are read as stored. Eight-bit floats come in two kinds: plain casts, and scaled ones,
whose value is the stored value times a scale in a separate tensor (`.scale_weight` or `.weight_scale`). `TensorFiles.read`
applies the scale, so callers always get the values the file represents.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

Shape = tuple[int, ...]

READABLE_DTYPES = {"F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2"}
_SCALE_SUFFIXES = (".scale_weight", ".weight_scale")
"""Suffix of a weight's scale after the name of its module: ComfyUI's older and newer spelling."""
_INFERENCE_ONLY = (".scale_input", ".input_scale", ".comfy_quant", "scaled_fp8")
"""Suffixes of tensors that only configure inference with eight-bit weights; they do not change the weights."""
MAX_ERRORS_SHOWN = 8
_MAX_HEADER_BYTES = 100_000_000
"""The limit of the safetensors library."""
STANDARD_NAMES = ("diffusion_pytorch_model", "model")
"""Names of the weights file, without its suffix, in folders of diffusers and transformers."""


class TensorFilesError(ValueError):
    """A file or folder does not contain readable weights; the message says why."""


@dataclass(frozen=True)
class TensorLocation:
    """The place of one tensor on disk."""

    path: Path
    name: str
    """The tensor's name in the file."""
    shape: Shape
    dtype: str
    """In safetensors' spelling, such as "BF16"."""
    scale: TensorLocation | None = None
    """The tensor that the values are multiplied by."""


class TensorFiles:
    """Tensors by name. Only headers are read until `read` is called."""

    def __init__(self, locations: Mapping[str, TensorLocation], source: Path) -> None:
        self._locations = dict(locations)
        self.source = source
        """The file or folder the user configured."""

    @property
    def shapes(self) -> dict[str, Shape]:
        return {name: location.shape for name, location in self._locations.items()}

    @property
    def paths(self) -> tuple[Path, ...]:
        """The files that contain the tensors."""
        return tuple(sorted({location.path for location in self._locations.values()}))

    def __contains__(self, name: str) -> bool:
        return name in self._locations

    def __len__(self) -> int:
        return len(self._locations)

    def within(self, prefix: str) -> TensorFiles:
        """Returns the tensors whose names start with the prefix, under their names without it."""
        chosen = {name[len(prefix) :]: location for name, location in self._locations.items() if name.startswith(prefix)}
        return TensorFiles(chosen, self.source)

    def without(self, is_unwanted: Callable[[str], bool]) -> TensorFiles:
        """Returns all tensors except those whose names are unwanted."""
        kept = {name: location for name, location in self._locations.items() if not is_unwanted(name)}
        return TensorFiles(kept, self.source)

    def renamed(self, new_name: Callable[[str], str]) -> TensorFiles:
        """Returns the same tensors under other names."""
        return TensorFiles({new_name(name): location for name, location in self._locations.items()}, self.source)

    def with_source(self, source: Path) -> TensorFiles:
        """Returns the same tensors with another `source`, which error messages name."""
        return TensorFiles(self._locations, source)

    def storage_errors(self) -> list[str]:
        """Returns one line for each dtype, and for the first layout of scales, that cannot be read."""
        unreadable = {loc.dtype: name for name, loc in self._locations.items() if loc.dtype not in READABLE_DTYPES}
        readable = ", ".join(sorted(READABLE_DTYPES))
        lines = [f"stores {name} as {dtype}; readable are {readable}" for dtype, name in unreadable.items()]
        for name, location in self._locations.items():
            if location.scale is not None and not _is_scalar_or_per_row(location.scale.shape, location.shape):
                shape = location.scale.shape
                return [*lines, f"scales {name} in blocks of {shape}; readable are one scale per tensor or one per row"]
        return lines

    def read(self, names: Iterable[str], dtype: torch.dtype) -> Iterator[tuple[str, Tensor]]:
        """Yields (name, tensor in `dtype` on the CPU), one at a time.

        Each tensor is a copy: one that shared the file's memory map would change with the file and keep it mapped.
        """
        for path, wanted in self._by_file(names):
            with safe_open(path, "pt") as file:
                for name in wanted:
                    location = self._locations[name]
                    value = file.get_tensor(location.name)
                    if location.scale is not None:
                        value = value.float() * _read_scale(location.scale, value.dim())
                    yield name, value.to(dtype, copy=True)

    def read_one(self, name: str, dtype: torch.dtype) -> Tensor:
        """Returns one tensor in `dtype` on the CPU."""
        return next(self.read([name], dtype))[1]

    def _by_file(self, names: Iterable[str]) -> list[tuple[Path, list[str]]]:
        grouped: dict[Path, list[str]] = {}
        for name in names:
            grouped.setdefault(self._locations[name].path, []).append(name)
        return list(grouped.items())


def _is_scalar_or_per_row(scale: Shape, shape: Shape) -> bool:
    return math.prod(scale) == 1 or (scale[:1] == shape[:1] and math.prod(scale[1:]) == 1)


def _read_scale(location: TensorLocation, num_axes: int) -> Tensor:
    """Returns one scale, or one per row, with the axes to broadcast over a tensor of `num_axes`."""
    with safe_open(location.path, "pt") as file:
        return file.get_tensor(location.name).float().reshape(-1, *[1] * (num_axes - 1))


def open_file(path: Path) -> TensorFiles:
    """Reads the header of one safetensors file. Raises TensorFilesError saying what the file is instead."""
    return TensorFiles(_with_scales(_read_header(path)), path)


def open_folder(folder: Path) -> TensorFiles:
    """Reads the headers in a folder of diffusers or transformers: one file, or shards listed in an index.

    Raises TensorFilesError naming what is missing.
    """
    for standard in STANDARD_NAMES:
        if (folder / f"{standard}.safetensors").is_file():
            return open_file(folder / f"{standard}.safetensors").with_source(folder)
        if (folder / f"{standard}.safetensors.index.json").is_file():
            return _open_shards(folder, folder / f"{standard}.safetensors.index.json")
    # No standard name: a variant, such as model.fp16.safetensors or model.safetensors.index.fp16.json, if there is only one.
    indices = sorted(folder.glob("*.safetensors.index*.json"))
    files = sorted(folder.glob("*.safetensors"))
    if len(indices) == 1:
        return _open_shards(folder, indices[0])
    if not indices and len(files) == 1:
        return open_file(files[0]).with_source(folder)
    if not files:
        raise TensorFilesError(f"{folder} has no .safetensors file (pickled .bin, .pt and .ckpt weights are not supported)")
    names = ", ".join(path.name for path in (indices or files)[:4])
    raise TensorFilesError(
        f"{folder} has several sets of weights ({names}) and none with a standard name; set the path of one file"
    )


def open_any(path: Path) -> TensorFiles:
    """Reads the headers of a file or folder. Raises TensorFilesError."""
    try:
        return open_folder(path) if path.is_dir() else open_file(path)
    except OSError as error:  # an invalid path, or no permission
        raise TensorFilesError(f"{path} cannot be read: {error.strerror}") from error


# --- checking ----------------------------------------------------------------------------------------------------------


def shape_errors(found: Mapping[str, Shape], expected: Mapping[str, Shape]) -> list[str]:
    """Returns one line for each missing, misshapen or unexpected tensor; beyond MAX_ERRORS_SHOWN, only their number."""
    errors = [f"misses tensor {name} {expected[name]}" for name in expected if name not in found]
    errors += [
        f"tensor {name} has shape {found[name]}, expected {expected[name]}"
        for name in expected
        if name in found and found[name] != expected[name]
    ]
    errors += [f"has tensor {name}, which this network does not have" for name in found if name not in expected]
    if len(errors) > MAX_ERRORS_SHOWN:
        rest = len(errors) - MAX_ERRORS_SHOWN
        errors = [*errors[:MAX_ERRORS_SHOWN], f"and {rest} more tensors that do not match"]
    return errors


# --- headers -----------------------------------------------------------------------------------------------------------


def _read_header(path: Path) -> dict[str, TensorLocation]:
    if not path.is_file():
        raise TensorFilesError(f"{path} does not exist")
    try:
        with safe_open(path, "pt") as file:
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118  safe_open is not a dict
            return {
                name: TensorLocation(path, name, tuple(part.get_shape()), str(part.get_dtype()))
                for name, part in slices.items()
            }
    except (SafetensorError, OSError) as error:
        raise TensorFilesError(f"{path} {_diagnosis(path)} ({error})") from error


def _diagnosis(path: Path) -> str:
    """Returns what a file that safetensors cannot read appears to be, judging by its first bytes."""
    try:
        with path.open("rb") as file:
            start = file.read(200)
            size = file.seek(0, 2)
    except OSError:
        return "cannot be read"
    if not start:
        return "is empty"
    if start.startswith(b"version https://git-lfs"):
        return "is a git-lfs pointer, not the weights: run `git lfs pull` in its repository, or download the file itself"
    if start.lstrip()[:1] == b"<":
        return "is a web page: the download failed, often because the model's licence was not accepted"
    if start.startswith(b"GGUF"):
        return "is a GGUF file, which is not supported: use the safetensors file it was made from"
    header_bytes = int.from_bytes(start[:8], "little")
    # Checked before pickles: the header length may start with any byte.
    if start[8:9] == b"{" and header_bytes <= _MAX_HEADER_BYTES:
        if size < 8 + header_bytes + _data_bytes(path, header_bytes):
            return f"is truncated: it has {size:,} bytes, fewer than its header declares; download it again"
    elif start.startswith((b"PK\x03\x04", b"\x80")):
        return "is a pickled file, which is not supported: convert it to safetensors"
    return "is not a readable safetensors file"


def _data_bytes(path: Path, header_bytes: int) -> int:
    """Returns the bytes of tensor data a header declares; 1 if the header is truncated itself, 0 if it is invalid."""
    with path.open("rb") as file:
        file.seek(8)
        text = file.read(header_bytes)
    if len(text) < header_bytes:
        return 1
    try:
        offsets = [entry["data_offsets"] for name, entry in json.loads(text).items() if name != "__metadata__"]
        return max((int(end) for _, end in offsets), default=0)
    except (ValueError, KeyError, TypeError, AttributeError):
        return 0


def _with_scales(locations: Mapping[str, TensorLocation]) -> dict[str, TensorLocation]:
    """Attaches each scale to its weight and drops tensors that only matter to inference."""
    scales = {
        name.removesuffix(suffix) + ".weight": location
        for name, location in locations.items()
        for suffix in _SCALE_SUFFIXES
        if name.endswith(suffix)
    }
    return {
        name: replace(location, scale=scales.get(name))
        for name, location in locations.items()
        if not name.endswith((*_SCALE_SUFFIXES, *_INFERENCE_ONLY))
    }


def _open_shards(folder: Path, index: Path) -> TensorFiles:
    try:
        weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        wanted = {str(name): folder / str(file) for name, file in weight_map.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise TensorFilesError(f"{index} is not an index of shards: {error!r}") from error
    missing = sorted({path.name for path in wanted.values() if not path.is_file()})
    if missing:
        raise TensorFilesError(f"{folder} lacks {', '.join(missing)}, which {index.name} lists")
    locations: dict[str, TensorLocation] = {}
    for path in sorted(set(wanted.values())):
        # A tensor may be in several shards; the index decides which one is used. Tensors it does not list, such as scales,
        # are used from any shard.
        found = _read_header(path)
        locations.update({name: location for name, location in found.items() if wanted.get(name, path) == path})
    absent = [name for name in wanted if name not in locations]
    if absent:
        raise TensorFilesError(f"{wanted[absent[0]]} has no tensor {absent[0]}, which {index.name} lists for it")
    return TensorFiles(_with_scales(locations), folder)
