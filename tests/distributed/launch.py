"""Starts train.py as users do, and reads the files of a run.

`run_alone`, `run_torchrun` and `run_deepspeed` are the real commands. Each costs seconds of imports in every process, so
most tests use `start_ranks` instead: processes forked from one that has done the imports, with the environment that
torchrun gives. Each rank is a process of its own, runs `train.main()` with its own arguments, and ends by os._exit;
test_layouts.py checks that all four ways give the same numbers.
"""

from __future__ import annotations

import importlib
import json
import multiprocessing
import os
import random
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import Tensor

ROOT = Path(__file__).parents[2]
LIMIT_SECONDS = 120.0
POLL_SECONDS = 0.01
AFTER_FAILURE_SECONDS = 2.0
_LAUNCHER_VARIABLES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "LOCAL_SIZE", "MASTER_ADDR", "MASTER_PORT")
_SETTINGS = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}


def child_environment(on_cpu: bool = True) -> dict[str, str]:
    """This process's environment without a launcher's variables, with one thread, on the CPU unless `on_cpu` is false."""
    dropped = (*_LAUNCHER_VARIABLES, "DS_ACCELERATOR")
    kept = {name: value for name, value in os.environ.items() if name not in dropped}
    return {**kept, **_SETTINGS, **({"DS_ACCELERATOR": "cpu"} if on_cpu else {})}


def free_port() -> int:
    """An unused port below the range of ephemeral ports."""
    while True:
        port = random.SystemRandom().randrange(20_000, 32_000)
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) != 0:
                return port


@dataclass(frozen=True)
class Finished:
    """A finished run."""

    exit_code: int
    output: str
    """Standard output and error of all processes."""
    seconds: float


# --- the real commands -------------------------------------------------------------------------------------------------


def run_alone(*arguments: str, limit_seconds: float = LIMIT_SECONDS, on_cpu: bool = True) -> Finished:
    """python train.py ARGUMENTS"""
    return _run([sys.executable, "train.py", *arguments], limit_seconds, on_cpu)


def run_torchrun(num_processes: int, *arguments: str, limit_seconds: float = LIMIT_SECONDS, on_cpu: bool = True) -> Finished:
    """torchrun --nproc-per-node N train.py ARGUMENTS"""
    launcher = [sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={num_processes}"]
    return _run([*launcher, f"--master-port={free_port()}", "train.py", *arguments], limit_seconds, on_cpu)


def run_deepspeed(num_processes: int, *arguments: str, limit_seconds: float = LIMIT_SECONDS) -> Finished:
    """deepspeed --num_gpus N train.py ARGUMENTS"""
    launcher = [str(Path(sys.executable).with_name("deepspeed")), f"--num_gpus={num_processes}"]
    return _run([*launcher, f"--master_port={free_port()}", "train.py", *arguments], limit_seconds, on_cpu=True)


def _run(command: Sequence[str], limit_seconds: float, on_cpu: bool) -> Finished:
    began = time.monotonic()
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        env=child_environment(on_cpu),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        start_new_session=True,
    )
    try:
        output, _ = process.communicate(timeout=limit_seconds)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        output, _ = process.communicate()
        raise AssertionError(f"{' '.join(command)} did not end within {limit_seconds:.0f} s:\n{output}") from None
    return Finished(process.returncode, output, time.monotonic() - began)


# --- forked ranks ------------------------------------------------------------------------------------------------------


class Ranks:
    """The processes of one run."""

    def __init__(self, processes: Sequence[BaseProcess], log: Path) -> None:
        self._processes = list(processes)
        self._log = log
        self._began = time.monotonic()

    def wait(self, limit_seconds: float = LIMIT_SECONDS) -> Finished:
        """Waits until all have ended; when one fails, ends the others as launchers do."""
        deadline = self._began + limit_seconds
        exit_code = 0
        while any(process.is_alive() for process in self._processes):
            codes = [process.exitcode for process in self._processes]
            exit_code = exit_code or next((code for code in codes if code), 0)
            if exit_code:
                deadline = min(deadline, time.monotonic() + AFTER_FAILURE_SECONDS)
            if time.monotonic() > deadline:
                self.kill()
                break
            time.sleep(POLL_SECONDS)
        else:
            exit_code = exit_code or next((process.exitcode for process in self._processes if process.exitcode), 0)
        output = self.output()
        assert exit_code or all(process.exitcode == 0 for process in self._processes), (
            f"the run did not end within {limit_seconds:.0f} s:\n{output}"
        )
        return Finished(exit_code, output, time.monotonic() - self._began)

    def kill(self) -> None:
        """Sends SIGKILL to every rank."""
        for process in self._processes:
            if process.is_alive():  # the id of a finished process may belong to another by now
                process.kill()
        for process in self._processes:
            process.join()

    def kill_when(self, condition: Callable[[], bool], limit_seconds: float = LIMIT_SECONDS) -> None:
        """Sends SIGKILL to every rank as soon as the condition holds, which must be while all are running."""
        while not condition():
            running = all(process.is_alive() for process in self._processes)
            assert running and time.monotonic() < self._began + limit_seconds, (
                f"the run ended, or took too long, before it could be killed:\n{self.output()}"
            )
            time.sleep(POLL_SECONDS)
        self.kill()
        assert all(process.exitcode == -signal.SIGKILL for process in self._processes), (
            f"a rank ended before it was killed:\n{self.output()}"
        )

    def output(self) -> str:
        return self._log.read_text(encoding="utf-8", errors="replace") if self._log.exists() else ""


def start_ranks(
    num_processes: int,
    arguments: Sequence[str],
    log: Path,
    module: str = "train",
    environment: Mapping[str, str] | None = None,
) -> Ranks:
    """Forks ranks of `train.py ARGUMENTS`, or of another module's `main()`, with their output in `log`."""
    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    size = {"WORLD_SIZE": str(num_processes), "LOCAL_WORLD_SIZE": str(num_processes)}
    processes: list[BaseProcess] = []
    with _environment(child_environment()):
        for rank in range(num_processes):
            variables = {"RANK": str(rank), "LOCAL_RANK": str(rank), **size, **address, **(environment or {})}
            process = _FORKS.Process(target=_run_rank, args=(module, list(arguments), variables, str(log)), daemon=True)
            process.start()
            processes.append(process)
    return Ranks(processes, log)


_FORKS = multiprocessing.get_context("forkserver")
_FORKS.set_forkserver_preload(["tests.distributed.preload"])


@contextmanager
def _environment(values: dict[str, str]) -> Iterator[None]:
    """Replaces os.environ temporarily; the fork server takes it over when the first rank is started."""
    before = dict(os.environ)
    os.environ.clear()
    os.environ.update(values)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


def _run_rank(module: str, arguments: list[str], variables: dict[str, str], log: str) -> None:
    multiprocessing.set_start_method("fork", force=True)  # else tqdm's lock outlives a killed rank
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    os.chdir(ROOT)
    os.environ.update(variables)
    sys.argv = [f"{module}.py", *arguments]
    importlib.import_module(module).main()


# --- files of a run ----------------------------------------------------------------------------------------------------


def newest_run(output_dir: Path) -> Path:
    """The newest run folder."""
    return sorted(path.parent for path in output_dir.glob("*/config.toml"))[-1]


def read_metrics(run: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl without values that depend on the clock."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key != "images_per_second"} for line in lines]


def read_weights(run: Path, step: int, file: str = "mmdit.safetensors") -> dict[str, Tensor]:
    """An exported file's tensors by name."""
    return load_file(run / "weights" / f"step_{step:06d}" / file)
