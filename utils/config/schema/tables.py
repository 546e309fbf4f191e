"""Every key of the experiment file and of the dataset file: type, default, check, and the sentence that documents it.

docs/configuration.md is generated from this file. A key is here if, and only if, the program reads it.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    Strict,
    ValidationInfo,
    create_model,
    field_serializer,
    field_validator,
    model_validator,
)

import models
from utils.config.presets import PRESETS, Preset
from utils.objective.rectified_flow import LossType, PredictionType
from utils.objective.timestep_sampling import MAX_MODE_SCALE, MIN_MODE_SCALE, TimestepGrid, TimestepSampling, WeightingScheme
from utils.previews.prompts import parse_prompt

ExportDtype = Literal["float32", "bfloat16", "float16"]
ExportFormat = Literal["native", "complete", "diffusers"]
TrainedWeights = Literal["last", "ema"]
HOLDOUT = "holdout"
"""Name of the evaluation set taken from the dataset."""


# Strict: TOML has types of its own, so "3" is no number and true is neither 1 nor 1.0. A float may be written as 1.
Int = Annotated[int, Strict()]
Float = Annotated[float, Strict()]
Bool = Annotated[bool, Strict()]


class Table(BaseModel):
    """A table of a TOML file: typed, closed, read-only."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


def inner_tables(annotation: Any) -> Iterator[type[BaseModel]]:
    """The tables in the type of a field, alone, in lists or as alternatives."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for part in get_args(annotation):
        yield from inner_tables(part)


class ObjectiveConfig(Table):
    """What the network is trained to do. docs/objective.md has every formula, with plots."""

    preset: Preset | None = Field(
        None,
        description="Sets this table to what another program computes: `sd3_paper`, `sd_scripts`, `diffusers` or "
        "`simpletuner`. Keys that are written too win.",
    )
    model_prediction_type: PredictionType = Field(
        "raw",
        description="`raw`: the output is the velocity. `sigma_scaled`: it is, and errors are those of the clean latents, "
        "sigma times as large. `additive`: output and noisy latents together are the velocity.",
    )
    timestep_sampling: TimestepSampling = Field(
        "sigma",
        description="How the flow time t is drawn: `sigma` (uniform), or by the SD3 paper's densities `logit_normal` "
        "(eq. 19), `mode` (eq. 20) and `cosmap` (eq. 21).",
    )
    weighting_scheme: WeightingScheme = Field(
        "logit_normal",
        description="How much each t counts: `none`, `sigma_sqrt`, `logit_normal`, `mode` or `cosmap`. Default: "
        "logit_normal, and none where `timestep_sampling` is not sigma.",
    )
    weighting_by: Literal["sampling", "loss"] = Field(
        "sampling",
        description="`sampling`: t is drawn so much more often where it counts more; `loss`: its loss is multiplied. The "
        "same in expectation; sampling varies far less.",
    )
    logit_mean: Float = Field(0.0, description="Of logit_normal, as density or weight: mean of logit(t). Above 0: noisier.")
    logit_std: Float = Field(1.0, ge=0.01, description="Of logit_normal: standard deviation of logit(t).")
    mode_scale: Float = Field(
        1.29,
        ge=MIN_MODE_SCALE,
        le=MAX_MODE_SCALE,
        description="Of the density mode: above 0 prefers the middle, below 0 the ends; from -1 to 2 / (pi - 2).",
    )
    mode_mean: Float = Field(0.5, description="Of the weight mode: the t that counts most.")
    mode_s_n: Float = Field(0.2, ge=0.001, description="Of the weight mode: its width s_n.")
    min_t: Float = Field(0.0, ge=0, lt=1, description="No t below this is drawn; before the shift.")
    max_t: Float = Field(1.0, gt=0, le=1, description="No t above this is drawn; before the shift.")
    discrete_flow_shift: Float = Field(
        3.0, ge=0.01, le=100, description="sigma = s t / (1 + (s - 1) t). SD3 and SD3.5 are sampled with 3.0 at 1024 pixels."
    )
    shift_resolution: Int | None = Field(
        None,
        ge=16,
        description="Side in pixels of the square at which the shift holds; elsewhere it is multiplied by sqrt(m / n) for m "
        "pixels against n (SD3 paper, eq. 23). Unset: the same shift at every size.",
    )
    timestep_grid: TimestepGrid = Field(
        "none",
        description="Rounding to thousandths, for comparison with programs that do it: `sd_scripts` (sigma, down), "
        "`diffusers` (t, up).",
    )
    loss_type: LossType = Field(
        "l2", description="Penalty of an error: `l2` (its square), `huber` or `smooth_l1` (less for large ones)."
    )
    huber_c: Float = Field(
        0.1,
        gt=0,
        description="Of huber and smooth_l1: the error (with sigma_scaled, of clean latents) above which it counts less.",
    )
    caption_dropout_rate: Float = Field(
        0.0, ge=0, le=1, description="Share of draws at which the caption is replaced by an empty one, for guidance."
    )
    encoder_dropout_rate: float | dict[str, float] = Field(
        0.0,
        description="Share of draws at which a text encoder's output is replaced by zeros, each encoder for itself: one "
        "number for all, or a table such as { clip_l = 0.1, t5xxl = 0.2 }.",
    )

    @field_validator("encoder_dropout_rate", mode="before")
    @classmethod
    def _rates(cls, value: Any) -> Any:
        rates = {f"{name} = ": rate for name, rate in value.items()} if isinstance(value, dict) else {"": value}
        for name, rate in rates.items():
            if isinstance(rate, bool) or not isinstance(rate, int | float) or not 0 <= rate <= 1:
                raise ValueError(f"{name}{rate!r} is no number from 0 to 1")
        return value

    @model_validator(mode="before")
    @classmethod
    def _fill_in(cls, written: Any) -> Any:
        """The preset's values under what is written, and the default that depends on another key."""
        if not isinstance(written, dict):
            return written
        preset = written.get("preset")
        values = {**(PRESETS.get(preset, {}) if isinstance(preset, str) else {}), **written}
        if values.get("timestep_sampling", "sigma") != "sigma":
            values.setdefault("weighting_scheme", "none")
        return values

    @field_validator("max_t")
    @classmethod
    def _above_min_t(cls, value: float, info: ValidationInfo) -> float:
        if value <= info.data.get("min_t", 0.0):
            raise ValueError(f"must be above min_t, {info.data['min_t']}")
        return value

    @field_validator("weighting_scheme")
    @classmethod
    def _no_square(cls, value: str, info: ValidationInfo) -> str:
        if value == info.data.get("timestep_sampling"):
            raise ValueError(
                f"timestep_sampling is {value!r} too: the density would count twice; set timestep_sampling = "
                '"sigma", or weighting_scheme = "none"'
            )
        return value


