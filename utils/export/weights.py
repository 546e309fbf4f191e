"""Weights for other programs: public files of what has been trained.

A file is written by all stages at once, each at its own place in it, or each stage writes a file of its own; so no process
ever holds the network, and beyond its own layers none holds more than a tensor. A step's folder appears when all of its
files are whole.
"""

from __future__ import annotations

import functools
import json
import shutil
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from models.family import FileTensor, ModelFamily, ModelFilesError
from utils.checkpoint.save import step_folder
from utils.config.schema.experiment import ExperimentConfig
from utils.console import print_line
from utils.distributed import group
from utils.distributed.world import world
from utils.export.metadata import kohya_metadata, run_metadata
from utils.files.atomic import remove_folder, sync_folder, write_text
from utils.files.safetensors_writer import Entry, FileLayout, create_file, plan_file, write_tensors
from utils.pipeline.engine import Pipeline
from utils.pipeline.stage import LocalLayer
from utils.trainable import lora

EXPORT_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
DIFFUSERS_FOLDER = "transformer"
DIFFUSERS_NAME = "diffusion_pytorch_model"
EMA_FOLDER = "ema"


@dataclass(frozen=True)
class Exported:
    """A tensor on its way into a file."""

    key: str
    value: Tensor
    """On the CPU, or on meta where only its shape was asked for."""
    exact: bool = False
    """Kept in float32 whatever the precision of the file."""

    def entry(self, dtype: torch.dtype) -> Entry:
        return Entry(self.key, torch.float32 if self.exact else dtype, tuple(self.value.shape))


@dataclass(frozen=True)
class Reader:
    """What is trained, and what is not, in the layers of this rank."""

    pipeline: Pipeline
    ema: bool
    """The average of the weights instead of the weights."""
    shapes_only: bool

    def value(self, layer: LocalLayer, name: str) -> Tensor:
        """A parameter or constant: of what is trained the optimizer's float32 weights, the rest as it is.

        All replicas must ask for the same in the same order.
        """
        tensor = layer.module.state_dict()[name]
        trained = layer.trainable()
        if self.shapes_only:
            return torch.empty(tensor.shape, dtype=torch.float32, device="meta")
        if name in trained:
            return self.pipeline.read_weights(trained[name], ema=self.ema)
        return tensor.cpu()


Tensors = Callable[[Reader], Iterator[Exported]]


@dataclass(frozen=True)
class ExportedFile:
    """A file, or with `per_stage` a file for each stage and their index: what it is called and what goes into it."""

    name: str
    tensors: Tensors
    metadata: dict[str, str]
    beside: tuple[FileTensor, ...] = ()
    """What is not the network's; rank 0 writes it."""
    per_stage: bool = False


# --- what is written ---------------------------------------------------------------------------------------------------


def wanted_formats(config: ExperimentConfig) -> list[str]:
    """`save.formats`, or its default: the native file, and for a low-rank adapter diffusers' too."""
    if config.save.formats is not None:
        return list(config.save.formats)
    return ["native", "diffusers"] if config.adapter is not None and config.adapter.type == "lora" else ["native"]


def export_errors(config: ExperimentConfig, family: ModelFamily) -> list[tuple[str, str]]:
    """Formats that cannot hold what is trained, as (key, message)."""
    formats = wanted_formats(config)
    if config.adapter is not None:
        errors = []
        if "complete" in formats:
            errors.append(("save.formats", "complete files hold a whole network; an adapter has native and diffusers"))
        if config.adapter.type == "lokr" and "diffusers" in formats:
            errors.append(("save.formats", "diffusers' pipelines read no LoKr; leave diffusers out, or train a lora"))
        return errors
    if "complete" in formats:
        try:
            family.frozen_tensors()
        except ModelFilesError as error:
            return [("save.formats", f"no complete file: {text}") for _, text in error.errors]
    return []


