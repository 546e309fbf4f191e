"""Peak memory per rank while a network of SD3.5-large's width is loaded and exported, and the time of both.

    OMP_NUM_THREADS=1 python -m tests.benchmarks.stage_memory --stages 4 --depth 12

The file has SD3.5-large's width (2432) in bfloat16 and fewer blocks than its 38: the whole network takes 16 GB, and a rank's
memory depends on its own blocks only. The file is sparse: its weights are zeros, which take memory once they are read but no
disk space. By default nothing is trained, so that the optimizer is not measured; with --trained everything is, and the
result is what exporting adds. Resident memory is VmHWM of /proc (Linux), reset before each phase, shared libraries included.
"""

from __future__ import annotations

import argparse
import shutil
import time
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn

from models.family import ExportNames, PipelineLayer
from models.sd3 import weights
from models.sd3.family import SD3Family
from models.sd3.layers import INPUT_NAMES, layer_cost, layer_outputs, layer_prefix, num_layers
from models.sd3.network_shapes import layer_shapes
from models.streams import SampleShape
from models.tensor_files import open_file
from tests.benchmarks.measuring import megabytes, reset_peak
from tests.benchmarks.ranks import print_result, run_ranks
from tests.tiny_model import native_shapes
from utils.config.schema.optimizer import OptimizerConfig
from utils.distributed import group
from utils.distributed.world import world
from utils.export.weights import Exporter
from utils.files.safetensors_writer import Entry, create_file, plan_file
from utils.optim.schedules import LearningRateSchedule
from utils.pipeline.cost import training_flops
from utils.pipeline.engine import EngineSettings, Pipeline
from utils.pipeline.partition import StageCost, balanced_bounds
from utils.pipeline.stage import StagePlan
from utils.trainable.base import ParameterGroup
from utils.trainable.full import FullTraining

WIDTH, CONTEXT_DIM, POOLED_DIM, POSITIONS = 2432, 4096, 2048, 192
ALLOWED_RATIO, ALLOWED_MEGABYTES = 1.15, 600


def make_file(path: Path, depth: int) -> None:
    """Writes a sparse native file of SD3.5-large's width with this many blocks."""
    shapes = native_shapes(
        depth=depth,
        width=WIDTH,
        context_dim=CONTEXT_DIM,
        pooled_dim=POOLED_DIM,
        pos_embed_max_size=POSITIONS,
        qk_norm=True,
    )
    create_file(path, plan_file([Entry(name, torch.bfloat16, shape) for name, shape in shapes.items()], {}))


def make_layers(path: Path) -> list[PipelineLayer]:
    network = weights.NetworkFiles(open_file(path))
    return [
        PipelineLayer(
            name=f"layer {index}",
            prefix=layer_prefix(network.config, index),
            cost=partial(layer_cost, network.config, index),
            outputs=layer_outputs(network.config, index),
            shapes=layer_shapes(network.config, index),
            build=lambda index=index: network.load_layer(index, torch.bfloat16),  # type: ignore[misc]
        )
        for index in range(num_layers(network.config))
    ]


def bounds_of(layers: list[PipelineLayer], num_stages: int, is_trained: bool) -> list[int]:
    """The stages of a run on images of 1024 x 1024 pixels."""
    trained = [{layer.prefix + name: 1 for name in layer.shapes} if is_trained else {} for layer in layers]
    costs = training_flops(layers, trained, {SampleShape(1, 128, 128, num_text_tokens=333): 1.0})
    return balanced_bounds(len(layers), num_stages, StageCost(costs, [False] * len(layers), 0))


def freeze(module: nn.Module) -> None:
    module.requires_grad_(False)


