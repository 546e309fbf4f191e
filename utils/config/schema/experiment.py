"""The experiment file: its top-level keys and all its tables."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from utils.config.schema.adapter import AdapterConfig
from utils.config.schema.base import Bool, Int, Table
from utils.config.schema.evaluation import EvalConfig
from utils.config.schema.monitoring import MonitoringConfig
from utils.config.schema.objective import ObjectiveConfig
from utils.config.schema.optimizer import EmaConfig, OptimizerConfig
from utils.config.schema.pipeline import PipelineConfig
from utils.config.schema.sampling import SamplingConfig
from utils.config.schema.saving import SaveConfig


class ExperimentConfig(Table):
    """The settings of one run. The model family defines the fields of `[model]`; see `experiment_class`."""

    output_dir: Path = Field(description="Folder of all runs of this experiment. Each run creates its own folder in it.")
    dataset: Path = Field(description="Dataset file of the training set.")
    cache_dir: Path | None = Field(
        None,
        description="Folder of encoded latents and text embeddings; several runs may share it. Default: `cache` in "
        "`output_dir`.",
    )
    cache_posterior: Bool = Field(
        False,
        description="Cache the mean and std of each latent pixel, and sample the latents anew at each draw of an image. "
        "Needs twice the disk space for latents. `false`: cache and use the mean.",
    )
    text_cache_dtype: Literal["bfloat16", "float8_e4m3fn"] | None = Field(
        None,
        description="Precision of cached text embeddings. `float8_e4m3fn` has one scale per token and needs half the disk "
        "space of bfloat16 (docs/data.md has its error). Unset: the precision of the encoders' output.",
    )
    seed: Int = Field(0, ge=0, lt=2**63, description="Seed of all random draws of the run.")
    epochs: Int | None = Field(
        None, ge=1, description="Number of passes over the dataset. At least one of `epochs` and `max_steps` is required."
    )
    max_steps: Int | None = Field(
        None, ge=1, description="Number of optimizer steps. With `epochs` also set, the run ends at whichever comes first."
    )
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
        """The folder of encoded data: `cache_dir` or its default."""
        return self.cache_dir if self.cache_dir is not None else self.output_dir / "cache"
