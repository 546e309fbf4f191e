"""Writes old_run/: run folders and the cache as commit 36bf8e5 left them, for tests that resume from them.

    git checkout 36bf8e5 && python -m tests.golden.make_old_run

It is run at that commit, to which tests/golden is copied, and at no later one: the folder shows what users of that version
have on their disks. It has two runs of four steps, of a LoRA and of a whole small network, each as a kill after step 3
leaves it; what steps 3 and 4 gave when nothing stopped the run is in expected_<kind>.txt. Models are not kept, because
`write_models` makes them again. Images are kept, because entries of the cache are named after the bytes of the files.
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import toml
from PIL import Image
from safetensors.torch import save_file

from tests.distributed.launch import newest_run, start_ranks
from tests.golden.make_runs import header, result_lines
from tests.tiny_model import (
    CONTEXT_DIM,
    POOLED_DIM,
    POS_EMBED_MAX_SIZE,
    make_tiny_dataset,
    make_tiny_model,
    native_shapes,
    random_weights,
    write_experiment,
)

COMMAND = "python -m tests.golden.make_old_run"
FOLDER = Path(__file__).with_name("old_run")
MADE_IN = "/mnt/data/mmdit_old_run"
"""The folder that stands in the files in place of the one they are copied to. It must not exist before."""
NUM_IMAGES = 6
"""The last is not trained on."""
CHECKPOINT_STEP, LOGGED_STEP, LAST_STEP = 2, 3, 4
SMALL_NETWORK = "small_mmdit.safetensors"
CONFIGS = ("vae", "text_encoder", "text_encoder_2", "text_encoder_3")
"""Folders whose config.json is kept: libraries write their version into it, and entries of the cache are named after it."""

COMMON: dict[str, Any] = {
    "max_steps": LAST_STEP,
    "pipeline": {"micro_batch_size_per_gpu": 1, "gradient_accumulation_steps": 2},
    "objective": {"caption_dropout_rate": 0.2, "encoder_dropout_rate": 0.2},
    "optimizer": {"lr_scheduler": "cosine", "lr_warmup_steps": 1, "lr_min_ratio": 0.2, "gradient_clipping": 0.5},
    "save": {"checkpoint_every_n_steps": CHECKPOINT_STEP, "formats": ["native"]},
    "eval": {"holdout_images": 1, "every_n_steps": 2, "num_t_bands": 2, "batch_size": 2},
}
KINDS: dict[str, dict[str, Any]] = {
    "lora": {
        "adapter": {"type": "lora", "rank": 1, "blocks": "0,2"},
        "ema": {"decay": 0.5},
        "eval.weights": "ema",
        "optimizer.learning_rate": 1e-2,
    },
    # Without momentum: a checkpoint has the weights and nothing else, or it would be too large to be kept.
    "full": {"optimizer.type": "SGD", "optimizer.learning_rate": 1e-2},
}


def write_models(folder: Path, tiny_model: Path) -> None:
    """Link the tiny model's files into the folder, and write the small network that the run `full` trains."""
    shutil.copytree(tiny_model, folder, copy_function=os.link)
    shapes = native_shapes(
        depth=1,
        width=64,
        context_dim=CONTEXT_DIM,
        pooled_dim=POOLED_DIM,
        pos_embed_max_size=POS_EMBED_MAX_SIZE,
        qk_norm=True,
    )
    save_file(random_weights(shapes), folder / SMALL_NETWORK)


def _write_images(folder: Path) -> None:
    """images/ with masks/, and other/, which is an evaluation set."""
    for path in sorted(make_tiny_dataset(folder / "made", NUM_IMAGES).glob("*.png")):
        index = int(path.stem.rpartition("_")[2])
        target = folder / ("images" if index < NUM_IMAGES - 1 else "other") / f"image_{index}.png"
        target.parent.mkdir(exist_ok=True)
        path.with_suffix(".txt").rename(target.with_suffix(".txt"))
        path.rename(target)
    shutil.rmtree(folder / "made")
    (folder / "masks").mkdir()
    for index, path in enumerate(sorted((folder / "images").glob("*.png"))):
        mask = Image.new("L", Image.open(path).size, 255)
        mask.paste(60 + 20 * index, (0, 0, 16, 16))
        mask.save(folder / "masks" / path.name)
    other = {"resolutions": [32], "directory": [{"path": str(folder / "other")}]}
    (folder / "other.toml").write_text(toml.dumps(other), encoding="utf-8")


def _write_experiment(folder: Path, kind: str) -> Path:
    network = {"model.mmdit": str(folder / "model" / SMALL_NETWORK)} if kind == "full" else {}
    directory = {"path": str(folder / "images"), "mask_path": str(folder / "masks"), "horizontal_flip": True}
    changes = {
        "cache_dir": str(folder / "cache"),
        "dataset_file": {"directory": [directory]},
        **COMMON,
        "eval.sets": [{"name": "other", "dataset": str(folder / "other.toml")}],
        **KINDS[kind],
        **network,
    }
    return write_experiment(folder / kind, folder / "model", folder / "images", **changes)


def _cut(run: Path) -> None:
    """Leave what a kill after step LOGGED_STEP leaves; pages for the user are not kept."""
    shutil.rmtree(run / "weights")
    shutil.rmtree(run / "checkpoints" / f"step_{LAST_STEP:06d}")
    for path in [*run.glob("*.html"), *run.parent.glob("*.html")]:
        path.unlink()
    for name in ("metrics.jsonl", "evaluations.jsonl"):
        lines = (run / name).read_text(encoding="utf-8").splitlines(keepends=True)
        kept = [line for line in lines if json.loads(line)["step"] <= LOGGED_STEP]
        (run / name).write_text("".join(kept), encoding="utf-8")


def _make_run(folder: Path, kind: str) -> None:
    """Train without a stop, write what the last steps gave, and cut the run."""
    experiment = _write_experiment(folder, kind)
    finished = start_ranks(1, ["--config", str(experiment)], folder / "log.txt").wait()
    assert finished.exit_code == 0, finished.output
    run = newest_run(folder / kind / "output")
    lines = [f"# {key}: {value}" for key, value in {**header(), "command": COMMAND}.items()]
    lines += result_lines(run, first_step=CHECKPOINT_STEP + 1, exports=(LAST_STEP,))
    (folder / f"expected_{kind}.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    _cut(run)


def main() -> None:
    folder = Path(MADE_IN)
    folder.mkdir(parents=True)
    write_models(folder / "model", make_tiny_model(folder / "tiny_model"))
    _write_images(folder)
    for kind in KINDS:
        _make_run(folder, kind)
    for name in CONFIGS:
        target = folder / "model_configs" / name / "config.json"
        target.parent.mkdir(parents=True)
        shutil.copy(folder / "model" / name / "config.json", target)
    shutil.rmtree(folder / "model")
    shutil.rmtree(folder / "tiny_model")
    (folder / "log.txt").unlink()
    shutil.rmtree(FOLDER, ignore_errors=True)
    shutil.move(folder, FOLDER)


if __name__ == "__main__":
    main()
