"""What benchmarks measure memory with, and how they sum up their ratios."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch


def megabytes(what: str) -> float:
    """Resident memory of this process in MiB: VmRSS now, VmHWM the highest since `reset_peak` (Linux)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(what)) / 1024


def reset_peak(device: torch.device) -> None:
    """Begins a new measurement of the peak: of the process on a CPU, of PyTorch's allocator on an accelerator."""
    if device.type == "cpu":
        Path("/proc/self/clear_refs").write_text("5")
    else:
        torch.accelerator.reset_peak_memory_stats()


def peak(device: torch.device) -> float:
    """MiB since `reset_peak`."""
    return megabytes("VmHWM") if device.type == "cpu" else torch.accelerator.max_memory_allocated() / 2**20


def worst_ratio_line(ratios: Sequence[float], limit: float) -> str:
    """The last line of a benchmark whose ratios must be at most `limit`."""
    worst = max(ratios)
    return f"worst ratio {worst:.3f}" + (f" (goal: at most {limit})" if worst > limit else "")
