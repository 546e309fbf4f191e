"""Starts a benchmark's module once for each rank, as a launcher would, and reads what the ranks print."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from typing import Any

import torch

from tests.distributed.launch import child_environment, free_port

MARK = "result: "
"""Beginning of the line with a rank's result."""


def run_ranks(module: str, arguments: Sequence[str], count: int, *, on_cpu: bool | None = None) -> list[dict[str, Any]]:
    """Runs `python -m module arguments` on `count` ranks; returns the result of each. Raises RuntimeError if one fails.

    `on_cpu`: None: if there is no accelerator.
    """
    on_cpu = not torch.accelerator.is_available() if on_cpu is None else on_cpu
    port = str(free_port())
    processes = []
    for rank in range(count):
        variables = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count}
        places = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        environment = {**child_environment(on_cpu), **places} | {
            key: str(value) for key, value in variables.items()
        }
        if "OMP_NUM_THREADS" in os.environ:
            environment["OMP_NUM_THREADS"] = os.environ["OMP_NUM_THREADS"]
        command = [sys.executable, "-m", module, *arguments]
        processes.append(subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True))
    outputs = [process.communicate()[0] for process in processes]
    if any(process.returncode for process in processes):
        raise RuntimeError("\n".join(outputs))
    lines = [line for output in outputs for line in output.splitlines() if line.startswith(MARK)]
    return [json.loads(line.removeprefix(MARK)) for line in lines]


def print_result(result: dict[str, Any]) -> None:
    """Prints what `run_ranks` returns for this rank."""
    print(MARK + json.dumps(result), flush=True)