def full_files(family: ModelFamily, formats: list[str], metadata: dict[str, str]) -> list[ExportedFile]:
    """The whole network: native keys alone or beside the frozen networks, diffusers' folder."""

    def native(reader: Reader, prefix: str = "") -> Iterator[Exported]:
        for layer in reader.pipeline.local_layers():
            constants = [name for name, _ in layer.module.named_buffers()]
            for name in (*layer.layer.shapes, *constants):
                key = prefix + layer.layer.prefix + name
                yield Exported(key, reader.value(layer, name), exact=name in constants)

    def diffusers(reader: Reader) -> Iterator[Exported]:
        for tensor in native(reader):
            for key, value in family.diffusers_weights({tensor.key: tensor.value}).items():
                yield replace(tensor, key=key, value=value)

    metadata = {**family.export_metadata(), **metadata}
    complete = functools.partial(native, prefix=family.native_prefix)
    makers: dict[str, Callable[[], ExportedFile]] = {
        "native": lambda: ExportedFile("mmdit.safetensors", native, metadata),
        "complete": lambda: ExportedFile("complete.safetensors", complete, metadata, tuple(family.frozen_tensors())),
        "diffusers": lambda: ExportedFile(DIFFUSERS_FOLDER, diffusers, metadata, per_stage=True),
    }
    return [makers[name]() for name in formats]


def adapter_files(
    family: ModelFamily, config: ExperimentConfig, formats: list[str], metadata: dict[str, str]
) -> list[ExportedFile]:
    """The adapter with native keys, for ComfyUI and sd-scripts, and with diffusers', its scale folded in."""
    settings = config.adapter
    assert settings is not None

    def tensors(reader: Reader, convert: Callable[[dict[str, lora.ModuleAdapter]], dict[str, Tensor]]) -> Iterator[Exported]:
        for layer in reader.pipeline.local_layers():
            values = {name: reader.value(layer, name) for name in layer.trainable()}
            for key, value in convert(lora.collect(layer.module, layer.layer.prefix, values)).items():
                yield Exported(key, value, exact=value.dim() == 0)  # an alpha need not be a round number

    metadata = {**family.export_metadata(), **metadata}
    metadata["modelspec.architecture"] += "/lora"
    native = functools.partial(tensors, convert=family.native_adapter)
    diffusers = functools.partial(tensors, convert=family.diffusers_adapter)
    files = {
        "native": ExportedFile(f"{settings.type}.safetensors", native, {**metadata, **kohya_metadata(settings)}),
        "diffusers": ExportedFile(f"{settings.type}_diffusers.safetensors", diffusers, metadata),
    }
    return [files[name] for name in formats]


def write_weights(pipeline: Pipeline, family: ModelFamily, config: ExperimentConfig, parent: Path, step: int) -> None:
    """Write the public files of what is trained into `parent/step_…`. All ranks together, on a file system they share."""
    final = step_folder(parent, step)
    temporary = parent / f".{final.name}.tmp"
    name = f"{parent.name}/{final.name}"
    is_main = world().is_main
    own = run_metadata(config, family, step) if is_main else {}
    group.wait_for_all(f"hashes of export {name}")  # a large base file may take longer than a collective waits
    metadata = group.broadcast(own)
    formats = wanted_formats(config)
    if config.adapter is None:
        files = full_files(family, formats, metadata)
    else:
        files = adapter_files(family, config, formats, metadata)
    averages = [False, True] if config.ema is not None else [False]
    if is_main:
        for left_over in parent.glob(".step_*"):
            shutil.rmtree(left_over)
        for ema in averages:
            (temporary / EMA_FOLDER if ema else temporary).mkdir(parents=True)
    group.wait_for_all(f"export {name} begins")
    for ema in averages:
        for file in files:
            folder = temporary / EMA_FOLDER if ema else temporary
            marked = replace(file, metadata={**file.metadata, "mmdit_pipe.weights": "average" if ema else "last"})
            _write(pipeline, marked, folder / file.name, EXPORT_DTYPES[config.save.dtype], ema, family.diffusers_config())
    group.wait_for_all(f"export {name} written")
    if is_main:
        if final.exists():
            remove_folder(final)
        sync_folder(temporary)
        temporary.replace(final)
        sync_folder(parent)
    group.wait_for_all(f"export {name} named")


