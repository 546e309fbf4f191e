"""Experiments on the tiny model and their runs; runs with equal settings are shared between tests."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from torch import Tensor

from tests.distributed.launch import Finished, Ranks, newest_run, read_metrics, read_weights, start_ranks
from tests.tiny_model import write_experiment


@dataclass(frozen=True)
class Run:
    """A run that ended with exit code 0."""

    experiment: Path
    folder: Path
    output: str

    @cached_property
    def metrics(self) -> list[dict[str, Any]]:
        return read_metrics(self.folder)

    @property
    def last_step(self) -> int:
        return int(self.metrics[-1]["step"])

    @cached_property
    def weights(self) -> dict[str, Tensor]:
        """Exported tensors of the last step, from all files."""
        folder = self.folder / "weights" / f"step_{self.last_step:06d}"
        tensors: dict[str, Tensor] = {}
        for path in sorted(folder.glob("*.safetensors")):
            tensors.update(read_weights(self.folder, self.last_step, path.name))
        return tensors


class Lab:
    """Writes experiments on the tiny model and runs them; all use one cache of latents and text embeddings."""

    def __init__(self, model: Path, dataset: Path, folder: Path) -> None:
        self.model, self.dataset, self.folder = model, dataset, folder
        self._runs: dict[str, Run] = {}
        self._num_experiments = 0

    def experiment(self, changes: Mapping[str, Any], dataset: Path | None = None) -> Path:
        """experiment.toml in a new folder: six steps of four micro-batches of one image, with gradients that are clipped."""
        self._num_experiments += 1
        settings = {
            "max_steps": 6,
            "cache_dir": str(self.folder / "cache"),
            "pipeline.micro_batch_size_per_gpu": 1,
            "pipeline.gradient_accumulation_steps": 4,
            "optimizer.gradient_clipping": 1.0,
            "save.checkpoint_every_n_steps": 2,
            **changes,
        }
        folder = self.folder / f"experiment_{self._num_experiments:03d}"
        return write_experiment(folder, self.model, dataset or self.dataset, **settings)

    def start(self, num_processes: int, experiment: Path, *arguments: str) -> Ranks:
        log = experiment.parent / f"log_{len(list(experiment.parent.glob('log_*')))}.txt"
        return start_ranks(num_processes, ["--config", str(experiment), *arguments], log)

    def finish(self, num_processes: int, experiment: Path, *arguments: str) -> Finished:
        """Starts a run and waits for its end, whatever the exit code."""
        return self.start(num_processes, experiment, *arguments).wait()

    def run(self, num_processes: int, experiment: Path, *arguments: str) -> Run:
        """Starts a run, waits for its end and asserts exit code 0."""
        finished = self.finish(num_processes, experiment, *arguments)
        assert finished.exit_code == 0, finished.output
        return Run(experiment, newest_run(experiment.parent / "output"), finished.output)

    def shared_run(self, num_processes: int, changes: Mapping[str, Any]) -> Run:
        """A finished run with these changes, started at the first call. Tests must not change its files."""
        key = json.dumps([num_processes, changes], sort_keys=True)
        if key not in self._runs:
            self._runs[key] = self.run(num_processes, self.experiment(changes))
        return self._runs[key]