class TargetConfig(Table):
    """An entry of `targets` with a rank or alpha of its own: `{ pattern = "attn", rank = 8 }`."""

    pattern: str = Field(description="Name of a group of modules, or regular expression over whole native module names.")
    rank: Int | None = Field(None, ge=1, description="Rank of these modules. Default: that of `[adapter]`.")
    alpha: Float | None = Field(
        None, gt=0, description="Alpha of these modules. Default: that of `[adapter]`, and where it has none, their rank."
    )


def _as_target(entry: Any) -> Any:
    if isinstance(entry, str):
        return {"pattern": entry}
    if not isinstance(entry, dict | TargetConfig):
        raise ValueError("must be a string, or a table such as { pattern = 'attn', rank = 8 }")
    return entry


class AdapterConfig(Table):
    """Train a small adapter; without this table the whole network is trained."""

    type: Literal["lora", "lokr"] = Field(
        description="Kind of adapter: `lora`, two thin matrices (low rank); `lokr`, a Kronecker product, smaller still."
    )
    rank: Int = Field(16, ge=1, description="Rank of the update; of `lokr`, rank of the product's second factor.")
    alpha: Float | None = Field(None, gt=0, description="Strength: the update is scaled by alpha / rank. Default: rank.")
    rank_stabilized: Bool = Field(
        False, description="Scale by alpha / sqrt(rank) instead (rsLoRA), so that high ranks learn as fast. `lora` only."
    )
    dora: Bool = Field(False, description="Train the length of each row of the weights apart (DoRA). `lora` only.")
    targets: list[Annotated[TargetConfig, BeforeValidator(_as_target)]] | None = Field(
        None,
        min_length=1,
        description="Modules that get an adapter. Each entry is a string, the name of a group (docs/training.md) or a "
        "regular expression over whole native module names, or a table with rank and alpha of its own; the last that "
        "matches a module decides them. Default: the groups attn, mlp and final_layer.",
    )
    blocks: str | None = Field(
        None, description='Only these blocks\' modules, such as "0-11,20". Modules outside of blocks are not touched by it.'
    )
    init_from: Path | None = Field(
        None, description="An adapter file to start from, with native or diffusers' keys. Unset: a fresh start."
    )

    @field_validator("rank_stabilized", "dora")
    @classmethod
    def _low_rank_only(cls, value: bool, info: ValidationInfo) -> bool:
        if value and info.data.get("type") == "lokr":
            raise ValueError('goes with type = "lora" only; leave it out, or change the type')
        return value

    @field_serializer("targets")
    def _plain_strings(self, targets: list[TargetConfig] | None) -> list[str] | list[dict[str, Any]] | None:
        """Strings where no entry says more: as it was written, and as toml can write it."""
        if targets is None:
            return None
        if all(target.rank is None and target.alpha is None for target in targets):
            return [target.pattern for target in targets]
        return [target.model_dump(exclude_none=True) for target in targets]


