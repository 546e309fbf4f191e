"""Train Stable Diffusion 3 as one TOML file says:  deepspeed train.py --config sd35.toml

The story of a run: check everything, encode the dataset, cut the network over the processes, train, save, export.
"""

from __future__ import annotations

import argparse
import gc
import math
import sys
import time
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from models.family import PipelineLayer
from models.streams import SampleShape
from utils.checkpoint import save as checkpoint
from utils.config.load import TRAINING, ConfigError, ErrorDetail, dump_toml
from utils.data.batches import BatchOrder
from utils.data.cache.locks import CacheInUse
from utils.data.cache.shards import CannotWrite, DamagedShard
from utils.data.encoding.encoded import EncodedData
from utils.data.encoding.precompute import Cached, CacheError, RunData, cache_dataset
from utils.data.examples import ExampleTable
from utils.distributed import group as distributed
from utils.export import weights as export
from utils.files.atomic import write_text
from utils.objective.objective import LossTarget, Objective
from utils.optim.ema import ema_decay
from utils.optim.registry import make_optimizer
from utils.optim.schedules import schedule_of
from utils.pipeline.engine import EngineSettings, Pipeline, StepResult
from utils.pipeline.feed import EMPTY_CAPTION, Feed, Layout
from utils.pipeline.optimizer_state import MASTER
from utils.pipeline.stage import StagePlan
from utils.report.dataset_gather import MAX_SHOWN_IN_LOG, Gatherer, write_bad_files, write_page
from utils.run.banner import describe
from utils.run.events import Observer
from utils.run.prepare import BAD_FILE_ADVICE, CHECKPOINTS, Experiment, eval_set_names, num_readers, prepare, run_files
from utils.tracking.metrics import RunLog, StepMetrics, say
from utils.trainable import lora
from utils.trainable.base import ParameterGroup

EXIT_BAD_INPUT = 1
FOLLOWER_PATIENCE_SECONDS = 10.0


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="train.py", description=__doc__, allow_abbrev=False)
    parser.add_argument("--config", required=True, type=Path, help="the experiment file (TOML)")
    parser.add_argument("--check", action="store_true", help="check everything, say what training would do, and stop")
    parser.add_argument("--cache-only", action="store_true", help="encode the dataset, and stop")
    parser.add_argument("--report", action="store_true", help="encode the dataset, show it on a page, and stop")
    parser.add_argument(
        "--resume",
        nargs="?",
        const="",
        metavar="RUN",
        help="go on in the newest run of output_dir, or in the run folder RUN; without RUN, start one if there is none",
    )
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", dest="overrides", help="override one key (repeatable)"
    )
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)  # the deepspeed launcher passes it
    return parser.parse_args(arguments)


def main() -> None:
    arguments = parse_arguments()
    try:
        world, check, resume = distributed.world(), arguments.check, arguments.resume
        # What imports and looking make, stays: the collector would go through a million objects again and again.
        gc.disable()
        experiment = prepare(arguments.config, arguments.overrides, resume, world, only_look=check)
        gc.freeze()
        gc.enable()
        if check:
            output = f"nothing: only checked; a run would write to {experiment.config.experiment.output_dir}"
            tell(experiment, output)
            sys.exit(0)
        if arguments.cache_only or arguments.report:
            encode(experiment, wants_report=arguments.report)
        else:
            run(experiment)
    except ConfigError as error:
        refuse(error)
    except Exception:
        print(f"rank {distributed.world().rank} failed:\n{traceback.format_exc()}", file=sys.stderr)
        distributed.finish(1)
    distributed.finish(0)


def refuse(error: ConfigError) -> None:
    """Print every error and leave with 1. Other ranks let rank 0 speak first: launchers end all at the first exit."""
    if not distributed.world().is_main:
        time.sleep(FOLLOWER_PATIENCE_SECONDS)
    count = len(error.errors)
    print(f"\nThis run cannot start; {count} error{'s' if count > 1 else ''}:\n{error}\n", file=sys.stderr)
    distributed.finish(EXIT_BAD_INPUT)


def tell(experiment: Experiment, output: str) -> None:
    """The banner, from rank 0, which alone has looked at the dataset. `output`: where results go, in words."""
    if distributed.world().is_main:
        say(f"\n{describe(experiment, order_of(experiment), output)}\n")


def encode(experiment: Experiment, *, wants_report: bool) -> None:
    """All ranks: fill the cache and stop."""
    device = distributed.start()
    experiment = agree(experiment)
    tell(experiment, f"nothing but the cache, and a page on the dataset in {experiment.config.experiment.output_dir}")
    encode_dataset(experiment, device, wants_report=wants_report)


def run(experiment: Experiment) -> None:
    """All ranks, from the process group's start to the last file."""
    is_main = distributed.world().is_main
    device = distributed.start()
    experiment = agree(experiment)
    folder = open_run_folder(experiment)
    tell(experiment, str(folder))
    data, experiment = encode_dataset(experiment, device)
    pipeline = build_pipeline(experiment)
    if experiment.resume_from is not None:
        checkpoint.load(pipeline, experiment.resume_from)
    train(experiment, folder, pipeline, data)
    say(f"done: {folder}", is_main=is_main)


