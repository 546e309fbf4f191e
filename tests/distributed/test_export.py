"""What is saved is what was trained, in the files of this program and as other programs read them."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from models.sd3.mmdit import MMDiT
from models.sd3.weights import MMDiTFile
from tests.distributed.lab import Lab, Run
from tests.distributed.test_layouts import BFLOAT16, FULL, LORA, PREVIEWS, pictures
from tests.models.sd3.diffusers_reference import diffusers_network, relative_error
from tests.tiny_model import tiny_shapes
from utils import lora
from utils.distributed import World
from utils.preflight import Experiment, prepare

pytestmark = pytest.mark.distributed

TOLERANCE = 1e-5


def opened(run: Run) -> Experiment:
    return prepare(run.experiment, [], None, World(0, 0, 1, 1))


def exported_file(run: Run, name: str) -> Path:
    return run.folder / "weights" / f"step_{run.last_step:06d}" / name


def checkpointed(run: Run) -> dict[int, dict[str, Tensor]]:
    """Layer index -> parameter name -> float32 weights, as the checkpoint of the last step has them."""
    layers = {}
    for path in sorted((run.folder / "checkpoints" / f"step_{run.last_step:06d}").glob("layer_*.safetensors")):
        masters = {name.split("//")[0]: tensor for name, tensor in load_file(path).items() if name.endswith("//master")}
        layers[int(path.stem.split("_")[1])] = masters
    return layers


def network_inputs() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """latents (B, C, H, W), timestep (B,), context (B, L, context_dim), pooled (B, pooled_dim)."""
    shapes = tiny_shapes()
    generator = torch.Generator().manual_seed(1)
    latents = torch.randn(2, 16, 4, 6, generator=generator)
    context = torch.randn(2, 16, shapes["context_embedder.weight"][1], generator=generator)
    pooled = torch.randn(2, shapes["y_embedder.mlp.0.weight"][1], generator=generator)
    return latents, torch.tensor([900.0, 250.0]), context, pooled


@torch.no_grad()
def native_velocity(weights: dict[str, Tensor], path: Path) -> Tensor:
    network = MMDiT(MMDiTFile(path).config)
    network.load_state_dict(weights)
    return network(*network_inputs())


@torch.no_grad()
def trained_velocity(run: Run) -> Tensor:
    """Of the run's own layers, given the weights of its checkpoint."""
    experiment = opened(run)
    adapter = experiment.config.experiment.adapter
    states = checkpointed(run)
    tensors: Any = network_inputs()
    for index, layer in enumerate(experiment.adapter.layers):
        module: nn.Module = layer.build()
        if adapter is not None:
            assert adapter.alpha is not None
            lora.inject(module, layer.prefix, experiment.lora_targets, rank=adapter.rank, alpha=adapter.alpha, seed=0)
        unknown = module.load_state_dict(states.get(index, {}), strict=False).unexpected_keys
        assert not unknown
        tensors = module(tensors)
    return experiment.adapter.velocity(tensors, 4, 6)


@torch.no_grad()
def diffusers_velocity(network: Any) -> Tensor:
    latents, timestep, context, pooled = network_inputs()
    return network(hidden_states=latents, timestep=timestep, encoder_hidden_states=context, pooled_projections=pooled).sample


# --- the whole network -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("changes", [FULL, BFLOAT16], ids=["float32", "bfloat16"])
def test_full_export_is_one_native_file_of_the_trained_weights(lab: Lab, changes: dict[str, Any]) -> None:
    """Also in bfloat16 training: of the optimizer's float32 weights."""
    run = lab.shared_run(1, changes)
    assert [path.name for path in exported_file(run, "").iterdir()] == ["mmdit.safetensors"]
    exported = load_file(exported_file(run, "mmdit.safetensors"))
    assert {name: tuple(tensor.shape) for name, tensor in exported.items()} == tiny_shapes()
    layers = opened(run).adapter.layers
    trained = {
        layers[index].prefix + name: tensor for index, state in checkpointed(run).items() for name, tensor in state.items()
    }
    assert exported.keys() - trained.keys() == {"pos_embed"}
    assert all(torch.equal(exported[name], trained[name]) for name in trained)


def test_full_export_says_what_it_is(lab: Lab) -> None:
    with safe_open(exported_file(lab.shared_run(1, FULL), "mmdit.safetensors"), "pt") as file:
        metadata = file.metadata()
    assert metadata["modelspec.architecture"] == "stable-diffusion-3-5-medium"
    assert metadata["mmdit_pipe.step"] == "6"
    assert metadata["mmdit_pipe.text_tokens"] == '{"clip_max_token_length": 8, "t5xxl_max_token_length": 8}'
    assert '"discrete_flow_shift":3.0' in metadata["mmdit_pipe.objective"]


