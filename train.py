"""Train Stable Diffusion 3 as one TOML file says:  deepspeed train.py --config sd35.toml

The story of a run: check everything, encode the dataset, cut the network over the processes, train, save, export.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
import traceback
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from models.base import PipelineLayer
from utils import checkpoint, distributed, export, lora
from utils.atomic import write_text
from utils.banner import describe
from utils.config.load import TRAINING, ConfigError, Problem, dump_toml
from utils.data.batches import BatchOrder
from utils.data.precompute import EncodedData, cache_dataset
from utils.log import RunLog, StepMetrics, say
from utils.objective import LossTarget, Objective
from utils.observe import Observer
from utils.optimizer import ema_decay, learning_rate, make_optimizer
from utils.pipeline.engine import EngineSettings, Pipeline, StepResult
from utils.pipeline.feed import EMPTY_CAPTION, Feed, Layout
from utils.pipeline.optimizer_state import MASTER
from utils.preflight import BAD_FILE_ADVICE, CHECKPOINTS, Experiment, prepare, run_files

EXIT_BAD_INPUT = 1
FOLLOWER_PATIENCE_SECONDS = 10.0


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="train.py", description=__doc__, allow_abbrev=False)
    parser.add_argument("--config", required=True, type=Path, help="the experiment file (TOML)")
    parser.add_argument("--check", action="store_true", help="check everything, say what training would do, and stop")
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
        world, only_check = distributed.world(), arguments.check
        experiment = prepare(arguments.config, arguments.overrides, arguments.resume, world, any_size=only_check)
        if arguments.check:
            output = f"nothing: only checked; a run would write to {experiment.config.experiment.output_dir}"
            say(describe(experiment, order_of(experiment), output), is_main=distributed.world().is_main)
            sys.exit(0)
        run(experiment)
    except ConfigError as error:
        refuse(error)
    except Exception:
        print(f"rank {distributed.world().rank} failed:\n{traceback.format_exc()}", file=sys.stderr)
        distributed.finish(1)
    distributed.finish(0)


def refuse(error: ConfigError) -> None:
    """Print every problem and leave with 1. Other ranks let rank 0 speak first: launchers end all at the first exit."""
    if not distributed.world().is_main:
        time.sleep(FOLLOWER_PATIENCE_SECONDS)
    count = len(error.problems)
    print(f"\nThis run cannot start; {count} problem{'s' if count > 1 else ''}:\n{error}\n", file=sys.stderr)
    distributed.finish(EXIT_BAD_INPUT)


def run(experiment: Experiment) -> None:
    """All ranks, from the process group's start to the last file."""
    is_main = distributed.world().is_main
    device = distributed.start()
    experiment = agree(experiment)
    folder = open_run_folder(experiment)
    say(f"\n{describe(experiment, order_of(experiment), str(folder))}\n", is_main=is_main)
    data, experiment = encode_dataset(experiment, device)
    pipeline = build_pipeline(experiment)
    if experiment.resume_from is not None:
        checkpoint.load(pipeline, experiment.resume_from)
    train(experiment, folder, pipeline, data)
    say(f"done: {folder}", is_main=is_main)


def agree(experiment: Experiment) -> Experiment:
    """Rank 0's view of what lies in folders: another rank may have looked a moment earlier, or through a slower mount."""
    seen = (experiment.dataset, experiment.eval_sets, experiment.prompts, experiment.resume_run, experiment.resume_from)
    dataset, eval_sets, prompts, resume_run, resume_from = distributed.broadcast(seen)
    return replace(
        experiment, dataset=dataset, eval_sets=eval_sets, prompts=prompts, resume_run=resume_run, resume_from=resume_from
    )


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


