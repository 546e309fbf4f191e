"""The formats of exports: defaults, errors before a run, rounding, and settings in headers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.model_copies import linked_copy, rewrite
from tests.tiny_model import write_experiment
from utils.config.load import ConfigError
from utils.distributed.world import World
from utils.export.formats import rounded
from utils.export.metadata import training_config
from utils.export.weights import export_formats
from utils.run.experiment import Experiment
from utils.run.prepare import prepare
from utils.trainable.base import ExportTensor


def opened(folder: Path, model: Path, dataset: Path, **changes: Any) -> Experiment:
    return prepare(write_experiment(folder, model, dataset, **changes), [], None, World(0, 0, 1, 1))


@pytest.mark.parametrize(
    ("changes", "formats"),
    [
        ({}, ["native"]),
        ({"adapter": {"type": "lora"}}, ["native", "diffusers"]),
        ({"adapter": {"type": "lora", "dora": True}}, ["native", "diffusers"]),
        ({"adapter": {"type": "lokr"}}, ["native"]),
        ({"save.formats": ["diffusers", "complete"]}, ["diffusers", "complete"]),
    ],
)
def test_default_formats_depend_on_what_is_trained(
    tmp_path: Path, tiny_model: Path, tiny_dataset: Path, changes: dict[str, Any], formats: list[str]
) -> None:
    experiment = opened(tmp_path, tiny_model, tiny_dataset, **changes)
    assert export_formats(experiment.config.experiment, experiment.trainable) == formats


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"adapter": {"type": "lokr"}, "save.formats": ["native", "diffusers"]}, "diffusers cannot load a LoKr"),
        ({"adapter": {"type": "lora"}, "save.formats": ["complete"]}, "a complete file holds a whole network"),
        ({"save.formats": ["native", "native"]}, "must not name a format twice"),
    ],
)
def test_formats_that_cannot_hold_what_is_trained_are_errors(
    tmp_path: Path, tiny_model: Path, tiny_dataset: Path, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        opened(tmp_path, tiny_model, tiny_dataset, **changes)
    assert [error.key for error in caught.value.errors] == ["save.formats"]


@pytest.mark.parametrize(
    ("folder", "key", "value", "message"),
    [
        ("vae", "norm_num_groups", 16, "norm_num_groups 16; a single file always implies 32"),
        ("vae", "scaling_factor", 0.18, "scaling_factor 0.18; a single file always implies 1.5305"),
        ("text_encoder_2", "num_attention_heads", 4, "num_attention_heads 4; a single file always implies 2"),
        ("text_encoder", "hidden_act", "gelu", "hidden_act gelu; a single file always implies quick_gelu"),
    ],
)
def test_complete_file_is_an_error_where_it_cannot_express_the_architecture(
    tmp_path: Path, tiny_model: Path, tiny_dataset: Path, folder: str, key: str, value: object, message: str
) -> None:
    model = linked_copy(tiny_model, tmp_path / "model")
    config = model / folder / "config.json"
    rewrite(config, json.dumps({**json.loads(config.read_text()), key: value}))
    with pytest.raises(ConfigError, match=message):
        opened(tmp_path / "complete", model, tiny_dataset, **{"save.formats": ["complete"]})
    assert opened(tmp_path / "native", model, tiny_dataset).family is not None, "other formats are possible"


def test_other_head_widths_are_an_error_for_a_complete_file(tmp_path: Path, tiny_dataset: Path) -> None:
    """The quickstart's encoders are 32 wide."""
    from examples.quickstart.make_model import write_model

    (tmp_path / "model").mkdir()
    write_model(tmp_path / "model")
    with pytest.raises(ConfigError, match="width 32, which is not a multiple of the head width, 64; a single file cannot"):
        opened(tmp_path, tmp_path / "model", tiny_dataset, **{"save.formats": ["complete"]})


def test_overflow_in_an_exported_file_is_warned_about(capsys: pytest.CaptureFixture[str]) -> None:
    written = dict(
        rounded(iter([ExportTensor("x", torch.tensor([1.0, 1e6])), ExportTensor("y", torch.ones(2))]), torch.float16)
    )
    assert written["x"].dtype == torch.float16
    error = capsys.readouterr().err
    assert "tensor x has non-finite values" in error
    assert "tensor y" not in error


def test_headers_do_not_contain_the_folder_of_a_tokenizer(tmp_path: Path, tiny_model: Path, tiny_dataset: Path) -> None:
    folder = str(tiny_model / "tokenizer")
    experiment = opened(tmp_path, tiny_model, tiny_dataset, **{"model.clip_l_tokenizer": folder}).config.experiment
    assert str(tiny_model) not in json.dumps(training_config(experiment))
