"""Writes runs/<kind>_<layout>.txt: every number that a short training run reports, and hashes of the files it leaves.

    python -m tests.golden.make_runs

Twelve runs on the tiny model: four kinds of training, each in three layouts. tests/distributed/test_golden_runs.py makes
them again and compares. Everything is read from outside: the command line, TOML keys, and the files of a run folder.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import toml
import torch
from PIL import Image
from safetensors.torch import load_file

from tests.distributed.lab import Lab
from tests.distributed.launch import newest_run, read_metrics
from tests.golden.records import platform
from tests.tiny_model import make_tiny_dataset, make_tiny_model

COMMAND = "python -m tests.golden.make_runs"
FOLDER = Path(__file__).with_name("runs")
NUM_STEPS = 20
SAVED_STEPS = (10, 20)
VOLATILE = "modelspec.date"
"""The one metadata entry of an exported file that differs from run to run: the time of the export."""

NUM_IMAGES = {"masked": 11, "tagged": 7, "other": 3}
COMMON: dict[str, Any] = {
    "max_steps": NUM_STEPS,
    "pipeline.bucket_group": 4,  # the whole global batch: the only order there was when the records were made
    "ema": {"decay": 0.8},
    "objective": {"caption_dropout_rate": 0.2, "encoder_dropout_rate": {"clip_l": 0.2, "t5xxl": 0.3}},
    "optimizer": {"lr_scheduler": "cosine", "lr_warmup_steps": 4, "lr_min_ratio": 0.1},
    "optimizer.args": {"betas": [0.9, 0.99], "weight_decay": 0.01},
    "save": {"checkpoint_every_n_steps": SAVED_STEPS[0], "export_every_n_steps": SAVED_STEPS[0], "keep_last": 2},
}
EVALUATION: dict[str, Any] = {"holdout_images": 3, "every_n_steps": 5, "num_t_bands": 2, "batch_size": 4}
KINDS: dict[str, dict[str, Any]] = {
    "full_fp32": {"save.formats": ["native", "diffusers"], "eval.weights": "ema"},
    "full_bf16": {
        "model.dtype": "bfloat16",
        "optimizer.master": "float32",
        "save.dtype": "bfloat16",
        "cache_posterior": True,
        "objective.timestep_sampling": "logit_normal",
        "objective.loss_type": "huber",
        "optimizer.lr_scheduler": "linear",
    },
    "lora_bf16": {
        "model.dtype": "bfloat16",
        "save.dtype": "float16",
        "cache_posterior": True,
        "adapter": {"type": "lora", "rank": 4, "alpha": 8.0},
        "optimizer.learning_rate": 1e-2,
        "optimizer.gradient_clipping": 0.7,
        "objective.weighting_scheme": "sigma_sqrt",
        "objective.weighting_by": "loss",
        "eval.weights": "ema",
    },
    "lokr_fp32": {
        "adapter": {"type": "lokr", "rank": 2},
        "adapter.targets": [{"pattern": "attn"}, {"pattern": "mlp", "rank": 4, "alpha": 2.0}],
        "optimizer.learning_rate": 1e-2,
        "optimizer.gradient_clipping": 0.1,
        "objective.model_prediction_type": "sigma_scaled",
        "objective.timestep_sampling": "mode",
    },
}


@dataclass(frozen=True)
class Layout:
    """How many processes train a run, and how the global batch of four images is laid out over them."""

    num_processes: int
    num_stages: int
    accumulation_steps: int

    @property
    def changes(self) -> dict[str, Any]:
        return {
            "pipeline.pipeline_stages": self.num_stages,
            "pipeline.gradient_accumulation_steps": self.accumulation_steps,
        }


LAYOUTS = {"1_process": Layout(1, 1, 4), "2_stages": Layout(2, 2, 4), "2_replicas": Layout(2, 1, 2)}
NAMES = [(kind, layout) for kind in KINDS for layout in LAYOUTS]


def golden_path(kind: str, layout: str) -> Path:
    return FOLDER / f"{kind}_{layout}.txt"


# --- the data ----------------------------------------------------------------------------------------------------------


def _make_images(folder: Path, counts: dict[str, int]) -> dict[str, list[Path]]:
    """Inner folder -> so many images with captions in it. Names are chosen here, because random draws depend on them."""
    made = make_tiny_dataset(folder / "made", sum(counts.values()))
    sources = iter(enumerate(sorted(made.glob("*.png"))))
    images: dict[str, list[Path]] = {}
    for name, count in counts.items():
        (folder / name).mkdir()
        images[name] = []
        for index, source in itertools.islice(sources, count):
            image = folder / name / f"golden_{index:03d}.png"
            source.with_suffix(".txt").rename(image.with_suffix(".txt"))
            images[name].append(source.rename(image))
    return images


def _write_mask(image: Path, folder: Path, index: int) -> None:
    """A mask with black, grey and white areas; another for each index."""
    width, height = Image.open(image).size
    mask = Image.new("L", (width, height), 255)
    mask.paste(90, (0, 0, width // 2, height))
    mask.paste(0, (0, 0, width, 4 + 2 * (index % 4)))
    mask.save(folder / image.name)


def dataset_changes(folder: Path) -> dict[str, Any]:
    """Make all images below the folder; the changes of an experiment that trains and evaluates on them."""
    images = _make_images(folder, NUM_IMAGES)
    (folder / "masks").mkdir()
    for index, image in enumerate(images["masked"]):
        _write_mask(image, folder / "masks", index)
    for index, image in enumerate(images["tagged"]):
        tags = f"image {index}, tag {index % 3}, large, red\na second caption, number {index}\n"
        image.with_suffix(".txt").write_text(tags, encoding="utf-8")
    buckets = {"resolutions": [32], "min_ar": 0.5, "max_ar": 2.0, "num_ar_buckets": 3}
    other = {**buckets, "directory": [{"path": str(folder / "other")}]}
    (folder / "other.toml").write_text(toml.dumps(other), encoding="utf-8")
    directories: list[dict[str, Any]] = [
        {"path": str(folder / "masked"), "mask_path": str(folder / "masks"), "horizontal_flip": True},
        {
            "path": str(folder / "tagged"),
            "num_repeats": 1.5,
            "loss_weight": 0.5,
            "crop": "random",
            "caption_per_line": True,
            "cache_shuffle_num": 3,
            "keep_tokens": 1,
        },
    ]
    sets = [{"name": "other", "dataset": str(folder / "other.toml")}]
    return {"dataset_file": {"directory": directories}, "eval": {**EVALUATION, "sets": sets}}


# --- what is recorded --------------------------------------------------------------------------------------------------


def header() -> dict[str, str]:
    """What a record begins with: the command that makes it, and what its last bits depend on."""
    return {"command": COMMAND, **platform(), "deepspeed": version("deepspeed")}


def record_of(run: Path) -> str:
    """The text of a run folder's record. Numbers are written so that they can be read back exactly."""
    lines = [f"# {key}: {value}" for key, value in header().items()]
    lines += result_lines(run, first_step=0, exports=SAVED_STEPS)
    for step in SAVED_STEPS:
        for path in sorted((run / "checkpoints" / f"step_{step:06d}").glob("layer_*.safetensors")):
            lines.append(f"checkpoint {path.relative_to(run / 'checkpoints')} tensors={_tensors_sha256(path)}")
    return "\n".join(lines) + "\n"


