"""What is checked of an adapter before a run, and what is said of it, with a real model's files."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from models.family import ModuleAdapter
from models.sd3.family import SD3Family
from tests.tiny_model import write_experiment
from utils.config.load import ConfigError
from utils.data.batches import BatchOrder
from utils.distributed.group import World
from utils.run.banner import describe
from utils.run.experiment import Experiment
from utils.run.prepare import prepare
from utils.trainable import lora

ALL = {
    "lora": [".*"],
    "lokr": ["attn", "attn2", "mlp", "adaLN_modulation", "final_layer", "context_embedder"],
}
KINDS: dict[str, dict[str, Any]] = {
    "lora": {"type": "lora"},
    "rslora": {"type": "lora", "rank_stabilized": True},
    "dora": {"type": "lora", "dora": True},
    "lokr": {"type": "lokr"},
}


class Desk:
    """Writes experiments with an [adapter] table and checks them."""

    def __init__(self, folder: Path, model: Path, dataset: Path) -> None:
        self.folder, self._model, self._dataset = folder, model, dataset

    def prepare(self, **adapter: Any) -> Experiment:
        file = write_experiment(self.folder / "experiment", self._model, self._dataset, adapter=adapter)
        return prepare(file, [], None, World(0, 0, 1, 1))

    def prepare_kind(self, kind: str, **adapter: Any) -> Experiment:
        settings = KINDS[kind]
        return self.prepare(**{**settings, "rank": 3, "alpha": 2.0, "targets": ALL[settings["type"]], **adapter})

    def errors(self, **adapter: Any) -> list[str]:
        """Each as "key: message"."""
        with pytest.raises(ConfigError) as caught:
            self.prepare(**adapter)
        return [f"{error.key}: {error.message}" for error in caught.value.errors]

    def saved(self, kind: str, layout: str, **adapter: Any) -> tuple[Experiment, dict[int, nn.Module], Path]:
        """An experiment, its layers as if trained, and the file their adapter was saved to."""
        experiment = self.prepare_kind(kind, **adapter)
        layers = adapted_layers(experiment)
        modules: dict[str, ModuleAdapter] = {}
        for index, layer in layers.items():
            shake(layer, index)
            values = {name: parameter.detach() for name, parameter in layer.named_parameters()}
            modules.update(lora.collect(layer, experiment.family.layers[index].prefix, values))
        network = experiment.family
        tensors = network.native_adapter(modules) if layout == "native" else network.diffusers_adapter(modules)
        path = self.folder / f"{kind}_{layout}.safetensors"
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path)
        return experiment, layers, path


@pytest.fixture
def desk(tmp_path: Path, tiny_model: Path, tiny_dataset: Path) -> Desk:
    return Desk(tmp_path, tiny_model, tiny_dataset)


def adapted_layers(experiment: Experiment) -> dict[int, nn.Module]:
    """As train.py prepares them."""
    layers = {}
    for index, layer in enumerate(experiment.family.layers):
        module = layer.build()
        assert experiment.adapter_plan is not None
        lora.inject(module, layer.prefix, experiment.adapter_plan, seed=0)
        if experiment.adapter_start is not None:
            lora.load_start(module, layer.prefix, experiment.adapter_start)
        layers[index] = module
    return layers


@torch.no_grad()
def shake(module: nn.Module, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for parameter in module.parameters():
        if parameter.requires_grad:
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))


@torch.no_grad()
def output(experiment: Experiment, layers: dict[int, nn.Module]) -> Tensor:
    """Of the network, for the same input always."""
    generator, network = torch.Generator().manual_seed(3), cast(SD3Family, experiment.family)
    tensors: Any = (
        torch.randn(1, 16, 4, 4, generator=generator),
        torch.tensor([700.0]),
        torch.randn(1, network.text_tokens.total, network.config.context_dim, generator=generator),
        torch.randn(1, network.config.pooled_dim, generator=generator),
    )
    for index in sorted(layers):
        tensors = layers[index](tensors)
    return tensors


# --- whole networks ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_a_whole_network_of_fresh_adapters_changes_nothing(desk: Desk, kind: str) -> None:
    experiment = desk.prepare_kind(kind)
    plain = {index: layer.build() for index, layer in enumerate(experiment.family.layers)}
    adapted = adapted_layers(experiment)
    assert torch.equal(output(experiment, adapted), output(experiment, plain))
    injected = [len(lora.collect(layer, "", dict(layer.named_parameters()))) for layer in adapted.values()]
    assert experiment.adapter_plan is not None
    assert sum(injected) == len(experiment.adapter_plan.modules) > 30


@pytest.mark.parametrize(
    ("kind", "layout"), [*((kind, "native") for kind in KINDS), ("lora", "diffusers"), ("dora", "diffusers")]
)
def test_an_adapter_goes_on_from_its_own_file(desk: Desk, kind: str, layout: str) -> None:
    experiment, layers, path = desk.saved(kind, layout)
    again = desk.prepare_kind(kind, init_from=str(path), alpha=7.0)
    result, expected = output(again, adapted_layers(again)), output(experiment, layers)
    plain = {index: layer.build() for index, layer in enumerate(experiment.family.layers)}
    assert (output(experiment, plain) - expected).abs().max() > 0.1
    torch.testing.assert_close(result, expected, rtol=1e-4, atol=1e-4)


# --- what the file is checked for --------------------------------------------------------------------------------------


def test_a_file_that_is_not_there_is_named(desk: Desk) -> None:
    (error,) = desk.errors(type="lora", init_from="/no/such.safetensors")
    assert error.startswith("adapter.init_from: /no/such.safetensors ")


def test_a_file_that_does_not_fit_is_named_with_what_to_do(desk: Desk) -> None:
    *_, path = desk.saved("lora", "native", targets=["attn", "attn2"])
    refused = f"adapter.init_from: {path} "
    attn2 = "joint_blocks.0.x_block.attn2.proj, joint_blocks.0.x_block.attn2.qkv"
    assert desk.errors(type="lora", init_from=str(path)) == [
        f"{refused}has modules that are not trained here: {attn2}; add attn2 to targets"
    ]
    (error,) = desk.errors(type="lora", rank=2, targets=["attn", "attn2"], init_from=str(path))
    assert error.startswith(f"{refused}has a higher rank than is trained here: joint_blocks.0.")
    (error,) = desk.errors(type="lokr", targets=["attn", "attn2"], init_from=str(path))
    assert error.startswith(f"{refused}is a LoRA adapter, of joint_blocks.0.")


def test_wrong_targets_and_a_missing_file_are_said_at_once(desk: Desk) -> None:
    keys = [error.split(": ")[0] for error in desk.errors(type="lora", targets=["no"], init_from="/no/such")]
    assert keys == ["adapter.targets[0]", "adapter.init_from"]


def test_where_an_adapter_starts_is_no_part_of_what_it_is(desk: Desk) -> None:
    """The checkpoint's weights count when going on; the file may have moved."""
    *_, path = desk.saved("lora", "native")
    assert desk.prepare_kind("lora", init_from=str(path)).identity == desk.prepare_kind("lora").identity
    assert desk.prepare_kind("lora", blocks="0").identity != desk.prepare_kind("lora").identity


