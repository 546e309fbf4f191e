"""The same small run on the accelerator. Kernels are all that differs from the tests on the CPU."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from tests.distributed.launch import newest_run, read_metrics, read_weights, run_alone, run_torchrun
from tests.tiny_model import write_experiment
from utils.evaluation.results import EVALUATIONS, read_evaluations

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.accelerator.is_available(), reason="needs an accelerator"),
]

NUM_STEPS = 6
LOSS_TOLERANCE = 1e-3
SETTINGS: dict[str, Any] = {
    "max_steps": NUM_STEPS,
    "objective": {"weighting_scheme": "mode", "loss_type": "huber"},
    "eval": {"holdout_images": 5, "every_n_steps": 3, "weights": "ema", "keep_best": True},
    "ema": {"decay": 0.5},
    "sampling": {
        "prompts": ["a red circle", "a tree --l 2"],
        "sampler": "dpmpp_2m",
        "steps": 4,
        "width": 48,
        "height": 32,
        "skip_layer_guidance": {"layers": [1], "end": 0.8},
    },
}


class Bench:
    """Experiments that share one cache, filled on the CPU, so that training alone is compared."""

    def __init__(self, folder: Path, model: Path, dataset: Path) -> None:
        self._folder, self._model, self._dataset = folder, model, dataset

    def train(self, name: str, *, num_processes: int = 1, on_cpu: bool = False, **changes: Any) -> Path:
        """The run folder of a run that ended well."""
        settings = {**SETTINGS, "cache_dir": str(self._folder / "cache"), **changes}
        experiment = write_experiment(self._folder / name, self._model, self._dataset, **settings)
        arguments = ("--config", str(experiment))
        if num_processes == 1:
            finished = run_alone(*arguments, on_cpu=on_cpu, limit_seconds=300)
        else:
            finished = run_torchrun(num_processes, *arguments, on_cpu=on_cpu, limit_seconds=300)
        assert finished.exit_code == 0, finished.output
        return newest_run(experiment.parent / "output")


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path, tiny_dataset: Path) -> Bench:
    return Bench(tmp_path_factory.mktemp("gpu"), tiny_model, tiny_dataset)


@pytest.fixture(scope="module")
def on_cpu(bench: Bench) -> Path:
    return bench.train("cpu", on_cpu=True)


@pytest.fixture(scope="module")
def on_accelerator(bench: Bench, on_cpu: Path) -> Path:
    return bench.train("accelerator")


def losses(run: Path) -> list[float]:
    return [line["loss"] for line in read_metrics(run)]


def test_losses_agree_with_those_of_the_cpu(on_cpu: Path, on_accelerator: Path) -> None:
    assert len(losses(on_accelerator)) == NUM_STEPS
    assert losses(on_accelerator) == pytest.approx(losses(on_cpu), rel=LOSS_TOLERANCE)


def test_export_agrees_with_that_of_the_cpu(on_cpu: Path, on_accelerator: Path) -> None:
    one, other = read_weights(on_cpu, NUM_STEPS), read_weights(on_accelerator, NUM_STEPS)
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        assert float((tensor - other[name]).norm() / tensor.norm()) < LOSS_TOLERANCE, name


def test_evaluations_agree_with_those_of_the_cpu(on_cpu: Path, on_accelerator: Path) -> None:
    expected, measured = (read_evaluations(run / EVALUATIONS) for run in (on_cpu, on_accelerator))
    assert [result.step for result in measured] == [0, 3, 6]
    for one, other in zip(expected, measured, strict=True):
        assert other.losses == pytest.approx(one.losses, rel=10 * LOSS_TOLERANCE)


def test_previews_are_drawn(on_accelerator: Path) -> None:
    drawn = sorted((on_accelerator / "samples").glob("*/*.png"))
    assert [str(path.relative_to(on_accelerator / "samples")) for path in drawn] == [
        f"step_{step:06d}/{index:03d}.png" for step in (0, NUM_STEPS) for index in range(2)
    ]
    for path in drawn:
        image = np.asarray(Image.open(path))
        assert image.shape == (32, 48, 3)
        assert image.std() > 0


@pytest.mark.parametrize("adapter", [None, {"type": "lora", "rank": 4}], ids=["full", "lora"])
def test_bfloat16_run_trains(bench: Bench, on_cpu: Path, adapter: dict[str, Any] | None) -> None:
    changes: dict[str, Any] = {"model.dtype": "bfloat16", "optimizer.learning_rate": 1e-3}
    if adapter is not None:
        changes["adapter"] = adapter
    run = bench.train(f"bfloat16_{'full' if adapter is None else 'lora'}", **changes)
    values = losses(run)
    assert len(values) == NUM_STEPS
    assert all(math.isfinite(value) for value in values)
    assert values[0] == pytest.approx(losses(on_cpu)[0], rel=0.02), "the first step has the same weights"


def test_resumed_run_equals_uninterrupted_run(bench: Bench, on_accelerator: Path) -> None:
    first = bench.train("resumed", max_steps=NUM_STEPS // 2)
    experiment = first.parents[1] / "experiment.toml"
    finished = run_alone("--config", str(experiment), "--resume", "--set", f"max_steps={NUM_STEPS}", on_cpu=False)
    assert finished.exit_code == 0, finished.output
    assert losses(first) == pytest.approx(losses(on_accelerator), rel=1e-5)


@pytest.mark.skipif(
    torch.accelerator.is_available() and torch.accelerator.device_count() < 2, reason="needs two accelerators"
)
def test_two_stages_agree_with_one(bench: Bench, on_accelerator: Path) -> None:
    run = bench.train("two_stages", num_processes=2)
    assert losses(run) == pytest.approx(losses(on_accelerator), rel=1e-5)


@pytest.mark.parametrize("name", ["AdamW8bit", "Prodigy", "Muon", "SOAP", "RAdamScheduleFree"])
def test_optimizers_agree_with_the_cpu(bench: Bench, name: str) -> None:
    """The first losses: later ones differ by what the optimizer makes of rounding errors."""
    changes = {"optimizer.type": name, "optimizer.args": {}, "max_steps": 3, "ema": None, "eval": None}
    expected, found = bench.train(f"{name}_cpu", on_cpu=True, **changes), bench.train(f"{name}_accelerator", **changes)
    assert losses(found) == pytest.approx(losses(expected), rel=10 * LOSS_TOLERANCE)


@pytest.mark.parametrize("mode", ["norms", "matmuls", "all", "auto"])
def test_recomputed_activations_do_not_change_losses(bench: Bench, on_accelerator: Path, mode: str) -> None:
    run = bench.train(f"recomputed_{mode}", **{"pipeline.recompute": mode})
    assert losses(run) == pytest.approx(losses(on_accelerator), rel=1e-6)


@pytest.mark.parametrize("master", ["split", "stochastic"])
def test_bfloat16_weights_train_as_with_float32_weights_beside_them(bench: Bench, master: str) -> None:
    changes: dict[str, Any] = {"model.dtype": "bfloat16", "optimizer.learning_rate": 1e-3, "ema": None, "eval": None}
    kept = bench.train(f"kept_{master}", **changes, **{"optimizer.master": "float32"})
    run = bench.train(master, **changes, **{"optimizer.master": master})
    assert losses(run)[0] == losses(kept)[0]
    assert losses(run) == pytest.approx(losses(kept), rel=0.02)


def test_update_in_the_backward_pass_equals_that_after_it(bench: Bench) -> None:
    changes: dict[str, Any] = {
        "model.dtype": "bfloat16",
        "optimizer.gradient_clipping": 0,
        "pipeline.gradient_accumulation_steps": 1,
        "ema": None,
        "eval": None,
    }
    after = bench.train("after", **changes)
    run = bench.train("in_backward", **changes, **{"optimizer.step_in_backward": True})
    assert losses(run) == pytest.approx(losses(after), rel=1e-5)
