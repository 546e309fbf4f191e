"""Parameter groups, and the names and sizes of trained parameters that are known before any weights are read."""

from __future__ import annotations

import json
from dataclasses import astuple
from typing import Any

import pytest
import torch
from torch import nn

from models.family import ModelFamily
from models.sd3.family import SD3Family
from utils.config.schema.adapter import AdapterConfig
from utils.config.schema.experiment import ExperimentConfig
from utils.config.schema.optimizer import OptimizerConfig
from utils.trainable.base import Trainable, num_trained
from utils.trainable.choose import make_trainable
from utils.trainable.full import FullTraining
from utils.trainable.groups import group_errors, group_identity, group_of, group_schedules, make_groups

BIASES: dict[str, Any] = {"name": "biases", "pattern": r".*\.bias", "weight_decay": 0.0}
BLOCKS: dict[str, Any] = {"name": "blocks", "pattern": r"blocks\..*", "learning_rate": 4e-4, "lr_scheduler": "cosine"}
NAMES = ("embedder.weight", "embedder.bias", "blocks.0.weight", "blocks.0.bias", "final.weight")


def config(*groups: dict[str, Any], **changes: Any) -> OptimizerConfig:
    return OptimizerConfig(**{"learning_rate": 1e-4, "lr_warmup_steps": 5, "groups": list(groups) or None, **changes})


def parameters(*names: str) -> dict[str, nn.Parameter]:
    return {name: nn.Parameter(torch.zeros(1)) for name in names}


def shaped(**shapes: tuple[int, ...]) -> dict[str, nn.Parameter]:
    """Parameters by name; two underscores in a name are a dot."""
    return {name.replace("__", "."): nn.Parameter(torch.zeros(shape)) for name, shape in shapes.items()}


def members(named: dict[str, nn.Parameter], settings: OptimizerConfig) -> dict[str, list[str]]:
    """Group -> names of its parameters."""
    return {group.name: list(group.parameters) for group in make_groups(named, settings)}


# --- membership --------------------------------------------------------------------------------------------------------


def test_without_groups_all_parameters_are_one_default_group() -> None:
    (group,) = make_groups(parameters(*NAMES), config())
    assert (group.name, tuple(group.parameters)) == ("default", NAMES)
    assert group.schedule.peak == 1e-4
    assert group.weight_decay is None


def test_last_matching_pattern_decides_and_the_rest_is_the_default_group() -> None:
    assert members(parameters(*NAMES), config(BIASES, BLOCKS)) == {
        "default": ["embedder.weight", "final.weight"],
        "biases": ["embedder.bias"],
        "blocks": ["blocks.0.weight", "blocks.0.bias"],
    }
    assert members(parameters(*NAMES), config(BLOCKS, BIASES)) == {
        "default": ["embedder.weight", "final.weight"],
        "blocks": ["blocks.0.weight"],
        "biases": ["embedder.bias", "blocks.0.bias"],
    }


def test_patterns_match_whole_names() -> None:
    assert group_of("blocks.0.weight", config({**BLOCKS, "pattern": "blocks"})) == "default"


def test_group_without_parameters_on_a_rank_is_omitted_there() -> None:
    assert members(parameters("blocks.0.bias"), config(BIASES, BLOCKS)) == {"blocks": ["blocks.0.bias"]}
    assert make_groups({}, config(BIASES, BLOCKS)) == []


# --- settings ----------------------------------------------------------------------------------------------------------


def test_keys_that_a_group_does_not_set_are_those_of_the_optimizer() -> None:
    settings = config(BIASES, {**BLOCKS, "lr_warmup_steps": 0, "lr_min_ratio": 0.5})
    schedules = group_schedules(settings)
    assert list(schedules) == ["default", "biases", "blocks"]
    assert schedules["biases"] == schedules["default"] == group_schedules(config())["default"]
    blocks = schedules["blocks"]
    assert (blocks.peak, blocks.course, blocks.warmup_steps, blocks.min_ratio) == (4e-4, "cosine", 0, 0.5)
    assert {group.name: group.weight_decay for group in make_groups(parameters(*NAMES), settings)} == {
        "default": None,
        "biases": 0.0,
        "blocks": None,
    }


def test_a_multiple_of_the_learning_rate_is_a_peak_of_its_own() -> None:
    schedules = group_schedules(config({**BIASES, "lr_mult": 0.5}, BLOCKS, learning_rate=3e-4))
    assert [schedule.peak for schedule in schedules.values()] == [3e-4, 1.5e-4, 4e-4]


