"""Fine-tunes Stable Diffusion 3 and 3.5 from one TOML file:  deepspeed train.py --config sd35.toml

A run in order: parse the command line, check everything, encode the dataset, build the pipeline, train.
"""

from __future__ import annotations

import argparse
import gc
import sys
import time
import traceback
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from utils.config.load import ConfigError
from utils.console import print_line
from utils.distributed import group
from utils.distributed.world import world
from utils.run.banner import describe
from utils.run.build import Run, build_run
from utils.run.encode import encode_dataset
from utils.run.events import make_events
from utils.run.experiment import Experiment
from utils.run.folder import create_run_folder
from utils.run.loop import train
from utils.run.partition import measure_partition
from utils.run.prepare import prepare
from utils.tracking.metrics import RunLog

EXIT_BAD_INPUT = 1
FOLLOWER_DELAY_SECONDS = 10.0
"""How long other ranks wait with a refusal: launchers end all processes at the first exit, and rank 0 prints the errors."""


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line; exits with 2 on wrong usage."""
    parser = argparse.ArgumentParser(prog="train.py", description=__doc__, allow_abbrev=False)
    parser.add_argument("--config", required=True, type=Path, help="the experiment file (TOML)")
    parser.add_argument("--check", action="store_true", help="check everything, print what a run would do, and stop")
    parser.add_argument("--cache-only", action="store_true", help="encode the dataset, and stop")
    parser.add_argument("--report", action="store_true", help="encode the dataset, write the dataset report, and stop")
    parser.add_argument(
        "--resume",
        nargs="?",
        const="",
        metavar="RUN",
        help="resume the newest run of output_dir, or the run folder RUN; without RUN, start a run if there is none",
    )
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", dest="overrides", help="override one key (repeatable)"
    )
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)  # passed by the deepspeed launcher
    return parser.parse_args(arguments)


def main() -> None:
    arguments = parse_arguments()
    try:
        # Imports and the dataset make objects that stay; collecting would traverse a million of them again and again.
        gc.disable()
        experiment = prepare(arguments.config, arguments.overrides, arguments.resume, world(), check_only=arguments.check)
        gc.freeze()
        gc.enable()
        if arguments.check:
            check(experiment)
        elif arguments.cache_only or arguments.report:
            encode(experiment, wants_report=arguments.report)
        else:
            run(experiment)
    except ConfigError as error:
        refuse(error)
    except Exception:
        print(f"rank {world().rank} failed:\n{traceback.format_exc()}", file=sys.stderr)
        group.finish(1)
    group.finish(0)


def refuse(error: ConfigError) -> None:
    """Prints every error and exits."""
    if not world().is_main:
        time.sleep(FOLLOWER_DELAY_SECONDS)
    count = len(error.errors)
    print(f"\nCannot start: {count} error{'s' if count > 1 else ''}:\n{error}\n", file=sys.stderr)
    group.finish(EXIT_BAD_INPUT)


def check(experiment: Experiment) -> None:
    """One process, without a process group."""
    print_banner(experiment, f"none: only checked; a run would write to {experiment.config.experiment.output_dir}")
    sys.exit(0)


def encode(experiment: Experiment, *, wants_report: bool) -> None:
    """All ranks: fills the cache."""
    device = group.start()
    experiment = agree(experiment)
    print_banner(experiment, f"the cache, and a dataset report in {experiment.config.experiment.output_dir}")
    encode_dataset(experiment, device, wants_report=wants_report)


def run(experiment: Experiment) -> None:
    """All ranks, from the start of the process group to the last file."""
    is_main = world().is_main
    device = group.start()
    experiment = measure_partition(agree(experiment), device)
    folder = group.broadcast(create_run_folder(experiment.config, experiment.resume_run) if is_main else Path())
    print_banner(experiment, str(folder))
    data, experiment = encode_dataset(experiment, device)
    current = build_run(experiment, folder, data)
    with open_log(current) as log:
        train(current, make_events(current, log))
    print_line(f"done: {folder}", is_main=is_main)


def open_log(current: Run) -> RunLog:
    """The metrics of the run; only rank 0 writes them."""
    experiment, clock = current.experiment, current.clock
    return RunLog(
        current.folder,
        start_step=clock.step,
        num_steps=clock.num_steps,
        global_batch=experiment.global_batch,
        tensorboard=experiment.config.experiment.monitoring.tensorboard,
        is_main=world().is_main,
    )


def agree(experiment: Experiment) -> Experiment:
    """The experiment with what rank 0 found in folders; other ranks may have read them earlier, and open no dataset."""
    names = ("prompts", "partition", "resume_run", "resume_from", "bucket_group", "master")
    return replace(experiment, **group.broadcast({name: getattr(experiment, name) for name in names}))


def print_banner(experiment: Experiment, output: str) -> None:
    """Prints the start banner on rank 0, which alone has opened the dataset. `output`: where results are written."""
    if world().is_main:
        print_line(f"\n{describe(experiment, experiment.batch_order(), output)}\n")


if __name__ == "__main__":
    main()