class PipelineConfig(Table):
    """How the network and the batch are laid out over the processes."""

    pipeline_stages: Annotated[Int, Field(ge=1)] | Literal["auto"] = Field(
        1,
        description="Consecutive parts the network is cut into, one a process; must divide the number of processes. What "
        "remains is data parallel. `auto`: one stage for each process.",
    )
    micro_batch_size_per_gpu: Int = Field(1, ge=1, description="Images that go through a stage at once.")
    gradient_accumulation_steps: Int = Field(
        1, ge=1, description="Micro-batches in a step for each replica. At least four times the stages keeps them busy."
    )


class OptimizerConfig(Table):
    """How weights follow gradients."""

    type: str = Field("AdamW", description="Name of a class in torch.optim.")
    learning_rate: Float = Field(gt=0, description="Highest learning rate.")
    args: dict[str, Any] = Field(
        default_factory=dict, description="Further arguments of that class, such as `weight_decay` or `betas`."
    )
    gradient_clipping: Float = Field(
        1.0, ge=0, description="Largest norm of the gradient over all stages; larger ones are scaled down. 0: off."
    )
    lr_scheduler: Literal["constant", "linear", "cosine"] = Field(
        "constant", description="Course of the learning rate after the warm-up; linear and cosine end at the last step."
    )
    lr_warmup_steps: Int = Field(0, ge=0, description="Steps over which the learning rate rises linearly from near 0.")
    lr_min_ratio: Float = Field(0.0, ge=0, le=1, description="Learning rate of the last step, as a share of the highest.")


class EmaConfig(Table):
    """Keep an exponential moving average (EMA) of the trained weights; without this table there is none."""

    decay: Float = Field(
        0.9999, gt=0, lt=1, description="Share of the average that one step leaves; the rest is new weights."
    )
    warmup: Bool = Field(
        True, description="Leave less at first: (1 + n) / (10 + n) after step n, until that is more than `decay`."
    )


class PromptConfig(Table):
    """One preview. In place of a table, a string: the prompt, with sd-scripts' flags `--w --h --d --s --l --n` if any.
    What is unset is as in `[sampling]`."""

    prompt: str = Field(description="What to draw.")
    negative_prompt: str | None = Field(None, description="What guidance leads away from. Flag `--n`.")
    width: Int | None = Field(None, ge=16, description="Pixels. Flag `--w`.")
    height: Int | None = Field(None, ge=16, description="Pixels. Flag `--h`.")
    seed: Int | None = Field(
        None, ge=0, description="Decides the noise. Flag `--d`. Default: that of `[sampling]` plus the place in the list."
    )
    steps: Int | None = Field(None, ge=1, description="Steps of the sampler. Flag `--s`.")
    cfg: Float | None = Field(None, ge=1, description="Strength of classifier-free guidance. Flag `--l`.")


