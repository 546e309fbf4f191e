"""The checked configuration of a run with all that was made from it: model family, datasets, trainable, stages."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from models.family import ModelFamily
from utils.checkpoint.manifest import SavedState
from utils.config.load import Config
from utils.config.schema.optimizer import MasterKind
from utils.data.batches import BatchOrder
from utils.data.dataset import Dataset
from utils.data.encoding.plan import CacheSettings
from utils.data.examples import ExampleTable
from utils.files.file_index import StoredHashes
from utils.pipeline.partition import Partition
from utils.pipeline.recompute import Recompute
from utils.pipeline.stage import StagePlan
from utils.previews.prompt_list import Prompt
from utils.trainable.base import Trainable


@dataclass(frozen=True)
class Experiment:
    """A valid configuration with everything that was read and derived from it."""

    config: Config
    family: ModelFamily
    dataset: Dataset
    eval_sets: dict[str, ExampleTable]
    """Name -> held-out examples. Empty tables on every rank but 0 until the cache is filled, as is `dataset`."""
    stored_hashes: list[StoredHashes]
    """The stores of content hashes of the dataset's files."""
    prompts: list[Prompt]
    num_stages: int
    num_replicas: int
    global_batch: int
    bucket_group: int
    """Images of one bucket that are together in a global batch."""
    partition: Partition
    """The layers of each stage. On every rank but 0, any stages until `agree`."""
    trainable: Trainable
    """What is trained."""
    master: MasterKind
    """How float32 weights are kept beside bfloat16 weights."""
    resume_run: Path | None
    """The run folder to resume in; None for a new one."""
    resume_from: SavedState | None
    """The checkpoint to resume from; None to begin at step 0."""
    changed_keys: list[str]
    """One line for each key that differs from the configuration with which `resume_run` was last started."""
    identity: dict[str, Any]
    """What a run must share with a checkpoint to resume from it."""

    @property
    def cache_settings(self) -> CacheSettings:
        config = self.config.experiment
        return CacheSettings(config.cache_folder, config.cache_posterior, config.text_cache_dtype)

    @property
    def stage_plan(self) -> StagePlan:
        """The layers of each stage, and which of their activations are recomputed."""
        family = self.family
        recompute = Recompute.from_key(self.config.experiment.pipeline.recompute, family.num_blocks)
        return StagePlan(family.layers, family.input_names, family.stream_width, self.partition.bounds, recompute)

    @property
    def start_step(self) -> int:
        """Optimizer steps already done."""
        return self.resume_from.step if self.resume_from is not None else 0

    def batch_order(self) -> BatchOrder:
        """A new order of the training examples; each user that advances it independently needs its own."""
        return BatchOrder(self.dataset.examples, self.global_batch, self.config.experiment.seed, self.bucket_group)

    def num_steps(self, order: BatchOrder) -> int:
        """Optimizer steps of the whole run."""
        experiment = self.config.experiment
        limits = [experiment.max_steps, experiment.epochs and experiment.epochs * order.steps_per_epoch]
        return min(limit for limit in limits if limit is not None)