def test_every_key_of_the_schedule_can_be_a_group_s_own() -> None:
    own = {"lr_scheduler": "polynomial", "lr_warmup_steps": 0.1, "lr_min_ratio": 0.5, "lr_cycles": 3, "lr_power": 1.5}
    schedules = group_schedules(config({**BIASES, **own, "lr_decay_steps": 7}))
    assert astuple(schedules["biases"]) == (1e-4, "polynomial", 0.1, 0.5, 3, 1.5, 7)
    assert astuple(schedules["default"]) == (1e-4, "constant", 5, 0.0, 1, 2.0, 0.2)


# --- LoRA+ and the weight decay of norms and biases --------------------------------------------------------------------

ADAPTED = {
    "blocks__0__qkv__lora_A__default__weight": (4, 16),
    "blocks__0__qkv__lora_B__default__weight": (48, 4),
    "final__lora_A__default__weight": (4, 16),
    "final__lora_B__default__weight": (8, 4),
    "final__lora_magnitude_vector__default__weight": (1, 8, 1, 1),
}
SHAPES = {"tokens__weight": (11, 6), "blocks__0__weight": (4, 4), "blocks__0__bias": (4,), "blocks__0__ln__weight": (4,)}


def test_loraplus_gives_the_up_matrices_of_each_group_a_multiple_of_its_rate() -> None:
    settings = config(BLOCKS, loraplus_lr_ratio=16.0)
    groups = {group.name: group for group in make_groups(shaped(**ADAPTED), settings)}
    assert {name: [one.split(".")[-3] for one in group.parameters] for name, group in groups.items()} == {
        "default": ["lora_A", "lora_magnitude_vector"],
        "default.up": ["lora_B"],
        "blocks": ["lora_A"],
        "blocks.up": ["lora_B"],
    }
    assert [group.schedule.peak for group in groups.values()] == [1e-4, 16e-4, 4e-4, 64e-4]
    assert groups["blocks.up"].schedule.course == "cosine"


def test_norms_and_biases_without_weight_decay_are_groups_of_their_own() -> None:
    settings = config({**BLOCKS, "weight_decay": 0.3}, decay_norms_and_biases=False)
    groups = make_groups(shaped(**SHAPES, bias=(4,)), settings)
    assert [(group.name, list(group.parameters), group.weight_decay) for group in groups] == [
        ("default", ["tokens.weight"], None),
        ("default.no_decay", ["bias"], 0.0),
        ("blocks", ["blocks.0.weight"], 0.3),
        ("blocks.no_decay", ["blocks.0.bias", "blocks.0.ln.weight"], 0.0),
    ]
    assert groups[2].schedule == groups[3].schedule


def test_both_divisions_go_together_and_lora_matrices_keep_their_decay() -> None:
    settings = config(loraplus_lr_ratio=4.0, decay_norms_and_biases=False)
    groups = make_groups(shaped(**ADAPTED), settings)
    found = {group.name: (len(group.parameters), group.weight_decay) for group in groups}
    assert found == {"default": (2, None), "default.no_decay": (1, 0.0), "default.up": (2, None)}


def test_the_released_network_has_norms_and_biases_without_decay(family: ModelFamily) -> None:
    """Scales of RMS norms and all biases; no matrix, no convolution."""
    settings = ExperimentConfig.model_construct(adapter=None, optimizer=config(decay_norms_and_biases=False), seed=0)
    trainable, _ = make_trainable(settings, family)
    named = {
        layer.prefix + name: nn.Parameter(torch.empty(shape, device="meta"))
        for layer in family.layers
        for name, shape in layer.shapes.items()
    }
    plain, undecayed = trainable.groups(named)
    assert all(name.endswith((".bias", "ln_q.weight", "ln_k.weight")) for name in undecayed.parameters)
    assert not any(name.endswith((".bias", "ln_q.weight", "ln_k.weight")) for name in plain.parameters)
    assert len(plain.parameters) + len(undecayed.parameters) == len(named)


@pytest.mark.parametrize(
    ("adapter", "text"), [(None, "the whole network is trained"), ({"type": "lokr"}, "a lokr has no up matrices")]
)
def test_loraplus_needs_a_lora(family: ModelFamily, adapter: dict[str, Any] | None, text: str) -> None:
    settings = ExperimentConfig.model_construct(
        adapter=None if adapter is None else AdapterConfig(**adapter), optimizer=config(loraplus_lr_ratio=8.0), seed=0
    )
    ((key, message),) = make_trainable(settings, family)[1]
    assert key == "optimizer.loraplus_lr_ratio"
    assert message == f'= 8.0: is for adapter.type = "lora" only, and {text}; remove the key'


