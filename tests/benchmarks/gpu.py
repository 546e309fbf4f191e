"""The benchmarks at the true size of SD3.5-medium on an accelerator:  python -m tests.benchmarks.gpu [names]

Each is a process of its own with a time limit; one that fails does not end the others.
"""

from __future__ import annotations

import subprocess
import sys
import time

import torch

MEDIUM = ["--network", "SD3.5-medium"]
HALF = ["--network", "SD3.5-medium, 12 blocks"]
"""Two of these in full fine-tuning fit into 80 GB."""
LORA = ["--cases", "LoRA bf16"]
ONE = ["--layouts", "1 process"]
COMMANDS: dict[str, list[str]] = {
    "overhead, LoRA, 512 pixels": ["overhead", *MEDIUM, "--pixels", "512", *LORA, "--micro-batches", "1", "4"],
    "overhead, LoRA, 1024 pixels": ["overhead", *MEDIUM, "--pixels", "1024", *LORA, "--micro-batches", "1", "4"],
    "overhead, full, 1024 pixels": [
        *("overhead", *HALF, "--pixels", "1024", "--micro-batches", "1", "4"),
        *("--cases", "full bf16", "full bf16, float32 weights kept"),
    ],
    "recompute, LoRA, 4 images": ["recompute", *MEDIUM, "--pixels", "1024", "--batch", "4", "--kinds", "LoRA bf16"],
    "recompute, full, 1 image": ["recompute", *MEDIUM, "--pixels", "1024", "--kinds", "full bf16"],
    "network and diffusers, 1024 pixels": ["diffusers_network", *MEDIUM, "--pixels", "1024"],
    "network and diffusers, 4 images": ["diffusers_network", *MEDIUM, "--pixels", "1024", "--batch", "4"],
    "memory": ["memory", *MEDIUM, "--pixels", "1024", *ONE],
}
LIMIT_SECONDS = 120


def main() -> None:
    if not torch.accelerator.is_available():
        sys.exit("no accelerator")
    names = sys.argv[1:] or list(COMMANDS)
    for name in names:
        module, *arguments = COMMANDS[name]
        print(f"\n--- {name}: python -m tests.benchmarks.{module} {' '.join(arguments)}", flush=True)
        began = time.monotonic()
        try:
            command = [sys.executable, "-m", f"tests.benchmarks.{module}", *arguments]
            subprocess.run(command, timeout=LIMIT_SECONDS, check=True)
        except (subprocess.TimeoutExpired, subprocess.CalledProcessError) as error:
            print(f"failed: {error}", flush=True)
        print(f"({time.monotonic() - began:.0f} s)", flush=True)


if __name__ == "__main__":
    main()
