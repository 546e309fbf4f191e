"""The stages of a run: its configuration, the sizes of its images, and the lines of the banner."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.tiny_model import write_experiment
from utils.config.load import ConfigError
from utils.data.batches import BatchOrder
from utils.distributed.world import World
from utils.run.banner import summary
from utils.run.experiment import Experiment
from utils.run.partition import _draws, _typical_shape
from utils.run.prepare import prepare

LAST_BLOCK = {"type": "lora", "rank": 3, "targets": [r"joint_blocks\.2\..*qkv"]}
KINDS = "must be 'cost', 'measured', 'uniform', or a list with the number of blocks of each stage"


class Stages:
    """Prepares the tiny model, which has three blocks, for a number of stages."""

    def __init__(self, folder: Path, model: Path, dataset: Path) -> None:
        self._folder, self._model, self._dataset = folder, model, dataset

    def prepare(self, num_stages: int, rank: int = 0, **changes: Any) -> Experiment:
        settings = {"pipeline.pipeline_stages": num_stages, **changes}
        file = write_experiment(self._folder, self._model, self._dataset, **settings)
        return prepare(file, [], None, World(rank, rank, num_stages, num_stages))

    def errors(self, num_stages: int, **changes: Any) -> list[str]:
        with pytest.raises(ConfigError) as caught:
            self.prepare(num_stages, **changes)
        return [f"{error.key}: {error.message}" for error in caught.value.errors]


@pytest.fixture
def stages(tmp_path: Path, tiny_model: Path, tiny_dataset: Path) -> Stages:
    return Stages(tmp_path / "experiment", tiny_model, tiny_dataset)


def rows_of(experiment: Experiment) -> dict[str, str]:
    order = BatchOrder(experiment.dataset.examples, experiment.global_batch, 0)
    return dict(summary(experiment, order))


def test_a_list_and_uniform_count_blocks(stages: Stages) -> None:
    assert stages.prepare(2, **{"pipeline.partition": [2, 1]}).partition.bounds == [0, 3, 5]
    assert stages.prepare(2, **{"pipeline.partition": "uniform"}).partition.bounds == [0, 2, 5]
    assert stages.prepare(1, **{"pipeline.partition": "uniform"}).partition.bounds == [0, 5]
    assert stages.prepare(3, **{"pipeline.partition": [1, 1, 1]}).partition.bounds == [0, 2, 3, 5]


def test_costs_follow_what_is_trained_and_recomputed(stages: Stages) -> None:
    full = stages.prepare(2).partition
    assert full.bounds == [0, 2, 5], "the first block has a second attention, and the last updates no text"
    frozen = stages.prepare(2, adapter=LAST_BLOCK).partition
    assert frozen.bounds == [0, 2, 5]
    assert frozen.costs[0] < full.costs[0] / 2.5, "a stage without trained weights runs forward only"
    assert stages.prepare(2, **{"pipeline.recompute": "all"}).partition.costs[0] > full.costs[0]


def test_the_banner_shows_how_the_stages_were_chosen_and_their_costs(stages: Stages) -> None:
    rows = rows_of(stages.prepare(2))
    assert rows["partition"] == "by estimated cost, mean over 3 buckets: [1, 2] blocks"
    stage_rows = [rows[f"stage {stage} of 2"] for stage in (1, 2)]
    shares = [float(row.partition("% of the cost")[0].rpartition(", ")[2]) for row in stage_rows]
    assert sum(shares) == pytest.approx(100, abs=0.11)
    assert all(40 < share < 60 for share in shares)
    assert rows_of(stages.prepare(2, **{"pipeline.partition": [2, 1]}))["partition"] == "as configured: [2, 1] blocks"
    assert rows_of(stages.prepare(2, **{"pipeline.partition": "uniform"}))["partition"] == "uniform: [1, 2] blocks"
    measured = rows_of(stages.prepare(2, **{"pipeline.partition": "measured"}))["partition"]
    assert measured == "by estimated cost; measured when training starts: [1, 2] blocks"
    alone = rows_of(stages.prepare(1))
    assert "partition" not in alone
    assert "of the cost" not in alone["stage 1 of 1"]


def test_ranks_without_the_dataset_have_stages_until_they_are_sent_those_of_rank_0(stages: Stages) -> None:
    assert len(stages.prepare(3, rank=1).partition.bounds) == 4


def test_shapes_count_as_often_as_their_images_are_drawn(stages: Stages) -> None:
    experiment = stages.prepare(2, **{"pipeline.micro_batch_size_per_gpu": 2})
    counts = experiment.dataset.bucket_counts()
    draws = _draws(experiment.family, experiment.dataset.examples, 2)
    expected = {experiment.family.sample_shape(2, bucket.height // 8, bucket.width // 8): n for bucket, n in counts.items()}
    assert draws == expected
    assert _typical_shape(experiment) in draws


@pytest.mark.parametrize(
    ("partition", "num_stages", "error"),
    [
        ("costs", 2, f"= 'costs': {KINDS}"),
        ([1, "2"], 2, f"= [1, '2']: {KINDS}"),
        ([1, True], 2, f"= [1, True]: {KINDS}"),
        (2, 2, f"= 2: {KINDS}"),
        ([], 2, "= []: has 0 entries for 2 stages; use one number of blocks for each stage, such as [1, 2]"),
        ([3], 2, "= [3]: has 1 entries for 2 stages; use one number of blocks for each stage, such as [1, 2]"),
        ([2, 2], 2, "= [2, 2]: adds up to 4 blocks, but the network has 3; use [1, 2]"),
        ([0, 3], 2, "= [0, 3]: stage 1 must have at least one block; use [1, 2]"),
        ("uniform", 4, "= 'uniform': 4 stages cannot have a block each: the network has 3 blocks"),
    ],
)
def test_wrong_partitions_are_one_error_each(stages: Stages, partition: Any, num_stages: int, error: str) -> None:
    changes = {"pipeline.partition": partition, "optimizer.learning_rate": 1e-3}
    assert stages.errors(num_stages, **changes) == [f"pipeline.partition: {error}"]


def test_errors_of_the_partition_are_reported_with_all_others(stages: Stages) -> None:
    found = stages.errors(2, **{"pipeline.partition": [2, 2], "pipeline.recompute": 4, "optimizer.type": "AdamX"})
    assert {error.partition(":")[0] for error in found} == {"pipeline.partition", "pipeline.recompute", "optimizer.type"}
    (error,) = stages.errors(6)
    assert error == "pipeline.pipeline_stages: = 6: 5 layers cannot be divided into 6 stages"