def encode_dataset(experiment: Experiment, device: torch.device) -> tuple[EncodedData, Experiment]:
    """Fill the cache; returns it and the experiment with the examples that could be encoded.

    Raises ConfigError on every rank for files that could not, unless they are to be skipped.
    """
    config = experiment.config
    groups = {TRAINING: experiment.dataset.examples, **experiment.eval_sets}
    examples = [example for members in groups.values() for example in members]
    captions = {EMPTY_CAPTION, *(example.caption for example in examples)}
    captions |= {text for prompt in experiment.prompts for text in (prompt.text, prompt.negative)}
    data, bad_files = cache_dataset(experiment.adapter, examples, sorted(captions), config.experiment.cache_folder, device)
    bad_paths = {bad.path for bad in bad_files}
    usable = {name: [example for example in members if example.image not in bad_paths] for name, members in groups.items()}
    problems = [Problem(bad.path, "", bad.reason) for bad in bad_files]
    fatal = []
    for name, members in groups.items():
        path, table = config.dataset_of(name)
        if len(usable[name]) < len(members) and table.on_bad_file == "error":
            fatal.append(Problem(path, "on_bad_file", BAD_FILE_ADVICE))
        elif not usable[name]:
            fatal.append(Problem(path, "directory", "no picture could be encoded"))
    if fatal:
        raise ConfigError(problems + fatal)
    for problem in problems:
        say(f"left out: {problem}", is_main=distributed.world().is_main)
    dataset = replace(experiment.dataset, examples=usable.pop(TRAINING))
    return data, replace(experiment, dataset=dataset, eval_sets=usable)


def build_pipeline(experiment: Experiment) -> Pipeline:
    """The network over the processes, each with its own layers only, and what is trained of it."""
    config, plan, start = experiment.config.experiment, experiment.adapter_plan, experiment.adapter_start
    objective = Objective(config.objective)

    def prepare_layer(layer: PipelineLayer, module: nn.Module) -> None:
        if plan is not None:
            lora.inject(module, layer.prefix, plan, seed=config.seed)
        if start is not None:
            lora.load_start(module, layer.prefix, start)

    def loss(output: Tensor, target: tuple[Tensor, ...]) -> Tensor:
        wanted = LossTarget(*target)
        return objective.loss(experiment.adapter.velocity(output, *wanted.output.shape[-2:]), wanted)

    settings = EngineSettings(
        micro_batch_size=config.pipeline.micro_batch_size_per_gpu,
        num_micro_batches=config.pipeline.gradient_accumulation_steps,
        gradient_clipping=config.optimizer.gradient_clipping,
        dtype=config.model.torch_dtype,
    )
    pipeline = Pipeline(
        experiment.adapter.layers,
        experiment.bounds,
        settings,
        loss=loss,
        prepare=prepare_layer,
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
        experiment.adapter,
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
    feed = make_feed(experiment, pipeline, data, order)
    with RunLog(
        folder,
        start_step=start_step,
        num_steps=num_steps,
        global_batch=experiment.global_batch,
        tensorboard=config.monitoring.tensorboard,
        is_main=distributed.world().is_main,
    ) as log:
        observer = Observer(experiment, folder, pipeline, data, order, log, start_step)
        if start_step == 0:
            observer.look(0)
        for step in range(start_step, num_steps):
            log.start_clock()
            rate = learning_rate(config.optimizer, step, num_steps)
            done = step + 1
            decay = ema_decay(config.ema, done) if config.ema is not None else None
            result = pipeline.train_step(feed.micro_batches(step), rate, decay)
            stop_if_not_finite(result, step, order)
            log.write(StepMetrics(done, step // order.steps_per_epoch, result.loss, rate, result.grad_norm))
            # The checkpoint comes last: going on from it, nothing that belongs to its step is missing.
            observer.look(done)
            if due(done, config.save.export_every_n_steps, num_steps):
                export.write_weights(pipeline, experiment.adapter, config, folder / "weights", done)
            if due(done, config.save.checkpoint_every_n_steps, num_steps):
                checkpoint.save(pipeline, folder / CHECKPOINTS, done, experiment.identity, config.save.keep_last)
                observer.saved()


def stop_if_not_finite(result: StepResult, step: int, order: BatchOrder) -> None:
    """Raise FloatingPointError naming the step's examples when its loss or gradient is no number."""
    if not (math.isfinite(result.loss) and math.isfinite(result.grad_norm)):
        names = ", ".join(visit.example.key for visit in order.global_batch(step))
        raise FloatingPointError(
            f"step {step + 1}: loss {result.loss}, gradient norm {result.grad_norm}; the batch was {names}. "
            "Nothing of this step was saved."
        )


if __name__ == "__main__":
    main()