def test_full_export_gives_the_trained_velocity_in_diffusers(lab: Lab) -> None:
    """Through diffusers' own conversion of single files."""
    from diffusers.loaders.single_file_utils import convert_sd3_transformer_checkpoint_to_diffusers

    run = lab.shared_run(1, FULL)
    path = exported_file(run, "mmdit.safetensors")
    network = diffusers_network(MMDiTFile(path).config, load_file(lab.model / "mmdit.safetensors"))
    before = diffusers_velocity(network)
    network.load_state_dict(convert_sd3_transformer_checkpoint_to_diffusers(load_file(path)))
    velocity, trained = diffusers_velocity(network), trained_velocity(run)
    assert relative_error(velocity, trained) <= TOLERANCE
    assert relative_error(native_velocity(load_file(path), path), trained) <= TOLERANCE
    assert relative_error(before, trained) > 0.01, "training has changed it"


def test_next_run_starts_from_the_export(lab: Lab) -> None:
    """Its first previews are the last ones of the run before it."""
    before = lab.shared_run(1, PREVIEWS)
    path = exported_file(before, "mmdit.safetensors")
    after = lab.run(2, lab.experiment({**PREVIEWS, "model.mmdit": str(path), "max_steps": 1}))
    last, first = pictures(before), pictures(after)
    for index in range(3):
        assert np.array_equal(last[f"step_000006/{index:03d}.png"], first[f"step_000000/{index:03d}.png"])


@pytest.mark.parametrize(("name", "dtype"), [("bfloat16", torch.bfloat16), ("float16", torch.float16)])
def test_export_in_low_precision_is_the_rounded_weights_every_so_often(lab: Lab, name: str, dtype: torch.dtype) -> None:
    run = lab.run(2, lab.experiment({"save.dtype": name, "save.export_every_n_steps": 4}))
    assert sorted(path.name for path in (run.folder / "weights").iterdir()) == ["step_000004", "step_000006"]
    exact = lab.shared_run(2, FULL).weights
    for key, tensor in run.weights.items():
        expected = exact[key] if key == "pos_embed" else exact[key].to(dtype)
        assert tensor.dtype == expected.dtype
        assert torch.equal(tensor, expected)


# --- adapters ----------------------------------------------------------------------------------------------------------


def test_native_lora_has_the_names_alpha_and_metadata_of_sd_scripts(lab: Lab) -> None:
    path = exported_file(lab.shared_run(1, LORA), "lora.safetensors")
    tensors = load_file(path)
    modules = {name.split(".")[0] for name in tensors}
    name = r"lora_unet_(joint_blocks_\d+_(x|context)_block_(attn|mlp)_(qkv|proj|fc1|fc2)|final_layer_\w+)"
    assert len(modules) == 23
    assert all(re.fullmatch(name, module) for module in modules)
    for module in modules:
        down, up = tensors[f"{module}.lora_down.weight"], tensors[f"{module}.lora_up.weight"]
        assert (down.shape[0], up.shape[1]) == (4, 4)
        assert tensors[f"{module}.alpha"].shape == ()
        assert float(tensors[f"{module}.alpha"]) == 8.0
    assert len(tensors) == 3 * len(modules)
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    assert metadata["modelspec.architecture"] == "stable-diffusion-3-5-medium/lora"
    assert metadata["ss_network_module"] == "networks.lora_sd3"
    assert metadata["ss_network_dim"] == "4"
    assert float(metadata["ss_network_alpha"]) == 8.0


def test_native_lora_merged_gives_the_trained_velocity(lab: Lab) -> None:
    """W + alpha / rank * up @ down, as sd-scripts and ComfyUI apply it."""
    run = lab.shared_run(1, LORA)
    base = lab.model / "mmdit.safetensors"
    weights, adapters = load_file(base), load_file(exported_file(run, "lora.safetensors"))
    for name in list(weights):
        module = "lora_unet_" + name.removesuffix(".weight").replace(".", "_")
        if f"{module}.alpha" in adapters:
            down, up = adapters[f"{module}.lora_down.weight"], adapters[f"{module}.lora_up.weight"]
            weights[name] += adapters[f"{module}.alpha"] / down.shape[0] * (up @ down)
    trained = trained_velocity(run)
    assert relative_error(native_velocity(weights, base), trained) <= TOLERANCE
    assert relative_error(native_velocity(load_file(base), base), trained) > 0.01, "the adapter does something"


@pytest.mark.parametrize("loader", ["load_lora_adapter", "StableDiffusion3Pipeline"])
def test_diffusers_lora_gives_the_trained_velocity(lab: Lab, loader: str) -> None:
    from diffusers import FlowMatchEulerDiscreteScheduler, StableDiffusion3Pipeline

    run = lab.shared_run(1, LORA)
    base, path = lab.model / "mmdit.safetensors", exported_file(run, "lora_diffusers.safetensors")
    network = diffusers_network(MMDiTFile(base).config, load_file(base))
    if loader == "load_lora_adapter":
        network.load_lora_adapter(load_file(path))
    else:
        parts = dict.fromkeys(("vae", "text_encoder", "text_encoder_2", "text_encoder_3"))
        parts.update(dict.fromkeys(("tokenizer", "tokenizer_2", "tokenizer_3")))
        pipeline = StableDiffusion3Pipeline(transformer=network, scheduler=FlowMatchEulerDiscreteScheduler(), **parts)
        pipeline.load_lora_weights(path.parent, weight_name=path.name)
    assert relative_error(diffusers_velocity(network), trained_velocity(run)) <= TOLERANCE