def test_loraplus_is_another_training_and_the_weight_decay_is_not() -> None:
    assert group_identity(config(loraplus_lr_ratio=4.0)) == group_identity(config(loraplus_lr_ratio=8.0))
    assert group_identity(config(loraplus_lr_ratio=4.0)) != group_identity(config())
    assert group_identity(config(decay_norms_and_biases=False)) == {}


def test_identity_has_names_and_patterns_only_if_there_are_groups() -> None:
    """An entry without groups would refuse every checkpoint of versions that had none."""
    assert group_identity(config()) == {}
    identity = group_identity(config(BIASES, BLOCKS))
    assert identity == {"optimizer.groups": [["biases", r".*\.bias"], ["blocks", r"blocks\..*"]]}
    assert json.loads(json.dumps(identity)) == identity
    assert group_identity(config({**BIASES, "weight_decay": 0.5}, {**BLOCKS, "learning_rate": 1.0})) == identity


# --- errors ------------------------------------------------------------------------------------------------------------


def test_pattern_without_match_is_an_error_with_names() -> None:
    assert group_errors(NAMES, config(BIASES, BLOCKS)) == []
    assert group_errors(NAMES, config(BIASES, {**BLOCKS, "pattern": "block"})) == [
        (
            "optimizer.groups[1].pattern",
            "= 'block': matches no trained parameter; it must match whole names, such as embedder.weight, embedder.bias, "
            "blocks.0.weight and 2 more",
        )
    ]


def test_group_whose_parameters_all_belong_to_later_groups_is_an_error() -> None:
    first = {**BIASES, "pattern": r"blocks\.0\.bias"}
    ((key, text),) = group_errors(NAMES, config(first, BLOCKS))
    assert key == "optimizer.groups[0].pattern"
    assert "belong to later groups: blocks.0.bias; move this group after them" in text
    assert group_errors(NAMES, config(BLOCKS, first)) == []


# --- names before any weights are read ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def family() -> ModelFamily:
    return SD3Family.from_variant("SD3.5-medium")


def trainable_of(family: ModelFamily, adapter: dict[str, Any] | None, *groups: dict[str, Any]) -> Trainable:
    settings = ExperimentConfig.model_construct(
        adapter=None if adapter is None else AdapterConfig(**adapter), optimizer=config(*groups), seed=0
    )
    trainable, errors = make_trainable(settings, family)
    assert errors == []
    return trainable


KINDS: dict[str, dict[str, Any] | None] = {
    "full": None,
    "lora": {"type": "lora", "rank": 4, "targets": ["attn", "embedders"]},
    "dora": {"type": "lora", "rank": 4, "dora": True, "targets": ["mlp", "embedders"]},
    "lokr": {"type": "lokr", "rank": 2, "targets": ["attn", "final_layer"]},
}


@pytest.mark.parametrize("kind", KINDS)
def test_parameter_sizes_are_those_of_the_prepared_layers(family: ModelFamily, kind: str) -> None:
    """The first layer, which has a convolution, and a block; on the meta device, so without weights."""
    trainable = trainable_of(family, KINDS[kind])
    for layer in family.layers[:2]:
        module = layer.build().to_empty(device="cpu")
        trainable.prepare(layer, module)
        trained = {
            layer.prefix + name: parameter.numel()
            for name, parameter in module.named_parameters()
            if parameter.requires_grad
        }
        assert trainable.parameter_sizes(layer) == trained
        assert num_trained(trainable, [layer]) == sum(trained.values())


def test_patterns_of_groups_see_the_names_of_adapter_tensors(family: ModelFamily) -> None:
    """Such as a higher learning rate for `up` (LoRA+)."""
    up = {"name": "up", "pattern": r".*\.lora_B\.default\.weight", "learning_rate": 1e-3}
    trainable = trainable_of(family, KINDS["lora"], up)
    named = parameters(*(name for layer in family.layers[:3] for name in trainable.parameter_sizes(layer)))
    sizes = {group.name: len(group.parameters) for group in trainable.groups(named)}
    assert sizes == {"default": len(named) // 2, "up": len(named) // 2}
    weights = ExperimentConfig.model_construct(
        adapter=AdapterConfig(type="lora"), optimizer=config({**BIASES, "pattern": r".*\.qkv\.weight"}), seed=0
    )
    ((key, _),) = make_trainable(weights, family)[1]
    assert key == "optimizer.groups[0].pattern"


def test_identity_of_runs_without_groups_is_that_of_earlier_versions(family: ModelFamily) -> None:
    assert FullTraining(family, config()).identity() == {"adapter": "none"}
    adapter = trainable_of(family, KINDS["lora"]).identity()
    assert list(adapter) == ["adapter"]
    assert "init_from" not in adapter["adapter"]
    assert adapter["adapter"]["targets"] == ["attn", "embedders"]
