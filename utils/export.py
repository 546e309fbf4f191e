"""Weights for other programs: public files of what has been trained.

A file is written by all stages at once, each at its own place in it, so no process ever holds the network: rank 0 gathers
names and shapes, writes the header and makes room; every stage writes its layers' tensors; rank 0 gives the file its name.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import torch
from torch import Tensor

from models.base import LoraWeights, ModelAdapter
from utils import distributed, lora
from utils.atomic import replace_file
from utils.checkpoint import step_folder
from utils.config.schema import AdapterConfig, ExperimentConfig
from utils.pipeline.engine import LocalLayer, Pipeline

EXPORT_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_SAFETENSORS_DTYPES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}

Values = dict[str, Tensor]
Convert = Callable[[LocalLayer, Values], Values]
"""A layer's values by parameter name to a file's tensors by key. Called with meta tensors first, for the shapes."""


@dataclass(frozen=True)
class ExportedFile:
    """One file to write: its name, how a layer's tensors appear in it, its header entries."""

    name: str
    convert: Convert
    metadata: dict[str, str]
    only_trained: bool
    """Whether `convert` looks at nothing but what is trained."""


def full_files(adapter: ModelAdapter, metadata: dict[str, str]) -> list[ExportedFile]:
    """The whole network as one file with native keys."""

    def native(layer: LocalLayer, values: Values) -> Values:
        return {layer.layer.prefix + name: value for name, value in values.items()}

    return [ExportedFile("mmdit.safetensors", native, {**adapter.export_metadata(), **metadata}, only_trained=False)]


def lora_files(adapter: ModelAdapter, config: AdapterConfig, metadata: dict[str, str]) -> list[ExportedFile]:
    """The adapter twice: native keys for ComfyUI and sd-scripts, and diffusers' keys with alpha folded in."""
    alpha = float(config.alpha if config.alpha is not None else config.rank)

    def weights(layer: LocalLayer, values: Values) -> LoraWeights:
        return lora.collect(layer.module, layer.layer.prefix, values, alpha)

    architecture = adapter.export_metadata()
    common = {**architecture, **metadata}
    common["modelspec.architecture"] = architecture["modelspec.architecture"] + "/lora"
    kohya = {
        "ss_network_module": "networks.lora_sd3",
        "ss_network_dim": str(config.rank),
        "ss_network_alpha": str(alpha),
    }

    def native(layer: LocalLayer, values: Values) -> Values:
        return adapter.native_lora(weights(layer, values))

    def diffusers(layer: LocalLayer, values: Values) -> Values:
        return adapter.diffusers_lora(weights(layer, values))

    return [
        ExportedFile("lora.safetensors", native, {**common, **kohya}, only_trained=True),
        ExportedFile("lora_diffusers.safetensors", diffusers, common, only_trained=True),
    ]


def write_weights(pipeline: Pipeline, adapter: ModelAdapter, config: ExperimentConfig, parent: Path, step: int) -> None:
    """Write the public files of what is trained into `parent/step_…`. All ranks together, on a file system they share."""
    folder = step_folder(parent, step)
    metadata = run_metadata(config, step)
    if config.adapter is None:
        files = full_files(adapter, metadata)
    else:
        files = lora_files(adapter, config.adapter, metadata)
    if distributed.world().is_main:
        folder.mkdir(parents=True, exist_ok=True)
    for file in files:
        _write_file(pipeline, file, folder / file.name, EXPORT_DTYPES[config.save.dtype])


def run_metadata(config: ExperimentConfig, step: int) -> dict[str, str]:
    """Header entries every file carries: what it was trained as, and so how to use it."""
    return {
        "modelspec.sai_model_spec": "1.0.1",
        "modelspec.title": config.output_dir.name,
        "modelspec.date": datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
        "mmdit_pipe.step": str(step),
        "mmdit_pipe.seed": str(config.seed),
        "mmdit_pipe.objective": config.objective.model_dump_json(),
        "mmdit_pipe.text_tokens": json.dumps(
            {key: value for key, value in config.model.model_dump().items() if key.endswith("token_length")}
        ),
    }