def agree(experiment: Experiment) -> Experiment:
    """Rank 0's view of what lies in folders: another rank may have looked a moment earlier, or through a slower mount."""
    seen = (experiment.prompts, experiment.resume_run, experiment.resume_from)
    prompts, resume_run, resume_from = distributed.broadcast(seen)
    return replace(experiment, prompts=prompts, resume_run=resume_run, resume_from=resume_from)


def order_of(experiment: Experiment) -> BatchOrder:
    return BatchOrder(experiment.dataset.examples, experiment.global_batch, experiment.config.experiment.seed)


def open_run_folder(experiment: Experiment) -> Path:
    """The folder of this run, on every rank: the one to go on in, or a new one named after the time."""
    config = experiment.config.experiment
    folder = experiment.resume_run
    if distributed.world().is_main:
        if folder is None:
            folder = config.output_dir / time.strftime("%Y-%m-%d_%H-%M-%S")
            while folder.exists():
                folder = folder.with_name(folder.name + "_")
        folder.mkdir(parents=True, exist_ok=True)
        for name, table in reversed(run_files(experiment.config).items()):  # config.toml last: it makes this a run folder
            write_text(folder / name, dump_toml(table))
    shared = distributed.broadcast(folder)
    assert shared is not None
    return shared


def encode_dataset(
    experiment: Experiment, device: torch.device, *, wants_report: bool = False
) -> tuple[EncodedData, Experiment]:
    """Fill the cache; returns it and the experiment with the examples that could be encoded, on every rank.

    A page on the dataset is written if it is wanted, and if anything was encoded. Raises ConfigError on every rank for files
    that could not be encoded, unless they are to be skipped, and when the disk has no room.
    """
    config, world = experiment.config.experiment, distributed.world()
    texts = {EMPTY_CAPTION, *(text for prompt in experiment.prompts for text in (prompt.text, prompt.negative))}
    tables = [experiment.dataset.examples, *experiment.eval_sets.values()]
    run_data = RunData(tables, sorted(texts), experiment.memories)
    try:
        cached = cache_dataset(experiment.family, run_data, experiment.cache_settings, device, num_readers(world))
    except (CacheError, CacheInUse, DamagedShard, CannotWrite, PermissionError) as error:
        raise ConfigError([ErrorDetail(experiment.config.path, "cache_dir", str(error))]) from error
    if world.is_main:
        write_bad_files(config.output_dir, experiment.dataset, cached.unusable.bad_files)
    encoded = leave_out(experiment, cached)
    if world.is_main and (wants_report or cached.encoded_any):
        report_dataset(encoded, cached, device)
    distributed.wait_for_all("dataset encoded")
    return cached.data, encoded


def report_dataset(experiment: Experiment, cached: Cached, device: torch.device) -> None:
    """Rank 0: write the page on the training set, and say what of its captions is not read."""
    order, output_dir = order_of(experiment), experiment.config.experiment.output_dir
    tile_pixels = experiment.config.experiment.sampling.decode_tile_pixels
    gatherer = Gatherer(experiment.family, cached.data, experiment.dataset.examples, order, tile_pixels)
    bad_files = [*experiment.dataset.bad_files, *cached.unusable.bad_files]
    title = f"Dataset {experiment.config.dataset_path}"
    facts = gatherer.facts(title, experiment.dataset, bad_files, experiment.num_steps(order), device)
    path = write_page(output_dir, facts)
    for encoder in facts.encoders:
        if encoder.num_cut:
            say(f"{encoder.num_cut} captions are longer than {encoder.name} reads ({encoder.max_tokens} tokens)")
    say(f"the dataset as it will be trained: {path}")


def leave_out(experiment: Experiment, cached: Cached) -> Experiment:
    """The experiment without the examples that could not be encoded; raises ConfigError where they are not to be skipped."""
    names = [TRAINING, *eval_set_names(experiment.config)]
    usable: dict[str, ExampleTable] = {}
    errors = [ErrorDetail(bad.path, "", bad.reason) for bad in cached.unusable.bad_files]
    fatal = []
    for name, table, unusable in zip(names, cached.tables, cached.unusable.examples, strict=True):
        path, _ = experiment.config.dataset_of(name)
        usable[name] = table.where(~unusable)
        if not all(table.directory_of(row).skip_bad for row in np.flatnonzero(unusable).tolist()):
            fatal.append(ErrorDetail(path, "on_bad_file", BAD_FILE_ADVICE))
        elif not len(usable[name]):
            fatal.append(ErrorDetail(path, "directory", "no image could be encoded"))
    if fatal:
        raise ConfigError(errors + fatal)
    for error in errors[:MAX_SHOWN_IN_LOG]:  # all are in the list of bad files, which has been told of
        say(f"left out: {error}", is_main=distributed.world().is_main)
    dataset = replace(experiment.dataset, examples=usable.pop(TRAINING))
    return replace(experiment, dataset=dataset, eval_sets=usable)


