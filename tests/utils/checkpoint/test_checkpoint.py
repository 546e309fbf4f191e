"""Finding checkpoints and comparing identities. Saving and loading: tests/distributed/test_resume.py."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from models.family import PipelineLayer
from tests.distributed.toy_network import no_cost
from utils.checkpoint.manifest import (
    BUCKET_GROUP,
    MASTER_KIND,
    NETWORK_FILES,
    CheckpointError,
    SavedState,
    find_checkpoints,
    identity_errors,
    step_folder,
)
from utils.checkpoint.save import save
from utils.pipeline.stage import LocalLayer

IDENTITY: dict[str, Any] = {"seed": 7, "global batch": 4, BUCKET_GROUP: 2, MASTER_KIND: "float32", "adapter": "none"}


def make_checkpoint(parent: Path, step: int, identity: dict[str, Any] = IDENTITY) -> Path:
    folder = step_folder(parent, step)
    folder.mkdir(parents=True)
    (folder / "state.json").write_text(json.dumps({"format": 2, "step": step, "identity": identity}))
    return folder


def test_checkpoints_are_found_in_the_order_of_their_steps(tmp_path: Path) -> None:
    for step in (20, 100, 3, 1_234_567):
        make_checkpoint(tmp_path, step)
    found = find_checkpoints(tmp_path)
    assert [saved.step for saved in found] == [3, 20, 100, 1_234_567]
    assert found[0] == SavedState(tmp_path / "step_000003", 3, IDENTITY)


def test_partial_and_foreign_folders_are_not_checkpoints(tmp_path: Path) -> None:
    make_checkpoint(tmp_path, 10)
    (tmp_path / "step_000020").mkdir()
    make_checkpoint(tmp_path, 30).rename(tmp_path / ".step_000030.tmp")
    make_checkpoint(tmp_path, 40).rename(tmp_path / "step_000040_copy")
    (tmp_path / "step_000050").write_text("a file")
    assert [saved.step for saved in find_checkpoints(tmp_path)] == [10]


def test_missing_folder_has_no_checkpoints(tmp_path: Path) -> None:
    assert find_checkpoints(tmp_path / "none") == []


def test_every_difference_of_identity_is_reported_with_both_values(tmp_path: Path) -> None:
    make_checkpoint(tmp_path, 10)
    (saved,) = find_checkpoints(tmp_path)
    assert identity_errors(saved, IDENTITY) == []
    errors = identity_errors(saved, {**IDENTITY, "seed": 8, "adapter": {"rank": 4}})
    assert len(errors) == 2
    assert errors[0].startswith(f"seed was 7 in {saved.folder} and is 8 now")
    assert "adapter was 'none'" in errors[1]


def test_checkpoint_of_an_earlier_version_kept_float32_weights(tmp_path: Path) -> None:
    make_checkpoint(tmp_path, 10, {key: value for key, value in IDENTITY.items() if key != MASTER_KIND})
    (saved,) = find_checkpoints(tmp_path)
    assert saved.identity == IDENTITY


def test_checkpoint_of_an_earlier_version_has_one_bucket_per_global_batch(tmp_path: Path) -> None:
    make_checkpoint(tmp_path, 10, {key: value for key, value in IDENTITY.items() if key != BUCKET_GROUP})
    (saved,) = find_checkpoints(tmp_path)
    assert saved.identity == {**IDENTITY, BUCKET_GROUP: 4}
    (error,) = identity_errors(saved, IDENTITY)
    assert error.startswith(f"pipeline.bucket_group was 4 in {saved.folder} and is 2 now")


def test_entry_of_one_identity_only_is_a_difference(tmp_path: Path) -> None:
    """Parameter groups, say: a checkpoint with them is not resumed without them, nor the reverse."""
    groups = {"optimizer.groups": [["biases", ".*bias"]]}
    shown = "[['biases', '.*bias']]"
    (removed,) = identity_errors(SavedState(tmp_path, 1, {**IDENTITY, **groups}), IDENTITY)
    (added,) = identity_errors(SavedState(tmp_path, 1, IDENTITY), {**IDENTITY, **groups})
    assert removed.startswith(f"optimizer.groups was {shown} in {tmp_path} and is not set now")
    assert added.startswith(f"optimizer.groups was not set in {tmp_path} and is {shown} now")


@pytest.mark.parametrize("text", ["{ half a", "[]", "{}", '{"format": 99, "step": 1, "identity": {}}'])
def test_damaged_checkpoint_is_an_error_with_its_folder(tmp_path: Path, text: str) -> None:
    folder = make_checkpoint(tmp_path, 10)
    (folder / "state.json").write_text(text)
    with pytest.raises(CheckpointError, match="step_000010"):
        find_checkpoints(tmp_path)


def test_different_network_file_is_reported_without_its_hash(tmp_path: Path) -> None:
    saved = SavedState(tmp_path, 1, {**IDENTITY, NETWORK_FILES: ["0123"]})
    (text,) = identity_errors(saved, {**IDENTITY, NETWORK_FILES: ["4567"]})
    assert text.startswith("the weights file of the network is not the one")
    assert "4567" not in text


class OneParameter:
    """A pipeline with one layer of one parameter, whose weights are given."""

    def __init__(self, weight: float) -> None:
        self.replica = 0
        self._layer = nn.Linear(1, 1, bias=False)
        self._weight = weight

    def local_layers(self) -> list[LocalLayer]:
        return [LocalLayer(0, PipelineLayer("one", "one.", no_cost, {}, nn.Identity), self._layer)]

    def read_state(self, parameter: nn.Parameter) -> dict[str, torch.Tensor]:
        return {"master": torch.full_like(parameter, self._weight)}


@pytest.mark.parametrize("weight", [float("nan"), float("inf")])
def test_non_finite_weights_are_never_saved(tmp_path: Path, monkeypatch: Any, weight: float) -> None:
    monkeypatch.setattr("utils.checkpoint.save.group.wait_for_all", lambda name: None)
    save(OneParameter(1.0), tmp_path, 1, IDENTITY, keep_last=1)  # type: ignore[arg-type]
    with pytest.raises(FloatingPointError, match=r"one\.weight"):
        save(OneParameter(weight), tmp_path, 2, IDENTITY, keep_last=1)  # type: ignore[arg-type]
    assert [saved.step for saved in find_checkpoints(tmp_path)] == [1]


def test_state_of_events_is_saved_and_absent_in_older_checkpoints(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr("utils.checkpoint.save.group.wait_for_all", lambda name: None)
    save(OneParameter(1.0), tmp_path, 1, IDENTITY, keep_last=2, events={"log": {"minutes": 1.5}})  # type: ignore[arg-type]
    make_checkpoint(tmp_path, 2)
    assert [saved.events for saved in find_checkpoints(tmp_path)] == [{"log": {"minutes": 1.5}}, {}]
