"""The start banner: model, stages, data, batch, objective and output of a run, printed before it starts."""

from __future__ import annotations

import itertools

from utils.config.presets import PRESETS
from utils.config.schema.objective import ObjectiveConfig
from utils.config.schema.optimizer import NO_DECAY
from utils.console import format_bytes, format_table
from utils.data.batches import BatchOrder
from utils.data.encoding.plan import max_cache_bytes
from utils.objective.validation import keys_in_use, unread_keys
from utils.report.dataset_gather import BAD_FILES, MAX_SHOWN_IN_LOG
from utils.run.experiment import Experiment
from utils.trainable.base import millions, num_trained
from utils.trainable.groups import group_schedules

MAX_BUCKETS_SHOWN = 12


def describe(experiment: Experiment, order: BatchOrder, output: str) -> str:
    """The text of the banner. `output`: a description of where results are written."""
    notes = [f"note: {line}" for line in (*experiment.family.notes, *experiment.dataset.warnings)]
    notes += [f"note: {line}" for line in objective_notes(experiment.config.experiment.objective)]
    notes += [f"changed since the last start of this run: {line}" for line in experiment.changed_keys]
    notes += _skipped_files(experiment)
    notes += [f"note: {line}" for line in experiment.trainable.notes()]
    rows = [*summary(experiment, order), ("output", output)]
    return "\n".join([format_table(rows), *(f"  {note}" for note in notes)])


def _skipped_files(experiment: Experiment) -> list[str]:
    """The first skipped files, and how many more there are."""
    bad_files = experiment.dataset.bad_files
    lines = [f"skipped: {bad}" for bad in bad_files[:MAX_SHOWN_IN_LOG]]
    rest = len(bad_files) - len(lines)
    if rest:
        path = experiment.config.experiment.output_dir / BAD_FILES
        lines.append(f"skipped: {rest} more files; a run lists all of them in {path}")
    return lines


def summary(experiment: Experiment, order: BatchOrder) -> list[tuple[str, str]]:
    """Name and value of each row of the banner's table."""
    config, dataset = experiment.config.experiment, experiment.dataset
    buckets = dataset.bucket_counts()
    shown = [f"{bucket}: {count}" for bucket, count in buckets.items()][:MAX_BUCKETS_SHOWN]
    if len(buckets) > len(shown):
        shown.append(f"and {len(buckets) - len(shown)} more")
    pipeline = config.pipeline
    num_steps = experiment.num_steps(order)
    return [
        ("model", experiment.family.describe()),
        *((name, str(path)) for name, path in experiment.family.sources.items()),
        ("training", experiment.trainable.describe()),
        *_rate_rows(experiment),
        *_ema_rows(experiment),
        *_stage_rows(experiment),
        ("images", f"{dataset.num_images} ({len(dataset.examples)} examples; by bucket {', '.join(shown)})"),
        *_eval_rows(experiment),
        ("objective", "; ".join(f"{name} {value}" for name, value in objective_rows(config.objective))),
        (
            "global batch",
            f"{experiment.global_batch} = {pipeline.micro_batch_size_per_gpu} per micro-batch "
            f"x {pipeline.gradient_accumulation_steps} micro-batches x {experiment.num_replicas} replicas; "
            f"{experiment.bucket_group} at a time of one bucket",
        ),
        ("draws per epoch", _draws(order)),
        ("steps", f"{num_steps}, {order.steps_per_epoch} per epoch"),
        ("pipeline bubble", _bubble(experiment)),
        ("cache", f"{config.cache_folder}; at most {format_bytes(_cache_bytes(experiment))} for this dataset"),
    ]


def _draws(order: BatchOrder) -> str:
    """The draws of an epoch in all and by bucket, the most repeated first, and how many are repeated to fill groups."""
    by_bucket = sorted(order.bucket_draws().items(), key=lambda item: (-item[1].factor, item[0]))
    shown = [f"{bucket}: {draws}" for bucket, draws in by_bucket[:MAX_BUCKETS_SHOWN]]
    if len(by_bucket) > len(shown):
        shown.append(f"and {len(by_bucket) - len(shown)} more")
    return f"{order.epoch_draws()}; by bucket {', '.join(shown)}"