def drop_weights_after(parent: Path, step: int) -> None:
    """Remove weights of later steps: a run that goes on from `step` makes others. One process only."""
    for folder in sorted(parent.glob("step_*")):
        if folder.name > step_folder(parent, step).name:
            print_line(f"removed {folder}: this run goes on from step {step}")
            remove_folder(folder)


def keep_newest_weights(parent: Path) -> None:
    """Remove all weights in `parent` but those of the last step. One process only."""
    for folder in sorted(parent.glob("step_*"))[:-1]:
        remove_folder(folder)


# --- writing -----------------------------------------------------------------------------------------------------------


def _write(
    pipeline: Pipeline, file: ExportedFile, path: Path, dtype: torch.dtype, ema: bool, diffusers_config: dict[str, object]
) -> None:
    shapes = Reader(pipeline, ema, shapes_only=True)
    entries = [tensor.entry(dtype) for tensor in file.tensors(shapes)] if pipeline.replica == 0 else []
    everyones = group.gather(entries)
    if file.per_stage:
        _write_stages(pipeline, file, path, dtype, ema, everyones)
        if world().is_main:
            write_text(path / "config.json", json.dumps(diffusers_config, indent=2))
        group.wait_for_all(f"shards of {path}")
        return
    beside = [Entry(part.key, part.dtype or dtype, part.shape) for part in file.beside]
    layout = plan_file([entry for part in everyones for entry in part] + beside, file.metadata)
    if world().is_main:
        create_file(path, layout)
    group.wait_for_all(f"header of {path}")
    _write_own(pipeline, file, path, layout, dtype, ema)
    if world().is_main:
        write_tensors(path, layout, ((part.key, part.read(part.dtype or dtype)) for part in file.beside))
    # Writing what is beside the network may take longer than a collective waits.
    group.wait_for_all(f"tensors of {path}")


def _write_stages(
    pipeline: Pipeline, file: ExportedFile, folder: Path, dtype: torch.dtype, ema: bool, everyones: list[list[Entry]]
) -> None:
    """One file for each stage, and the index that says which tensor is where."""
    stages = [entries for entries in everyones if entries]
    names = [f"{DIFFUSERS_NAME}-{i:05d}-of-{len(stages):05d}.safetensors" for i in range(1, len(stages) + 1)]
    if world().is_main:
        folder.mkdir()
        where = {entry.key: name for name, entries in zip(names, stages, strict=True) for entry in entries}
        size = sum(entry.num_bytes for entries in stages for entry in entries)
        index = {"metadata": {"total_size": size, **file.metadata}, "weight_map": where}
        write_text(folder / f"{DIFFUSERS_NAME}.safetensors.index.json", json.dumps(index, indent=2))
    group.wait_for_all(f"folder {folder}")
    layout = plan_file(stages[pipeline.stage], file.metadata)
    path = folder / names[pipeline.stage]
    if pipeline.replica == 0:
        create_file(path, layout)
    _write_own(pipeline, file, path, layout, dtype, ema)


def _write_own(
    pipeline: Pipeline, file: ExportedFile, path: Path, layout: FileLayout, dtype: torch.dtype, ema: bool
) -> None:
    """This rank's layers' tensors, one in memory at a time. Other replicas only take part in putting them together."""
    tensors = file.tensors(Reader(pipeline, ema, shapes_only=False))
    if pipeline.replica != 0:
        for _ in tensors:
            pass
        return
    write_tensors(path, layout, _rounded(tensors, dtype))


def _rounded(tensors: Iterator[Exported], dtype: torch.dtype) -> Iterator[tuple[str, Tensor]]:
    """Each tensor as the file has it; says which have numbers that the file's precision cannot hold."""
    for tensor in tensors:
        value = tensor.value.to(torch.float32 if tensor.exact else dtype)
        if not value.isfinite().all():
            print(f"warning: in the exported file {tensor.key} has numbers that are not finite", file=sys.stderr, flush=True)
        yield tensor.key, value