def result_lines(run: Path, *, first_step: int, exports: Sequence[int]) -> list[str]:
    """Lines for the metrics and evaluations from a step on, and for every file of the exports of some steps."""
    lines = [_step_line(metrics) for metrics in read_metrics(run) if metrics["step"] >= first_step]
    for text in (run / "evaluations.jsonl").read_text(encoding="utf-8").splitlines():
        evaluation = json.loads(text)
        lines += _evaluation_lines(evaluation) if evaluation["step"] >= first_step else []
    for step in exports:
        folder = run / "weights" / f"step_{step:06d}"
        files = sorted(path for path in folder.rglob("*") if path.is_file())
        lines += [f"export {path.relative_to(run / 'weights')} {_export_hashes(path)}" for path in files]
    return lines


def _step_line(metrics: dict[str, Any]) -> str:
    numbers = " ".join(f"{key}={float(metrics[key])!r}" for key in ("loss", "grad_norm", "learning_rate"))
    return f"step {metrics['step']} {numbers}"


def _evaluation_lines(evaluation: dict[str, Any]) -> list[str]:
    groups = evaluation["summary"]["groups"]
    place = f"evaluation {evaluation['step']} {evaluation['weights']}"
    return [f"{place} {group['name'].replace(' ', '_')} loss={float(group['loss'])!r}" for group in groups]