def _as_prompt(entry: Any) -> Any:
    if isinstance(entry, str):
        return parse_prompt(entry)
    if not isinstance(entry, dict | PromptConfig):
        raise ValueError("must be a string, or a table such as { prompt = 'a fox', seed = 1 }")
    return entry


class SkipLayerConfig(Table):
    """Skip-layer guidance: lead away from what the network draws without some of its blocks. For SD3.5-medium."""

    layers: list[Annotated[Int, Field(ge=0)]] = Field(
        default=[7, 8, 9], min_length=1, description="Blocks left out, counted from 0."
    )
    scale: Float = Field(2.5, gt=0, description="Strength.")
    start: Float = Field(0.01, ge=0, le=1, description="Share of the steps after which it begins.")
    end: Float = Field(0.2, ge=0, le=1, description="Share of the steps at which it ends.")


class SamplingConfig(Table):
    """Preview images, drawn by the network in training at the start, now and then, and at the end."""

    prompts: list[Annotated[PromptConfig, BeforeValidator(_as_prompt)]] = Field(
        default_factory=list,
        description="One image each: a string, or a table with what it does not share with the others. None: no previews.",
    )
    prompts_file: Path | None = Field(
        None, description="A text file with more prompts, one a line, in the form of sd-scripts; `#` begins a comment line."
    )
    negative_prompt: str = Field("", description="What guidance leads away from.")
    every_n_steps: Int | None = Field(None, ge=1, description="Steps between previews. Unset: only the first and last step.")
    sampler: Literal["euler", "dpmpp_2m"] = Field(
        "euler", description="`euler`, or `dpmpp_2m` (DPM-Solver++ of second order: fewer steps for the same image)."
    )
    steps: Int = Field(28, ge=1, description="Steps of the sampler.")
    cfg: Float = Field(4.5, ge=1, description="Strength of classifier-free guidance; 1 is none.")
    shift: Float | None = Field(
        None, ge=0.01, le=100, description="Shift of the noise levels drawn through. Unset: as `[objective]` trains."
    )
    skip_layer_guidance: SkipLayerConfig | None = None
    width: Int = Field(1024, ge=16, description="Pixels.")
    height: Int = Field(1024, ge=16, description="Pixels.")
    seed: Int = Field(0, ge=0, description="Each prompt without a seed of its own has this plus its place in the list.")
    batch_size: Int = Field(4, ge=1, description="Images drawn at once.")
    decode_tile_pixels: Int = Field(
        1024,
        ge=64,
        description="Larger images are decoded in tiles of this side that overlap by a quarter, to save memory.",
    )
    weights: TrainedWeights = Field("last", description="`last`: as they are in training. `ema`: their average, of `[ema]`.")

    @field_serializer("prompts")
    def _as_written(self, prompts: list[PromptConfig]) -> list[dict[str, Any]]:
        return [prompt.model_dump(exclude_none=True) for prompt in prompts]


class EvalSetConfig(Table):
    """Images that are not trained on."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9_-]+$")] = Field(description="For tables and curves.")
    dataset: Path = Field(description="A dataset file.")


class EvalConfig(Table):
    """Measure the velocity's error on held-out images: at the start, now and then, and at the end."""

    sets: list[EvalSetConfig] = Field(default_factory=list, description="Held-out images with captions, from elsewhere.")
    holdout_images: Int = Field(
        0, ge=0, description="Images kept out of training for this, chosen by `seed` from the dataset."
    )
    every_n_steps: Int | None = Field(
        None, ge=1, description="Steps between evaluations. Unset: only before the first and after the last."
    )
    num_t_bands: Int = Field(
        4, ge=1, description="Equal parts of t; each image is measured once in each, at a time and with noise of its own."
    )
    batch_size: Int = Field(4, ge=1, description="Images that go through a stage at once.")
    weights: TrainedWeights = Field("last", description="`last`: as they are in training. `ema`: their average, of `[ema]`.")
    keep_best: Bool = Field(False, description="Export the weights of the lowest mean loss so far, to `best` in the run.")

    @model_validator(mode="after")
    def _has_images(self) -> EvalConfig:
        if not self.sets and not self.holdout_images:
            raise ValueError("names no images: give holdout_images = 16, say, or sets of other images")
        names = [entry.name for entry in self.sets]
        if len(set(names)) < len(names) or HOLDOUT in names:
            raise ValueError(f"each set needs a name of its own, other than {HOLDOUT!r}")
        return self


