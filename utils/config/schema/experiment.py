"""The experiment file."""

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