def build_pipeline(experiment: Experiment) -> Pipeline:
    """The network over the processes, each with its own layers only, and what is trained of it."""
    config, plan, start = experiment.config.experiment, experiment.adapter_plan, experiment.adapter_start
    objective = Objective(config.objective)

    def prepare_layer(layer: PipelineLayer, module: nn.Module) -> None:
        if plan is not None:
            lora.inject(module, layer.prefix, plan, seed=config.seed)
        if start is not None:
            lora.load_start(module, layer.prefix, start)

    def loss(output: Tensor, target: tuple[Tensor, ...], shape: SampleShape) -> Tensor:
        return objective.loss(experiment.family.velocity(output, shape), LossTarget(*target))

    def groups(named: Mapping[str, nn.Parameter]) -> list[ParameterGroup]:
        return [ParameterGroup("all", named, schedule_of(config.optimizer), None)]

    settings = EngineSettings(
        micro_batch_size=config.pipeline.micro_batch_size_per_gpu,
        num_micro_batches=config.pipeline.gradient_accumulation_steps,
        gradient_clipping=config.optimizer.gradient_clipping,
        dtype=config.model.torch_dtype,
    )
    pipeline = Pipeline(
        StagePlan(experiment.family.layers, experiment.family.input_names, experiment.bounds),
        settings,
        loss=loss,
        prepare=prepare_layer,
        groups=groups,
        make_optimizer=partial(make_optimizer, config.optimizer),
    )
    if start is not None:
        # The optimizer's float32 weights began as the layers' rounded ones.
        exact: dict[nn.Parameter, dict[str, Tensor]] = {}
        for layer in pipeline.local_layers():
            for name, value in lora.start_values(layer.module, layer.layer.prefix, start).items():
                exact[layer.trainable()[name]] = {MASTER: value}
        pipeline.write_states(exact)
    return pipeline


def make_feed(experiment: Experiment, pipeline: Pipeline, data: EncodedData, order: BatchOrder) -> Feed:
    config = experiment.config.experiment
    layout = Layout(
        micro_batch_size=config.pipeline.micro_batch_size_per_gpu,
        num_micro_batches=config.pipeline.gradient_accumulation_steps,
        num_replicas=experiment.num_replicas,
        replica=pipeline.replica,
        is_first_stage=pipeline.stage == 0,
        is_last_stage=pipeline.stage == pipeline.num_stages - 1,
    )
    return Feed(
        experiment.family,
        data,
        order,
        Objective(config.objective),
        seed=config.seed,
        layout=layout,
        dtype=config.model.torch_dtype,
    )


def due(step: int, every: int | None, num_steps: int) -> bool:
    """Whether something is to be done after `step` steps: every so often, and at the end."""
    return step == num_steps or (every is not None and step % every == 0)


def train(experiment: Experiment, folder: Path, pipeline: Pipeline, data: EncodedData) -> None:
    """Every step that is left, with its evaluations, previews, exports and checkpoints."""
    config = experiment.config.experiment
    order = order_of(experiment)
    num_steps = experiment.num_steps(order)
    start_step = experiment.resume_from.step if experiment.resume_from is not None else 0
    # The feed runs ahead, perhaps into the next epoch: it has an order of its own.
    feed, steps = make_feed(experiment, pipeline, data, order_of(experiment)), range(start_step, num_steps)
    with (
        RunLog(
            folder,
            start_step=start_step,
            num_steps=num_steps,
            global_batch=experiment.global_batch,
            tensorboard=config.monitoring.tensorboard,
            is_main=distributed.world().is_main,
        ) as log,
        feed.steps(steps) as batches,
    ):
        observer = Observer(experiment, folder, pipeline, data, order, log, start_step)
        if start_step == 0:
            observer.look(0)
        for step, micro_batches in zip(steps, batches, strict=True):
            log.start_clock()
            rate = schedule_of(config.optimizer).at(step, num_steps)
            done = step + 1
            decay = ema_decay(config.ema, done) if config.ema is not None else None
            result = pipeline.train_step(micro_batches, feed.shapes(step), {"all": rate}, decay)
            stop_if_not_finite(result, step, order)
            log.write(StepMetrics(done, step // order.steps_per_epoch, result.loss, rate, result.grad_norm))
            # The checkpoint comes last: going on from it, nothing that belongs to its step is missing.
            observer.look(done)
            if due(done, config.save.export_every_n_steps, num_steps):
                export.write_weights(pipeline, experiment.family, config, folder / "weights", done)
            if due(done, config.save.checkpoint_every_n_steps, num_steps):
                checkpoint.save(pipeline, folder / CHECKPOINTS, done, experiment.identity, config.save.keep_last)
                observer.saved()


def stop_if_not_finite(result: StepResult, step: int, order: BatchOrder) -> None:
    """Raise FloatingPointError naming the step's examples when its loss or gradient is no number."""
    if not (math.isfinite(result.loss) and math.isfinite(result.grad_norm)):
        names = ", ".join(draw.example.key for draw in order.global_batch(step))
        raise FloatingPointError(
            f"step {step + 1}: loss {result.loss}, gradient norm {result.grad_norm}; the batch was {names}. "
            "Nothing of this step was saved."
        )


if __name__ == "__main__":
    main()
