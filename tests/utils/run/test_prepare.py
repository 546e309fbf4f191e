"""Checks of an [adapter] table and its lines in the start banner, with the files of the tiny model."""

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
from utils.distributed.world import World
from utils.run.banner import describe
from utils.run.experiment import Experiment
from utils.run.prepare import prepare
from utils.trainable.lora import LoraTraining
from utils.trainable.peft_layers import collect

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


class AdapterChecks:
    """Writes and prepares experiments with an [adapter] table."""

    def __init__(self, folder: Path, model: Path, dataset: Path) -> None:
        self.folder, self._model, self._dataset = folder, model, dataset

    def prepare(self, **adapter: Any) -> Experiment:
        file = write_experiment(self.folder / "experiment", self._model, self._dataset, adapter=adapter)
        return prepare(file, [], None, World(0, 0, 1, 1))

    def prepare_kind(self, kind: str, **adapter: Any) -> Experiment:
        settings = KINDS[kind]
        return self.prepare(**{**settings, "rank": 3, "alpha": 2.0, "targets": ALL[settings["type"]], **adapter})

    def errors(self, **adapter: Any) -> list[str]:
        """The errors of an [adapter] table as "key: message"."""
        with pytest.raises(ConfigError) as caught:
            self.prepare(**adapter)
        return [f"{error.key}: {error.message}" for error in caught.value.errors]

    def saved(self, kind: str, layout: str, **adapter: Any) -> tuple[Experiment, dict[int, nn.Module], Path]:
        """An experiment, its layers with perturbed adapter weights, and the file with these weights."""
        experiment = self.prepare_kind(kind, **adapter)
        layers = adapted_layers(experiment)
        modules: dict[str, ModuleAdapter] = {}
        for index, layer in layers.items():
            perturb(layer, index)
            values = {name: parameter.detach() for name, parameter in layer.named_parameters()}
            modules.update(collect(layer, experiment.family.layers[index].prefix, values))
        network = experiment.family
        tensors = network.native_adapter(modules) if layout == "native" else network.diffusers_adapter(modules)
        path = self.folder / f"{kind}_{layout}.safetensors"
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path)
        return experiment, layers, path


@pytest.fixture
def checks(tmp_path: Path, tiny_model: Path, tiny_dataset: Path) -> AdapterChecks:
    return AdapterChecks(tmp_path, tiny_model, tiny_dataset)


def adapter_of(experiment: Experiment) -> LoraTraining:
    assert isinstance(experiment.trainable, LoraTraining)
    return experiment.trainable


def adapted_layers(experiment: Experiment) -> dict[int, nn.Module]:
    """The layers as the pipeline prepares them, by index."""
    layers = {}
    for index, layer in enumerate(experiment.family.layers):
        module = layer.build()
        experiment.trainable.prepare(layer, module)
        layers[index] = module
    return layers


@torch.no_grad()
def perturb(module: nn.Module, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for parameter in module.parameters():
        if parameter.requires_grad:
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))


@torch.no_grad()
def output(experiment: Experiment, layers: dict[int, nn.Module]) -> Tensor:
    """The output of the network for a fixed input."""
    generator, network = torch.Generator().manual_seed(3), cast(SD3Family, experiment.family)
    tensors = (
        torch.randn(1, 16, 4, 4, generator=generator),
        torch.tensor([700.0]),
        torch.randn(1, network.text_tokens.total, network.config.context_dim, generator=generator),
        torch.randn(1, network.config.pooled_dim, generator=generator),
    )
    value: Any = dict(zip(network.input_names, tensors, strict=True))
    for index in sorted(layers):
        value = layers[index](value)
    return value


# --- whole networks ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_network_with_new_adapters_has_the_same_output(checks: AdapterChecks, kind: str) -> None:
    experiment = checks.prepare_kind(kind)
    plain = {index: layer.build() for index, layer in enumerate(experiment.family.layers)}
    adapted = adapted_layers(experiment)
    assert torch.equal(output(experiment, adapted), output(experiment, plain))
    injected = [len(collect(layer, "", dict(layer.named_parameters()))) for layer in adapted.values()]
    assert sum(injected) == len(adapter_of(experiment).targets.modules) > 30