# --- one file ----------------------------------------------------------------------------------------------------------


def _write_file(pipeline: Pipeline, file: ExportedFile, path: Path, dtype: torch.dtype) -> None:
    temporary = path.with_name(f".{path.name}.tmp")
    shapes = [
        (key, str(value.dtype), tuple(value.shape)) for key, value in _tensors(pipeline, file, dtype, shapes_only=True)
    ]
    everyones = distributed.gather(shapes if pipeline.replica == 0 else [])
    offsets = _write_header(temporary, [entry for part in everyones for entry in part], file.metadata)
    distributed.wait_for_all(f"header of {path}")
    _write_tensors(pipeline, file, temporary, dtype, offsets)
    distributed.wait_for_all(f"tensors of {path}")
    if distributed.world().is_main:
        replace_file(temporary, path)
    distributed.wait_for_all(f"name of {path}")


def _write_tensors(pipeline: Pipeline, file: ExportedFile, path: Path, dtype: torch.dtype, offsets: dict[str, int]) -> None:
    with path.open("r+b") as output:
        for key, value in _tensors(pipeline, file, dtype, shapes_only=False):
            if pipeline.replica == 0:
                output.seek(offsets[key])
                output.write(value.contiguous().view(torch.uint8).numpy().tobytes() if value.dim() else _scalar(value))


def _scalar(value: Tensor) -> bytes:
    return value[None].view(torch.uint8).numpy().tobytes()


def _tensors(
    pipeline: Pipeline, file: ExportedFile, dtype: torch.dtype, *, shapes_only: bool
) -> Iterator[tuple[str, Tensor]]:
    """The file's tensors of this rank's layers, one layer in memory at a time."""
    for layer in pipeline.local_layers():
        values = _layer_values(pipeline, layer, dtype, file.only_trained, shapes_only)
        yield from file.convert(layer, values).items()


def _layer_values(
    pipeline: Pipeline, layer: LocalLayer, dtype: torch.dtype, only_trained: bool, shapes_only: bool
) -> Values:
    """What is trained in the layer from the optimizer's float32 weights, the rest as it is. Constant tables keep float32."""
    trained = layer.trainable()
    constants = {name for name, _ in layer.module.named_buffers()}
    values = {}
    for name, tensor in layer.module.state_dict().items():
        wanted = torch.float32 if name in constants else dtype
        if only_trained and name not in trained:
            continue
        if shapes_only:
            values[name] = torch.empty(tensor.shape, dtype=wanted, device="meta")
        elif name in trained:
            values[name] = pipeline.read_weights(trained[name]).to(wanted)
        else:
            values[name] = tensor.detach().to("cpu", wanted)
    return values


def _write_header(path: Path, entries: list[tuple[str, str, tuple[int, ...]]], metadata: dict[str, str]) -> dict[str, int]:
    """Where each tensor's bytes go in a safetensors file of these entries; rank 0 writes the header and makes room.

    Format: 8 bytes of little-endian header length, the header as JSON padded with spaces, the tensors.
    """
    dtypes = {str(dtype): dtype for dtype in _SAFETENSORS_DTYPES}
    header: dict[str, object] = {"__metadata__": {"format": "pt", **metadata}}
    starts: dict[str, int] = {}
    position = 0
    for key, dtype_name, shape in sorted(entries, key=lambda entry: (-dtypes[entry[1]].itemsize, entry[0])):
        num_bytes = dtypes[dtype_name].itemsize * int(torch.Size(shape).numel())
        header[key] = {
            "dtype": _SAFETENSORS_DTYPES[dtypes[dtype_name]],
            "shape": list(shape),
            "data_offsets": [position, position + num_bytes],
        }
        starts[key] = position
        position += num_bytes
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    if distributed.world().is_main:
        with path.open("wb") as file:
            file.write(struct.pack("<Q", len(text)) + text)
            file.truncate(8 + len(text) + position)
    return {key: 8 + len(text) + start for key, start in starts.items()}