class SaveConfig(Table):
    """Training checkpoints, to go on from, and weights, to use."""

    checkpoint_every_n_steps: Int = Field(500, ge=1, description="Steps between checkpoints; the last step has one too.")
    keep_last: Int = Field(2, ge=1, description="Checkpoints kept; older ones are deleted.")
    export_every_n_steps: Int | None = Field(
        None, ge=1, description="Steps between exports of weights. Unset: only the last."
    )
    formats: list[ExportFormat] | None = Field(
        None,
        min_length=1,
        description="Files an export writes: `native` (keys of the original model; ComfyUI, sd-scripts), `diffusers` (a "
        "folder for from_pretrained; of an adapter, a file for load_lora_weights), `complete` (one native file with the "
        "autoencoder and the text encoders; full training only). Default: `native`, and for a LoRA `diffusers` too.",
    )
    dtype: ExportDtype = Field("bfloat16", description="Precision of exported weights.")

    @field_validator("formats")
    @classmethod
    def _each_once(cls, value: list[ExportFormat] | None) -> list[ExportFormat] | None:
        if value is not None and len(set(value)) < len(value):
            raise ValueError("each format once")
        return value


class MonitoringConfig(Table):
    """What is written down while training."""

    tensorboard: Bool = Field(True, description="Write TensorBoard events beside metrics.jsonl.")


class ExperimentConfig(Table):
    """One run. `[model]` has the fields of its family; see `experiment_class`."""

    output_dir: Path = Field(description="Folder of all runs of this experiment; each run makes a folder in it.")
    dataset: Path = Field(description="The dataset file.")
    cache_dir: Path | None = Field(
        None, description="Where encoded data is kept; several runs may share it. Default: `cache` in output_dir."
    )
    cache_posterior: Bool = Field(
        False,
        description="Keep what the autoencoder says of each latent pixel's deviation too, and draw latents anew at each "
        "draw. Takes twice the room. Else: the mean.",
    )
    text_cache_dtype: Literal["bfloat16", "float8_e4m3fn"] | None = Field(
        None,
        description="Precision of cached text embeddings; `float8_e4m3fn` halves the room and has one scale a token "
        "(docs/data.md has the error). Unset: that of the network.",
    )
    seed: Int = Field(0, ge=0, lt=2**63, description="Decides every random draw of the run.")
    epochs: Int | None = Field(None, ge=1, description="Times the dataset is gone through.")
    max_steps: Int | None = Field(None, ge=1, description="Optimizer steps; with `epochs` too, whichever ends first.")
    model: Any
    objective: ObjectiveConfig = Field(default_factory=ObjectiveConfig)
    adapter: AdapterConfig | None = None
    pipeline: PipelineConfig = Field(default_factory=PipelineConfig)
    optimizer: OptimizerConfig
    ema: EmaConfig | None = None
    sampling: SamplingConfig = Field(default_factory=SamplingConfig)
    eval: EvalConfig | None = None
    save: SaveConfig = Field(default_factory=SaveConfig)
    monitoring: MonitoringConfig = Field(default_factory=MonitoringConfig)

    @property
    def cache_folder(self) -> Path:
        return self.cache_dir if self.cache_dir is not None else self.output_dir / "cache"