@pytest.mark.parametrize(
    ("kind", "layout"), [*((kind, "native") for kind in KINDS), ("lora", "diffusers"), ("dora", "diffusers")]
)
def test_adapter_initialised_from_its_own_file_has_the_same_output(checks: AdapterChecks, kind: str, layout: str) -> None:
    experiment, layers, path = checks.saved(kind, layout)
    again = checks.prepare_kind(kind, init_from=str(path), alpha=7.0)
    result, expected = output(again, adapted_layers(again)), output(experiment, layers)
    plain = {index: layer.build() for index, layer in enumerate(experiment.family.layers)}
    assert (output(experiment, plain) - expected).abs().max() > 0.1
    torch.testing.assert_close(result, expected, rtol=1e-4, atol=1e-4)


# --- errors ------------------------------------------------------------------------------------------------------------


def test_missing_file_is_an_error_with_its_path(checks: AdapterChecks) -> None:
    (error,) = checks.errors(type="lora", init_from="/no/such.safetensors")
    assert error.startswith("adapter.init_from: /no/such.safetensors ")


def test_file_that_does_not_fit_is_an_error_with_advice(checks: AdapterChecks) -> None:
    *_, path = checks.saved("lora", "native", targets=["attn", "attn2"])
    refused = f"adapter.init_from: {path} "
    attn2 = "joint_blocks.0.x_block.attn2.proj, joint_blocks.0.x_block.attn2.qkv"
    assert checks.errors(type="lora", init_from=str(path)) == [
        f"{refused}has modules that are not among the targets: {attn2}; add attn2 to targets"
    ]
    (error,) = checks.errors(type="lora", rank=2, targets=["attn", "attn2"], init_from=str(path))
    assert error.startswith(f"{refused}has a higher rank than configured: joint_blocks.0.")
    (error,) = checks.errors(type="lokr", targets=["attn", "attn2"], init_from=str(path))
    assert error.startswith(f"{refused}has a LoRA adapter for joint_blocks.0.")


def test_errors_of_targets_and_of_the_file_are_reported_together(checks: AdapterChecks) -> None:
    keys = [error.split(": ")[0] for error in checks.errors(type="lora", targets=["no"], init_from="/no/such")]
    assert keys == ["adapter.targets[0]", "adapter.init_from"]


def test_file_with_initial_weights_is_not_part_of_the_identity(checks: AdapterChecks) -> None:
    """A resumed run has the weights of its checkpoint; the file may have been moved."""
    *_, path = checks.saved("lora", "native")
    assert checks.prepare_kind("lora", init_from=str(path)).identity == checks.prepare_kind("lora").identity
    assert checks.prepare_kind("lora", blocks="0").identity != checks.prepare_kind("lora").identity


# --- the banner --------------------------------------------------------------------------------------------------------


def banner(experiment: Experiment) -> str:
    return describe(experiment, BatchOrder(experiment.dataset.examples, experiment.global_batch, 0), "nowhere")


@pytest.mark.parametrize("kind", KINDS)
def test_banner_counts_trained_parameters(checks: AdapterChecks, kind: str) -> None:
    experiment = checks.prepare_kind(kind, rank=5)
    layers = adapted_layers(experiment)
    count = sum(p.numel() for layer in layers.values() for p in layer.parameters() if p.requires_grad)
    assert f"{adapter_of(experiment).targets.describe()} ({count / 1e6:,.2f} M parameters)" in banner(experiment)
    assert f"{count / 1e6:,.2f} M trained" in banner(experiment)


def test_banner_notes_modules_that_a_file_does_not_have(checks: AdapterChecks) -> None:
    *_, path = checks.saved("lora", "native", targets=["attn"])
    experiment = checks.prepare(type="lora", targets=["attn", "context_embedder"], init_from=str(path))
    text = banner(experiment)
    assert f" M parameters), initial weights from {path}\n" in text
    num_modules = len(adapter_of(experiment).targets.modules)
    assert f"note: 1 of the {num_modules} modules are not in {path} and have new initial weights: context_embedder" in text


def test_banner_notes_skipped_tensors_of_a_file(checks: AdapterChecks) -> None:
    experiment, layers, path = checks.saved("lora", "native", targets=["attn"])
    modules: dict[str, ModuleAdapter] = {}
    for index, layer in layers.items():
        modules.update(collect(layer, experiment.family.layers[index].prefix, dict(layer.named_parameters())))
    tensors = {name: tensor.detach().contiguous() for name, tensor in experiment.family.native_adapter(modules).items()}
    save_file({**tensors, "lora_te1_text_model_encoder_layers_0_mlp_fc1.lora_down.weight": torch.zeros(2, 4)}, path)
    text = banner(checks.prepare(type="lora", targets=["attn"], init_from=str(path)))
    assert f"note: skipped tensors of other networks in {path}: lora_te1_text_model_encoder_layers_0_mlp_fc1" in text
