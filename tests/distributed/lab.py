"""Experiments on the tiny model and their runs; runs with equal settings are shared between tests of all workers."""

from __future__ import annotations

import fcntl
import hashlib
import json
import tempfile
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
    """Writes experiments on the tiny model and runs them; all use one cache of latents and text embeddings.

    Test workers may have a folder in common: the first that asks for a shared run starts it, the others wait for its end.
    """

    def __init__(self, model: Path, dataset: Path, folder: Path) -> None:
        self.model, self.dataset, self.folder = model, dataset, folder
        self._runs: dict[str, Run] = {}
        folder.mkdir(parents=True, exist_ok=True)

    def experiment(self, changes: Mapping[str, Any], dataset: Path | None = None) -> Path:
        """experiment.toml in a new folder: six steps of four micro-batches of one image, with gradients that are clipped.

        The two groups of a step may have different buckets.
        """
        settings = {
            "max_steps": 6,
            "cache_dir": str(self.folder / "cache"),
            "pipeline.micro_batch_size_per_gpu": 1,
            "pipeline.gradient_accumulation_steps": 4,
            "pipeline.bucket_group": 2,
            "optimizer.gradient_clipping": 1.0,
            "save.checkpoint_every_n_steps": 2,
            **changes,
        }
        folder = Path(tempfile.mkdtemp(prefix="experiment_", dir=self.folder))
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
            self._runs[key] = self._find_or_run(key, num_processes, changes)
        return self._runs[key]

    def _find_or_run(self, key: str, num_processes: int, changes: Mapping[str, Any]) -> Run:
        """The run of any worker; `key`.json has its paths once it has ended."""
        record = self.folder / f"{hashlib.sha256(key.encode()).hexdigest()[:16]}.json"
        with record.with_suffix(".lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not record.exists():
                run = self.run(num_processes, self.experiment(changes))
                record.write_text(json.dumps([str(run.experiment), str(run.folder), run.output]), encoding="utf-8")
            experiment, folder, output = json.loads(record.read_text(encoding="utf-8"))
        return Run(Path(experiment), Path(folder), output)