class ImageConfig(Table):
    """What may be said of all images of a dataset file, or in a `[[directory]]` of those in it."""

    resolutions: list[Annotated[Int, Field(ge=16)]] = Field(
        default_factory=list,
        description="Side in pixels of a square of the trained area; each image is used at every one. Must be given.",
    )
    enable_ar_bucket: Bool = Field(True, description="Keep images' shapes, sorted into buckets; else crop all square.")
    min_ar: Float = Field(0.5, gt=0, description="Narrowest width / height of a bucket.")
    max_ar: Float = Field(2.0, gt=0, description="Widest width / height of a bucket.")
    num_ar_buckets: Int = Field(7, ge=1, description="Buckets between the two, evenly spaced in the logarithm.")
    crop: Literal["center", "random"] = Field(
        "center",
        description="What is kept of the side that is too long for the bucket: the middle, or a place drawn for each "
        "image and resolution, the same in every run.",
    )
    upscale: Literal["allow", "never", "error"] = Field(
        "allow",
        description="Of an image smaller than its bucket: enlarge it, leave it out at that resolution, or refuse to start.",
    )
    min_pixels: Int = Field(0, ge=0, description="Images of less width x height are left out.")
    max_pixels: Int | None = Field(None, ge=1, description="Images of more width x height are left out.")
    num_repeats: Float = Field(
        1.0,
        gt=0,
        description="Times each image is shown in an epoch. Of 2.5, half of the images, others in each epoch, are shown "
        "three times.",
    )
    loss_weight: Float = Field(1.0, gt=0, description="Factor of these images' loss.")
    horizontal_flip: Bool = Field(False, description="Show each image flipped at half of its draws.")
    recursive: Bool = Field(False, description="Look into folders in the folder, too.")
    caption_per_line: Bool = Field(
        False, description="Each line of a .txt file is a caption of its own; one of them is drawn at each draw."
    )
    cache_shuffle_num: Int = Field(
        1, ge=1, description="Orders of a caption's tags that are encoded, the written one among them; each draw draws one."
    )
    cache_shuffle_delimiter: str = Field(", ", min_length=1, description="What stands between tags.")
    keep_tokens: Int = Field(0, ge=0, description="Tags at the beginning that stay where they are in every order.")
    on_bad_file: Literal["error", "skip"] = Field(
        "error", description="What an image or caption that cannot be read does: stop the run, or be left out of it."
    )


class DirectoryConfig(ImageConfig):
    """One `[[directory]]` of captioned images. Keys of the dataset file's top level hold here unless they are given."""

    path: Path = Field(
        description="Folder of images with captions; of .tar or .parquet files with them; or one such file. "
        "docs/data.md has every form."
    )
    mask_path: Path | None = Field(
        None,
        description="Folder of grey images of the same names: how much each place counts in the loss, white all, black "
        "nothing. Unset: all of it.",
    )
    control_path: Path | None = Field(
        None, description="Folder of images of the same names that a ControlNet is given; encoded with the images."
    )
    image_column: str | None = Field(
        None, min_length=1, description="Column of .parquet files that has images or their paths. Unset: by usual names."
    )
    caption_column: str | None = Field(
        None, min_length=1, description="Column of .parquet files that has captions. Unset: by usual names."
    )


class DatasetConfig(ImageConfig):
    """The dataset file. Its keys follow diffusion-pipe's."""

    directory: list[DirectoryConfig] = Field(min_length=1, description="Where the images are.")

    @model_validator(mode="after")
    def _hand_down(self) -> DatasetConfig:
        """Each directory with everything that holds for it."""
        given = {name: value for name, value in self if name in self.model_fields_set - {"directory"}}
        directories = [
            entry.model_copy(update={name: given[name] for name in given.keys() - entry.model_fields_set})
            for entry in self.directory
        ]
        if not all(entry.resolutions for entry in directories):
            raise ValueError("resolutions is missing; give it at the top, or in every [[directory]]")
        return self.model_copy(update={"directory": directories})


def experiment_class(family: str) -> type[ExperimentConfig]:
    """ExperimentConfig whose `[model]` is checked by the family's own settings. Raises KeyError for an unknown family."""
    field = (models.settings_class(family), Field(description="The network and its encoders."))
    return create_model("ExperimentConfig", __base__=ExperimentConfig, model=field)
