"""The quickstart: creates a model and a dataset, trains, and checks the previews. `make quickstart` runs it.

Makes a small model and a dataset, trains the model from scratch over two pipeline stages with train.py, then a LoRA on
top of it, and measures how many previews of both are right. Writes everything to runs/quickstart.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import torch

RUNS = Path("runs/quickstart")
FULL_CONFIG = "examples/quickstart.toml"
LORA_CONFIG = "examples/quickstart_lora.toml"


def num_processes() -> int:
    """Number of processes, and so of stages: two on a CPU or on several accelerators, one on a single accelerator."""
    return min(2, torch.accelerator.device_count()) if torch.accelerator.is_available() else 2


def run(title: str, command: list[str]) -> None:
    """Runs one command; exits with its code if it fails."""
    print(f"\n=== {title}\n    {' '.join(command)}\n", flush=True)
    began = time.monotonic()
    environment = dict(os.environ)
    if not torch.accelerator.is_available():
        environment["DS_ACCELERATOR"] = "cpu"  # without it, the launcher warns that it found no GPU
    code = subprocess.run([sys.executable, *command], env=environment).returncode
    if code:
        sys.exit(code)
    print(f"    {time.monotonic() - began:.0f} s", flush=True)


def train(title: str, config: str) -> Path:
    """Trains as a user would; returns the run folder."""
    launcher = ["-m", "deepspeed.launcher.runner", "--log_level", "warning", "--num_gpus", str(num_processes())]
    run(title, [*launcher, "train.py", "--config", config])
    output_dir = RUNS / ("full" if config == FULL_CONFIG else "lora")
    return max(path.parent for path in output_dir.glob("*/config.toml"))


def newest(pattern: str, folder: Path) -> Path:
    return max(folder.glob(pattern))


def main() -> None:
    began = time.monotonic()
    run("A small SD3.5 in the public file formats", ["-m", "examples.quickstart.make_model", "--out", str(RUNS / "model")])
    run("Images with captions", ["-m", "examples.quickstart.make_dataset", "--out", str(RUNS / "dataset")])
    full = train("Full training from scratch", FULL_CONFIG)
    shutil.copyfile(newest("weights/*/mmdit.safetensors", full), RUNS / "trained.safetensors")
    measure = ["-m", "examples.quickstart.measure"]
    thresholds = ["--min-colours", "0.95", "--min-shapes", "0.80"]
    run("Previews that match their prompts", [*measure, str(full), "--out", str(RUNS / "grid.png"), *thresholds])
    lora = train('A LoRA that learns the word "pink"', LORA_CONFIG)
    # One wrong preview of 15 is 7%.
    lora_thresholds = ["--min-colours", "0.90", "--min-shapes", "0.80"]
    run(
        "Pink previews that match their prompts",
        [*measure, str(lora), "--out", str(RUNS / "grid_lora.png"), *lora_thresholds],
    )
    print(summary(full, lora, time.monotonic() - began))


def summary(full: Path, lora: Path, seconds: float) -> str:
    return f"""
Done in {seconds / 60:.1f} minutes. Files:

  {RUNS / "grid.png"}        all previews with their prompts; the first 16 are combinations that no training caption has
  {RUNS / "grid_lora.png"}   the same for the LoRA
  {full / "report.html"}
                                    the run page: objective, curves, evaluations, previews beside those of step 0
  {RUNS / "full" / "dataset_report.html"}   the dataset report: crops, buckets, captions and which are truncated
  {newest("weights/*/mmdit.safetensors", full)}
                                    the trained network in one file with native keys
  {newest("weights/*/lora.safetensors", lora)}
                                    the LoRA for ComfyUI and sd-scripts; lora_diffusers.safetensors is for diffusers
  {full / "metrics.jsonl"}   and TensorBoard events: .venv/bin/tensorboard --logdir {RUNS}

Next steps:

  .venv/bin/python train.py --config {LORA_CONFIG} --check
      prints what a run would do, without starting it
  .venv/bin/deepspeed --num_gpus {num_processes()} train.py --config {LORA_CONFIG} --set max_steps=300
      trains twice as many steps; add --resume after an interruption
  examples/sd35_medium_lora.toml
      a commented configuration for the real model: set its path
"""


if __name__ == "__main__":
    main()