def _export_hashes(path: Path) -> str:
    """Hashes of a safetensors file: its metadata without the time, its table of tensors, and the bytes after both."""
    data = path.read_bytes()
    if path.suffix == ".json":
        table = json.loads(data)
        table.get("metadata", {}).pop(VOLATILE, None)
        return f"json={_json_sha256(table)}"
    size = int.from_bytes(data[:8], "little")
    table = json.loads(data[8 : 8 + size])
    metadata = table.pop("__metadata__")
    assert VOLATILE in metadata, f"{path} is reproducible: record the hash of the whole file"
    del metadata[VOLATILE]
    tensors = hashlib.sha256(data[8 + size :]).hexdigest()
    return f"metadata={_json_sha256(metadata)} table={_json_sha256(table)} tensors={tensors}"


def _json_sha256(value: object) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def _tensors_sha256(path: Path) -> str:
    """A hash over name, type, shape and bytes of every tensor, in order of names."""
    digest = hashlib.sha256()
    for name, tensor in sorted(load_file(path).items()):
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        digest.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


# --- the runs ----------------------------------------------------------------------------------------------------------


class Recorder:
    """Makes golden runs in a folder; they share its cache. A kind's three layouts run at the same time, and once."""

    def __init__(self, folder: Path, model: Path) -> None:
        self._lab = Lab(model, folder / "images" / "masked", folder / "lab")
        self._changes = {**COMMON, **dataset_changes(folder / "images")}
        self._records: dict[str, dict[str, str]] = {}
        self._fill_cache()

    def _experiment(self, kind: str, layout: str) -> Path:
        return self._lab.experiment({**self._changes, **KINDS[kind], **LAYOUTS[layout].changes})

    def _fill_cache(self) -> None:
        """Encode what all runs read: runs that begin together would each do it."""
        passes = [
            self._lab.start(1, self._experiment(kind, "1_process"), "--cache-only") for kind in ("lokr_fp32", "lora_bf16")
        ]
        for started in passes:
            finished = started.wait()
            assert finished.exit_code == 0, finished.output

    def records(self, kind: str) -> dict[str, str]:
        """Layout -> the text of its record."""
        if kind not in self._records:
            experiments = {layout: self._experiment(kind, layout) for layout in LAYOUTS}
            started = {
                layout: self._lab.start(LAYOUTS[layout].num_processes, experiment)
                for layout, experiment in experiments.items()
            }
            finished = {layout: ranks.wait() for layout, ranks in started.items()}
            for layout, outcome in finished.items():
                assert outcome.exit_code == 0, f"{kind}, {layout}:\n{outcome.output}"
            self._records[kind] = {
                layout: record_of(newest_run(experiment.parent / "output")) for layout, experiment in experiments.items()
            }
        return self._records[kind]


def main(target: Path) -> None:
    """Make all runs and write their records into the folder."""
    target.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as name:
        recorder = Recorder(Path(name), make_tiny_model(Path(name) / "model"))
        for kind in KINDS:
            for layout, record in recorder.records(kind).items():
                (target / golden_path(kind, layout).name).write_text(record, encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else FOLDER)
