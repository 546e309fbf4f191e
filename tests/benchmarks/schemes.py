"""Tests that each objective learns: trains the quickstart's model with each, and evaluates it on held-out images.

    python -m examples.quickstart.make_model --out runs/quickstart/model
    python -m examples.quickstart.make_dataset --out runs/quickstart/dataset
    python -m tests.benchmarks.schemes [--steps 300]

Prints the mean squared error of the velocity at the start and at the end, and the paired difference with its 95% interval.
Images, noise and t are the same for all. Exits with 1 if one did not learn significantly. LOG.md has results.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from utils.evaluation.results import EVALUATIONS, read_evaluations

CONFIG = "examples/quickstart.toml"
SCHEMES = {
    "weight none": ["weighting_scheme=none"],
    "weight sigma_sqrt, by sampling": ["weighting_scheme=sigma_sqrt"],
    "weight sigma_sqrt, by loss": ["weighting_scheme=sigma_sqrt", "weighting_by=loss"],
    "weight logit_normal, by sampling": ["weighting_scheme=logit_normal"],
    "weight logit_normal, by loss": ["weighting_scheme=logit_normal", "weighting_by=loss"],
    "weight mode, by sampling": ["weighting_scheme=mode"],
    "weight mode, by loss": ["weighting_scheme=mode", "weighting_by=loss"],
    "weight cosmap, by sampling": ["weighting_scheme=cosmap"],
    "weight cosmap, by loss": ["weighting_scheme=cosmap", "weighting_by=loss"],
    "density logit_normal": ["timestep_sampling=logit_normal", "weighting_scheme=none"],
    "density mode": ["timestep_sampling=mode", "weighting_scheme=none"],
    "density cosmap": ["timestep_sampling=cosmap", "weighting_scheme=none"],
    "sigma_scaled, weight none": ["weighting_scheme=none", "model_prediction_type=sigma_scaled"],
    "additive, weight none": ["weighting_scheme=none", "model_prediction_type=additive"],
    "huber, weight none": ["weighting_scheme=none", "loss_type=huber"],
    "smooth_l1, weight none": ["weighting_scheme=none", "loss_type=smooth_l1"],
}


def train(name: str, keys: list[str], num_steps: int, folder: Path) -> Path:
    """Trains one run over two stages; returns its folder."""
    settings = ["objective.timestep_sampling=sigma", *(f"objective.{key}" for key in keys)]
    settings += [f"output_dir={folder}", f"max_steps={num_steps}", "save.checkpoint_every_n_steps=100000"]
    settings += [
        "pipeline.gradient_accumulation_steps=2",
        "sampling.prompts=[]",
        "eval.holdout_images=32",
        "eval.batch_size=16",
        "monitoring.tensorboard=false",
    ]
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "train.py", "--config", CONFIG]
    for setting in settings:
        command += ["--set", setting]
    finished = subprocess.run(command, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True)
    if finished.returncode:
        sys.exit(f"{name} failed:\n{finished.stdout}\n{finished.stderr}")
    return max(path.parent for path in folder.glob("*/config.toml"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--only", nargs="*", choices=list(SCHEMES), default=list(SCHEMES))
    options = parser.parse_args()
    failed = []
    print(f"{'scheme':<34} {'start':>8} {'end':>8}  difference, 95% interval    seconds", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        for name in options.only:
            began = time.monotonic()
            run = train(name, SCHEMES[name], options.steps, Path(folder) / name.replace(" ", "_"))
            first, *_, last = read_evaluations(run / EVALUATIONS)
            difference = last.groups[0].to_start
            assert difference is not None and difference.interval is not None
            low, high = difference.interval.low, difference.interval.high
            seconds = time.monotonic() - began
            print(
                f"{name:<34} {first.loss:>8.4f} {last.loss:>8.4f}  {difference.mean:+.4f} [{low:+.4f}, {high:+.4f}]"
                f" {seconds:>7.0f}",
                flush=True,
            )
            if high >= 0:
                failed.append(name)
    if failed:
        sys.exit(f"did not learn: {', '.join(failed)}")


if __name__ == "__main__":
    main()
