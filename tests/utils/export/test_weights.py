"""Which files are written, and what is refused before a run because no file could carry it."""

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
from utils.export.metadata import training_config
from utils.export.weights import Exported, _rounded, wanted_formats
from utils.run.experiment import Experiment
from utils.run.prepare import prepare


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
def test_formats_follow_what_is_trained_unless_given(
    tmp_path: Path, tiny_model: Path, tiny_dataset: Path, changes: dict[str, Any], formats: list[str]
) -> None:
    experiment = opened(tmp_path, tiny_model, tiny_dataset, **changes)
    assert wanted_formats(experiment.config.experiment) == formats


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"adapter": {"type": "lokr"}, "save.formats": ["native", "diffusers"]}, "diffusers' pipelines read no LoKr"),
        ({"adapter": {"type": "lora"}, "save.formats": ["complete"]}, "complete files hold a whole network"),
        ({"save.formats": ["native", "native"]}, "each format once"),
    ],
)
def test_what_a_format_cannot_carry_is_refused(
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
def test_a_complete_file_is_refused_where_it_could_not_say_how_a_part_is_built(
    tmp_path: Path, tiny_model: Path, tiny_dataset: Path, folder: str, key: str, value: object, message: str
) -> None:
    model = linked_copy(tiny_model, tmp_path / "model")
    config = model / folder / "config.json"
    rewrite(config, json.dumps({**json.loads(config.read_text()), key: value}))
    with pytest.raises(ConfigError, match=message):
        opened(tmp_path / "complete", model, tiny_dataset, **{"save.formats": ["complete"]})
    assert opened(tmp_path / "native", model, tiny_dataset).family is not None, "it trains all the same"


def test_heads_of_another_width_are_refused_for_a_complete_file(tmp_path: Path, tiny_dataset: Path) -> None:
    """The quickstart's encoders are 32 wide."""
    from examples.quickstart.make_model import write_model

    (tmp_path / "model").mkdir()
    write_model(tmp_path / "model")
    with pytest.raises(ConfigError, match="width 32, which is not a multiple of the head width, 64; a single file cannot"):
        opened(tmp_path, tmp_path / "model", tiny_dataset, **{"save.formats": ["complete"]})


def test_a_number_too_large_for_the_file_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    written = dict(_rounded(iter([Exported("x", torch.tensor([1.0, 1e6])), Exported("y", torch.ones(2))]), torch.float16))
    assert written["x"].dtype == torch.float16
    error = capsys.readouterr().err
    assert "x has numbers that are not finite" in error
    assert "file y" not in error


def test_a_tokenizer_s_folder_is_not_told_in_headers(tmp_path: Path, tiny_model: Path, tiny_dataset: Path) -> None:
    folder = str(tiny_model / "tokenizer")
    experiment = opened(tmp_path, tiny_model, tiny_dataset, **{"model.clip_l_tokenizer": folder}).config.experiment
    assert str(tiny_model) not in json.dumps(training_config(experiment))
