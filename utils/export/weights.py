"""Exports what is trained as public files for other programs.

All stages write one file together, each into its own part of it, or each stage writes a shard of its own. No process holds
the network: a rank holds its own layers and one tensor more. The folder of a step is renamed into place once all of its
files are complete.
"""

from __future__ import annotations

import contextlib
import json
import shutil
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import torch

from models.family import ModelFamily
from utils.checkpoint.manifest import step_folder
from utils.config.schema.experiment import ExperimentConfig
from utils.config.schema.saving import ExportFormat
from utils.console import print_line
from utils.distributed import group
from utils.distributed.world import world
from utils.export.formats import WeightReader, rounded
from utils.export.metadata import run_metadata
from utils.files.atomic import remove_folder, sync_folder, write_text
from utils.files.file_index import FileIndex
from utils.files.safetensors_writer import Entry, FileLayout, create_file, plan_file, write_tensors
from utils.pipeline.engine import Pipeline
from utils.trainable.base import ExportFile, ShardedFolder, Trainable

EXPORT_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
EMA_FOLDER = "ema"


@dataclass(frozen=True)
class Exporter:
    """Writes the public files of a run; complete on every rank."""

    pipeline: Pipeline
    family: ModelFamily
    trainable: Trainable
    config: ExperimentConfig

    def write(self, parent: Path, step: int) -> None:
        """Writes the weights after `step` steps to `parent/step_…`. All ranks together, on a shared file system."""
        final = step_folder(parent, step)
        temporary = parent / f".{final.name}.tmp"
        name = f"{parent.name}/{final.name}"
        is_main = world().is_main
        files = self._files(name, step)
        averages = [False, True] if self.config.ema is not None else [False]
        if is_main:
            for leftover in parent.glob(".step_*"):
                shutil.rmtree(leftover)
            for ema in averages:
                (temporary / EMA_FOLDER if ema else temporary).mkdir(parents=True)
        group.wait_for_all(f"export {name} starts")
        for ema in averages:
            for file in files:
                marked = replace(file, metadata={**file.metadata, "mmdit_pipe.weights": "average" if ema else "last"})
                self._write(marked, (temporary / EMA_FOLDER if ema else temporary) / file.name, ema)
        group.wait_for_all(f"export {name} written")
        if is_main:
            if final.exists():
                remove_folder(final)
            sync_folder(temporary)
            temporary.replace(final)
            sync_folder(parent)
        group.wait_for_all(f"export {name} renamed")

    def _files(self, name: str, step: int) -> list[ExportFile]:
        """The files of the configured formats with their complete headers."""
        own = self._run_metadata(step) if world().is_main else {}
        group.wait_for_all(f"hashes of export {name}")  # hashing a large base file may exceed a collective's timeout
        metadata = {**self.family.export_metadata(), **group.broadcast(own)}
        files = self.trainable.export_files(export_formats(self.config, self.trainable))
        return [replace(file, metadata={**metadata, **file.metadata}) for file in files]

    def _run_metadata(self, step: int) -> dict[str, str]:
        metadata = run_metadata(self.config, self.family, step, self._base_files)
        with contextlib.suppress(OSError):  # the cache of another user may be read-only
            self._base_files.save()
        return metadata

    @cached_property
    def _base_files(self) -> FileIndex:
        """Stores the hashes of the base weights between exports and between runs."""
        return FileIndex(self.config.cache_folder)

    # --- one file ----------------------------------------------------------------------------------------------------

    def _write(self, file: ExportFile, path: Path, ema: bool) -> None:
        dtype, reader = EXPORT_DTYPES[self.config.save.dtype], WeightReader(self.pipeline, ema)
        entries = group.gather(reader.entries(file, dtype) if self.pipeline.replica == 0 else [])
        if file.shards is not None:
            self._write_shards(file, file.shards, path, reader, [part for part in entries if part])
            return
        extra = [Entry(part.key, part.dtype or dtype, part.shape) for part in file.extra_tensors]
        layout = plan_file([entry for part in entries for entry in part] + extra, dict(file.metadata))
        if world().is_main:
            create_file(path, layout)
        group.wait_for_all(f"header of {path}")
        self._write_own(file, path, layout, reader)
        if world().is_main:
            write_tensors(path, layout, ((part.key, part.read(part.dtype or dtype)) for part in file.extra_tensors))
        # Writing the extra tensors may exceed a collective's timeout.
        group.wait_for_all(f"tensors of {path}")

    def _write_shards(
        self, file: ExportFile, shards: ShardedFolder, folder: Path, reader: WeightReader, stages: list[list[Entry]]
    ) -> None:
        """One file for each stage, an index of the tensors, and config.json."""
        names = [f"{shards.stem}-{i:05d}-of-{len(stages):05d}.safetensors" for i in range(1, len(stages) + 1)]
        if world().is_main:
            folder.mkdir()
            where = {entry.key: name for name, entries in zip(names, stages, strict=True) for entry in entries}
            size = sum(entry.num_bytes for entries in stages for entry in entries)
            index = {"metadata": {"total_size": size, **file.metadata}, "weight_map": where}
            write_text(folder / f"{shards.stem}.safetensors.index.json", json.dumps(index, indent=2))
        group.wait_for_all(f"folder {folder}")
        layout = plan_file(stages[self.pipeline.stage], dict(file.metadata))
        path = folder / names[self.pipeline.stage]
        if self.pipeline.replica == 0:
            create_file(path, layout)
        self._write_own(file, path, layout, reader)
        if world().is_main:
            write_text(folder / "config.json", json.dumps(shards.config, indent=2))
        group.wait_for_all(f"shards of {folder}")

    def _write_own(self, file: ExportFile, path: Path, layout: FileLayout, reader: WeightReader) -> None:
        """Writes the tensors of this rank's layers. Other replicas only take part in gathering them."""
        tensors = reader.tensors(file)
        if self.pipeline.replica != 0:
            for _ in tensors:
                pass
            return
        write_tensors(path, layout, rounded(tensors, EXPORT_DTYPES[self.config.save.dtype]))


def export_formats(config: ExperimentConfig, trainable: Trainable) -> list[ExportFormat]:
    """`save.formats`, or the default formats of what is trained."""
    return list(config.save.formats if config.save.formats is not None else trainable.default_formats)


def drop_weights_after(parent: Path, step: int) -> None:
    """Removes weights of later steps: the run resumes from `step` and will export its own. Rank 0 only."""
    for folder in sorted(parent.glob("step_*")):
        if folder.name > step_folder(parent, step).name:
            print_line(f"removed {folder}: resuming from step {step}")
            remove_folder(folder)


def keep_newest_weights(parent: Path) -> None:
    """Removes all weights in `parent` but those of the last step. Rank 0 only."""
    for folder in sorted(parent.glob("step_*"))[:-1]:
        remove_folder(folder)