def measure(path: Path, num_stages: int, trained: bool) -> dict[str, Any]:
    """On one rank: loads its stage, then exports the network with all ranks in both layouts."""
    group.start()
    layers = make_layers(path)
    begin = megabytes("VmHWM")
    reset_peak(torch.device("cpu"))
    started = time.monotonic()
    pipeline = Pipeline(
        StagePlan(layers, INPUT_NAMES, WIDTH, bounds_of(layers, num_stages, trained)),
        EngineSettings(micro_batch_size=1, num_micro_batches=num_stages, gradient_clipping=1.0, dtype=torch.bfloat16),
        loss=lambda output, _target, _shape: output.mean(),
        prepare=lambda _layer, module: None if trained else freeze(module),
        groups=lambda named: [ParameterGroup("all", named, LearningRateSchedule(1e-3, "constant", 0, 1.0), None)],
        make_optimizer=torch.optim.AdamW,
    )
    load_seconds = time.monotonic() - started
    loaded = megabytes("VmHWM")
    own = sum(tensor.nbytes for layer in pipeline.local_layers() for tensor in layer.module.state_dict().values())
    held = megabytes("VmRSS")
    reset_peak(torch.device("cpu"))
    started = time.monotonic()
    family, config = _naming(path), SimpleNamespace(save=SimpleNamespace(dtype="bfloat16"))
    trainable = FullTraining(family, OptimizerConfig(learning_rate=1e-3))
    exporter = Exporter(pipeline, family, trainable, config)  # type: ignore[arg-type]
    for file in trainable.export_files(["native", "diffusers"]):
        exporter._write(file, path.parent / f"out_{file.name}", ema=False)
    return {
        "rank": world().rank,
        "own": own / 2**20,
        "before": begin,
        "load": loaded,
        "held": held,
        "save": megabytes("VmHWM"),
        "load_seconds": load_seconds,
        "save_seconds": time.monotonic() - started,
    }


def _naming(path: Path) -> Any:
    """The part of a model family that names exported files and tensors."""
    config = weights.NetworkFiles(open_file(path)).config
    bare = SimpleNamespace(config=config)
    return SimpleNamespace(
        export_metadata=dict,
        native_prefix="",
        export_names=ExportNames("mmdit.safetensors", "complete.safetensors", "transformer", "diffusion_pytorch_model"),
        diffusers_config=dict,
        diffusers_weights=lambda tensors: SD3Family.diffusers_weights(bare, tensors),  # type: ignore[arg-type]
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stages", type=int, required=True)
    parser.add_argument("--depth", type=int, default=12)
    parser.add_argument("--folder", type=Path, default=Path("runs/stage_memory"))
    parser.add_argument("--trained", action="store_true")
    parser.add_argument("--rank-of", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.rank_of is not None:
        print_result(measure(arguments.rank_of, arguments.stages, arguments.trained))
        group.finish(0)
    arguments.folder.mkdir(parents=True, exist_ok=True)
    for folder in arguments.folder.glob("out_*/"):  # of an earlier measurement
        shutil.rmtree(folder)
    path = arguments.folder / "network.safetensors"
    make_file(path, arguments.depth)
    print(f"{arguments.depth} blocks of width {WIDTH}, {path.stat().st_size / 1e9:.2f} GB, {arguments.stages} stages; MiB")
    print("rank     own  before    load allowed    held    save    adds   load s  save s")
    options = ["--rank-of", str(path), "--stages", str(arguments.stages), *(["--trained"] if arguments.trained else [])]
    for row in run_ranks("tests.benchmarks.stage_memory", options, arguments.stages, on_cpu=True):
        allowed = ALLOWED_RATIO * row["own"] + ALLOWED_MEGABYTES
        highest = row["save"] - row["held"] if arguments.trained else max(row["load"], row["save"])
        verdict = "" if highest <= (allowed - row["own"] if arguments.trained else allowed) else "  TOO MUCH"
        columns = [row["own"], row["before"], row["load"], allowed, row["held"], row["save"], row["save"] - row["held"]]
        numbers = " ".join(f"{number:7.0f}" for number in columns)
        print(f"{row['rank']:4d} {numbers} {row['load_seconds']:8.1f} {row['save_seconds']:7.1f}{verdict}")


if __name__ == "__main__":
    main()