# --- what is said ------------------------------------------------------------------------------------------------------


def banner(experiment: Experiment) -> str:
    return describe(experiment, BatchOrder(experiment.dataset.examples, experiment.global_batch, 0), "nowhere")


@pytest.mark.parametrize("kind", KINDS)
def test_the_banner_counts_what_is_trained(desk: Desk, kind: str) -> None:
    experiment = desk.prepare_kind(kind, rank=5)
    layers = adapted_layers(experiment)
    count = sum(p.numel() for layer in layers.values() for p in layer.parameters() if p.requires_grad)
    assert experiment.adapter_plan is not None
    assert f"{experiment.adapter_plan.describe()} ({count / 1e6:,.2f} M parameters)" in banner(experiment)
    assert f"{count / 1e6:,.2f} M trained" in banner(experiment)


def test_the_banner_tells_what_a_file_does_not_give(desk: Desk) -> None:
    *_, path = desk.saved("lora", "native", targets=["attn"])
    experiment = desk.prepare(type="lora", targets=["attn", "context_embedder"], init_from=str(path))
    text = banner(experiment)
    assert f" M parameters), starting from {path}\n" in text
    num_modules = len(experiment.adapter_plan.modules) if experiment.adapter_plan is not None else 0
    assert f"note: 1 of the {num_modules} modules are not in {path} and start fresh: context_embedder" in text


def test_the_banner_tells_what_is_left_out_of_a_file(desk: Desk) -> None:
    experiment, layers, path = desk.saved("lora", "native", targets=["attn"])
    modules: dict[str, ModuleAdapter] = {}
    for index, layer in layers.items():
        modules.update(lora.collect(layer, experiment.family.layers[index].prefix, dict(layer.named_parameters())))
    tensors = {name: tensor.detach().contiguous() for name, tensor in experiment.family.native_adapter(modules).items()}
    save_file({**tensors, "lora_te1_text_model_encoder_layers_0_mlp_fc1.lora_down.weight": torch.zeros(2, 4)}, path)
    text = banner(desk.prepare(type="lora", targets=["attn"], init_from=str(path)))
    assert f"note: left out of {path}, as of other networks: lora_te1_text_model_encoder_layers_0_mlp_fc1" in text
