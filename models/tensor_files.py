"""Named tensors in safetensors files: one file, or a sharded set with its index. Headers first, tensors when asked for.

Weights of two bytes or four are read as they are. Of eight-bit floats there are two kinds: plain casts, and scaled ones,
where a weight is its stored value times a scale beside it (`.scale_weight` or `.weight_scale`). Either is read as the number
it stands for; nobody after this file need know.
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
"""A weight's scale, by the name of its module: ComfyUI's older name and its newer one."""
_INFERENCE_ONLY = (".scale_input", ".input_scale", ".comfy_quant", "scaled_fp8")
"""How a program may run the eight-bit weights; not part of what they are."""
MAX_ERRORS_SHOWN = 8
_MAX_HEADER_BYTES = 100_000_000
"""What safetensors itself accepts."""
STANDARD_NAMES = ("diffusion_pytorch_model", "model")
"""What weights are called in folders of diffusers and transformers."""


class TensorFilesError(ValueError):
    """A file or folder that holds no readable weights, and why."""


@dataclass(frozen=True)
class _Place:
    """Where one tensor is."""

    path: Path
    name: str
    """In the file."""
    shape: Shape
    dtype: str
    """As safetensors spells it."""
    scale: _Place | None = None
    """What its values are to be multiplied by."""


class TensorFiles:
    """Tensors by name. Nothing but headers is read until `read` is called."""

    def __init__(self, places: Mapping[str, _Place], source: Path) -> None:
        self._places = dict(places)
        self.source = source
        """What the user gave: a file or a folder."""

    @property
    def shapes(self) -> dict[str, Shape]:
        return {name: place.shape for name, place in self._places.items()}

    @property
    def paths(self) -> tuple[Path, ...]:
        """The files these tensors are in."""
        return tuple(sorted({place.path for place in self._places.values()}))

    def __contains__(self, name: str) -> bool:
        return name in self._places

    def __len__(self) -> int:
        return len(self._places)

    def within(self, prefix: str) -> TensorFiles:
        """Those tensors whose names begin with the prefix, under what follows it."""
        chosen = {name[len(prefix) :]: place for name, place in self._places.items() if name.startswith(prefix)}
        return TensorFiles(chosen, self.source)

    def without(self, is_unwanted: Callable[[str], bool]) -> TensorFiles:
        """All but the tensors of such names."""
        return TensorFiles({name: place for name, place in self._places.items() if not is_unwanted(name)}, self.source)

    def renamed(self, new_name: Callable[[str], str]) -> TensorFiles:
        """The same tensors under other names."""
        return TensorFiles({new_name(name): place for name, place in self._places.items()}, self.source)

    def said_to_be(self, source: Path) -> TensorFiles:
        """The same tensors, which in messages come from `source`."""
        return TensorFiles(self._places, source)

    def unreadable(self) -> list[str]:
        """One line for each way of storing weights that cannot be read."""
        odd = {place.dtype: name for name, place in self._places.items() if place.dtype not in READABLE_DTYPES}
        lines = [
            f"stores {name} as {dtype}; readable are {', '.join(sorted(READABLE_DTYPES))}" for dtype, name in odd.items()
        ]
        for name, place in self._places.items():
            if place.scale is not None and not _is_one_or_one_a_row(place.scale.shape, place.shape):
                return [*lines, f"scales {name} by blocks of {place.scale.shape}; read are one scale a tensor or one a row"]
        return lines

    def read(self, names: Iterable[str], dtype: torch.dtype) -> Iterator[tuple[str, Tensor]]:
        """Name and tensor in `dtype` on the CPU, in memory of its own, one at a time.

        Copied always: a tensor that shares the file's memory would change with the file, and keep it mapped.
        """
        for path, wanted in self._by_file(names):
            with safe_open(path, "pt") as file:
                for name in wanted:
                    place = self._places[name]
                    value = file.get_tensor(place.name)
                    if place.scale is not None:
                        value = value.float() * _read_scale(place.scale, value.dim())
                    yield name, value.to(dtype, copy=True)

    def read_one(self, name: str, dtype: torch.dtype) -> Tensor:
        return next(self.read([name], dtype))[1]

    def _by_file(self, names: Iterable[str]) -> list[tuple[Path, list[str]]]:
        grouped: dict[Path, list[str]] = {}
        for name in names:
            grouped.setdefault(self._places[name].path, []).append(name)
        return list(grouped.items())


def _is_one_or_one_a_row(scale: Shape, shape: Shape) -> bool:
    return math.prod(scale) == 1 or (scale[:1] == shape[:1] and math.prod(scale[1:]) == 1)


def _read_scale(place: _Place, num_axes: int) -> Tensor:
    """One scale, or one a row, in a shape that multiplies a tensor of so many axes."""
    with safe_open(place.path, "pt") as file:
        return file.get_tensor(place.name).float().reshape(-1, *[1] * (num_axes - 1))


def open_file(path: Path) -> TensorFiles:
    """The tensors of one safetensors file. Raises TensorFilesError saying what is there instead."""
    return TensorFiles(_with_scales(_read_header(path)), path)


def open_folder(folder: Path) -> TensorFiles:
    """The tensors of a folder of diffusers or transformers: one file, or shards listed in an index.

    Raises TensorFilesError naming what is missing.
    """
    for standard in STANDARD_NAMES:
        if (folder / f"{standard}.safetensors").is_file():
            return open_file(folder / f"{standard}.safetensors").said_to_be(folder)
        if (folder / f"{standard}.safetensors.index.json").is_file():
            return _open_shards(folder, folder / f"{standard}.safetensors.index.json")
    # Otherwise a variant, such as model.fp16.safetensors or model.safetensors.index.fp16.json; only if there is but one.
    indices = sorted(folder.glob("*.safetensors.index*.json"))
    files = sorted(folder.glob("*.safetensors"))
    if len(indices) == 1:
        return _open_shards(folder, indices[0])
    if not indices and len(files) == 1:
        return open_file(files[0]).said_to_be(folder)
    if not files:
        raise TensorFilesError(f"{folder} has no .safetensors file (pickled .bin, .pt and .ckpt weights are not read)")
    names = ", ".join(path.name for path in (indices or files)[:4])
    raise TensorFilesError(f"{folder} has several sets of weights ({names}) and none of the standard name; give one file")


def open_any(path: Path) -> TensorFiles:
    """A file or a folder. Raises TensorFilesError."""
    try:
        return open_folder(path) if path.is_dir() else open_file(path)
    except OSError as error:  # no name that the system takes, no right to look
        raise TensorFilesError(f"{path} cannot be read: {error.strerror}") from error


# --- checking ----------------------------------------------------------------------------------------------------------


def shape_errors(found: Mapping[str, Shape], expected: Mapping[str, Shape]) -> list[str]:
    """One line for each tensor that is missing, misshapen or not expected."""
    errors = [f"misses tensor {name} {expected[name]}" for name in expected if name not in found]
    errors += [
        f"tensor {name} has shape {found[name]}, expected {expected[name]}"
        for name in expected
        if name in found and found[name] != expected[name]
    ]
    errors += [f"has tensor {name}, which this network does not have" for name in found if name not in expected]
    if len(errors) > MAX_ERRORS_SHOWN:
        rest = len(errors) - MAX_ERRORS_SHOWN
        errors = [*errors[:MAX_ERRORS_SHOWN], f"and {rest} more tensors that do not fit"]
    return errors


# --- headers -----------------------------------------------------------------------------------------------------------


def _read_header(path: Path) -> dict[str, _Place]:
    if not path.is_file():
        raise TensorFilesError(f"{path} does not exist")
    try:
        with safe_open(path, "pt") as file:
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118  it is no dict
            return {
                name: _Place(path, name, tuple(part.get_shape()), str(part.get_dtype())) for name, part in slices.items()
            }
    except (SafetensorError, OSError) as error:
        raise TensorFilesError(f"{path} {_what_it_is_instead(path)} ({error})") from error


def _what_it_is_instead(path: Path) -> str:
    """What a file that safetensors cannot read looks like."""
    try:
        with path.open("rb") as file:
            start = file.read(200)
            size = file.seek(0, 2)
    except OSError:
        return "cannot be read"
    if not start:
        return "is empty"
    if start.startswith(b"version https://git-lfs"):
        return "is a git-lfs pointer, not the weights: run `git lfs pull` where it came from, or download the file itself"
    if start.lstrip()[:1] == b"<":
        return "is a web page: the download failed, often because the model's licence was not accepted"
    if start.startswith(b"GGUF"):
        return "is a GGUF file, which is not read: give the safetensors file it was made from"
    header_bytes = int.from_bytes(start[:8], "little")
    if start[8:9] == b"{" and header_bytes <= _MAX_HEADER_BYTES:  # before pickles: any byte may be a length's first
        if size < 8 + header_bytes + _data_bytes(path, header_bytes):
            return f"is cut off: it has {size:,} bytes and its header announces more; download it again"
    elif start.startswith((b"PK\x03\x04", b"\x80")):
        return "is a pickled file, which is not read: convert it to safetensors"
    return "is no readable safetensors file"


def _data_bytes(path: Path, header_bytes: int) -> int:
    """Bytes of tensors a header announces: 1 or more when the header itself is incomplete, 0 when it makes no sense."""
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


def _with_scales(places: Mapping[str, _Place]) -> dict[str, _Place]:
    """Weights joined with their scales; what only matters to inference left out."""
    scales = {
        name.removesuffix(suffix) + ".weight": place
        for name, place in places.items()
        for suffix in _SCALE_SUFFIXES
        if name.endswith(suffix)
    }
    return {
        name: replace(place, scale=scales.get(name))
        for name, place in places.items()
        if not name.endswith((*_SCALE_SUFFIXES, *_INFERENCE_ONLY))
    }


def _open_shards(folder: Path, index: Path) -> TensorFiles:
    try:
        weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        wanted = {str(name): folder / str(file) for name, file in weight_map.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise TensorFilesError(f"{index} is no index of shards: {error!r}") from error
    missing = sorted({path.name for path in wanted.values() if not path.is_file()})
    if missing:
        raise TensorFilesError(f"{folder} lacks {', '.join(missing)}, which {index.name} lists")
    places: dict[str, _Place] = {}
    for path in sorted(set(wanted.values())):
        # Shards may overlap; whose tensor counts, the index says. What it does not list, such as scales, is taken as it is.
        places.update({name: place for name, place in _read_header(path).items() if wanted.get(name, path) == path})
    absent = [name for name in wanted if name not in places]
    if absent:
        raise TensorFilesError(f"{wanted[absent[0]]} has no tensor {absent[0]}, which {index.name} says it has")
    return TensorFiles(_with_scales(places), folder)