def objective_rows(config: ObjectiveConfig) -> list[tuple[str, str]]:
    """Name and value of each setting of the objective that is in use."""
    scheme = config.weighting_scheme
    weight = scheme if scheme == "none" else f"{scheme} by {config.weighting_by}"
    shift = f"{config.discrete_flow_shift:g}"
    if config.shift_resolution is not None:
        shift += f" at {config.shift_resolution}x{config.shift_resolution}, scaled with the resolution elsewhere"
    rows = [
        ("time density", config.timestep_sampling),
        ("loss weight", weight),
        ("shift", shift),
        ("prediction", config.model_prediction_type),
        ("loss", config.loss_type),
    ]
    if (config.min_t, config.max_t) != (0, 1):
        rows.append(("t", f"from {config.min_t:g} to {config.max_t:g}"))
    values = config.model_dump()
    numbers = [key for key, used in keys_in_use(config).items() if used and isinstance(values[key], float)]
    if numbers:
        rows.append(("numbers", ", ".join(f"{key} {values[key]:g}" for key in numbers)))
    if config.timestep_grid != "none":
        rows.append(("rounding", f"as {config.timestep_grid}"))
    rows += [
        (name, str(values[key]))
        for name, key in (("caption dropout", "caption_dropout_rate"), ("encoder dropout", "encoder_dropout_rate"))
        if values[key]
    ]
    return rows


def objective_notes(config: ObjectiveConfig) -> list[str]:
    """Remarks: what a preset set, keys without effect, outputs that other programs cannot use."""
    notes = []
    if config.preset is not None:
        preset, values = PRESETS[config.preset], config.model_dump()
        sets = ", ".join(f"{key} = {value!r}" for key, value in preset.items())
        written = ", ".join(f"{key} = {values[key]!r}" for key, value in preset.items() if values[key] != value)
        notes.append(f"objective.preset = {config.preset!r} sets {sets}" + (f"; overridden by {written}" if written else ""))
    notes += [f"objective.{key} has no effect on this objective" for key in unread_keys(config)]
    if config.model_prediction_type == "additive":
        notes.append("with model_prediction_type 'additive' the output is not a velocity: other programs cannot use it")
    return notes


def _rate_rows(experiment: Experiment) -> list[tuple[str, str]]:
    """The peak learning rate of each parameter group, if there are several."""
    schedules = group_schedules(experiment.config.experiment.optimizer).items()
    peaks = [f"{name} {schedule.peak:g}" for name, schedule in schedules if not name.endswith(NO_DECAY)]
    return [("learning rates", ", ".join(peaks))] if len(peaks) > 1 else []


def _ema_rows(experiment: Experiment) -> list[tuple[str, str]]:
    ema = experiment.config.experiment.ema
    if ema is None:
        return []
    return [("averaged weights", f"EMA with decay {ema.decay:g}{', lower in the first steps' if ema.warmup else ''}")]


def _eval_rows(experiment: Experiment) -> list[tuple[str, str]]:
    return [(f"evaluation on {name}", f"{examples.num_images} images") for name, examples in experiment.eval_sets.items()]


def _stage_rows(experiment: Experiment) -> list[tuple[str, str]]:
    partition, plan, several = experiment.partition, experiment.stage_plan, experiment.num_stages > 1
    rows = [("partition", partition.description)] if several else []
    for stage, (start, stop) in enumerate(itertools.pairwise(partition.bounds)):
        layers = experiment.family.layers[start:stop]
        total = sum(layer.num_parameters for layer in layers)
        trained = num_trained(experiment.trainable, layers)
        recomputed = plan.recompute.describe(plan.num_blocks(stage))
        text = f"{layers[0].name} to {layers[-1].name}: {millions(total)} parameters, {millions(trained)} trained"
        if several:
            text += f", {partition.shares[stage]:.1%} of the cost"
        if recomputed:
            text += f", {recomputed}"
        rows.append((f"stage {stage + 1} of {experiment.num_stages}", text))
    return rows


def _cache_bytes(experiment: Experiment) -> int:
    tables = [experiment.dataset.examples, *experiment.eval_sets.values()]
    return max_cache_bytes(experiment.family, tables, experiment.cache_settings)


def _bubble(experiment: Experiment) -> str:
    """The idle fraction of 1F1B, (P - 1) / (M + P - 1) for P stages and M micro-batches, and how to lower it."""
    stages, micro_batches = experiment.num_stages, experiment.config.experiment.pipeline.gradient_accumulation_steps
    idle = (stages - 1) / (micro_batches + stages - 1)
    advice = f"; raise gradient_accumulation_steps (now {micro_batches}) to lower it" if idle > 0.2 else ""
    return f"{idle:.0%} of the time idle{advice}"
