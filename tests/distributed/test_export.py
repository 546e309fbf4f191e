"""Exported files contain the trained weights, as this program and other programs read them.

The tests compare two velocities: that of the run's own layers with the weights of its checkpoint, and that of diffusers'
network with the exported file, read by diffusers.
"""

from __future__ import annotations

import hashlib
import json
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
from models.sd3.weights import NetworkFiles
from models.tensor_files import open_file
from tests.distributed.lab import Lab, Run
from tests.distributed.test_layouts import BFLOAT16, FULL, LORA
from tests.distributed.test_previews import PREVIEWS, images
from tests.models.sd3.diffusers_reference import diffusers_network, relative_error
from tests.tiny_model import tiny_shapes
from utils.distributed.world import World
from utils.run.experiment import Experiment
from utils.run.prepare import prepare

pytestmark = pytest.mark.distributed

TOLERANCE = 1e-5


def opened(run: Run) -> Experiment:
    return prepare(run.experiment, [], None, World(0, 0, 1, 1))


def exported_file(run: Run, name: str) -> Path:
    return run.folder / "weights" / f"step_{run.last_step:06d}" / name


def checkpointed(run: Run) -> dict[int, dict[str, Tensor]]:
    """Layer index -> parameter name -> float32 weights in the checkpoint of the last step."""
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
    network = MMDiT(NetworkFiles(open_file(path)).config)
    network.load_state_dict(weights)
    return network(*network_inputs())


@torch.no_grad()
def trained_velocity(run: Run) -> Tensor:
    """The velocity of the run's own layers with the weights of its checkpoint."""
    experiment = opened(run)
    states = checkpointed(run)
    value: Any = dict(zip(experiment.family.input_names, network_inputs(), strict=True))
    for index, layer in enumerate(experiment.family.layers):
        module: nn.Module = layer.build()
        experiment.trainable.prepare(layer, module)
        unknown = module.load_state_dict(states.get(index, {}), strict=False).unexpected_keys
        assert not unknown
        value = module(value)
    return experiment.family.velocity(value, experiment.family.sample_shape(2, 4, 6))


def base_network(lab: Lab) -> Any:
    """diffusers' network with the weights that training started from."""
    path = lab.model / "mmdit.safetensors"
    return diffusers_network(NetworkFiles(open_file(path)).config, load_file(path))


@torch.no_grad()
def diffusers_velocity(network: Any) -> Tensor:
    latents, timestep, context, pooled = network_inputs()
    return network(hidden_states=latents, timestep=timestep, encoder_hidden_states=context, pooled_projections=pooled).sample


# --- the whole network -------------------------------------------------------------------------------------------------

ALL_FORMATS: dict[str, Any] = {"save.formats": ["native", "complete", "diffusers"]}


@pytest.mark.parametrize("changes", [FULL, BFLOAT16], ids=["float32", "bfloat16"])
def test_full_export_is_one_native_file_of_the_trained_weights(lab: Lab, changes: dict[str, Any]) -> None:
    """In bfloat16 training too, the export has the optimizer's float32 weights."""
    run = lab.shared_run(1, changes)
    assert [path.name for path in exported_file(run, "").iterdir()] == ["mmdit.safetensors"]
    exported = load_file(exported_file(run, "mmdit.safetensors"))
    assert {name: tuple(tensor.shape) for name, tensor in exported.items()} == tiny_shapes()
    layers = opened(run).family.layers
    trained = {
        layers[index].prefix + name: tensor for index, state in checkpointed(run).items() for name, tensor in state.items()
    }
    assert exported.keys() - trained.keys() == {"pos_embed"}
    assert all(torch.equal(exported[name], trained[name]) for name in trained)


def test_header_describes_the_weights_and_their_source(lab: Lab) -> None:
    run = lab.shared_run(1, FULL)
    with safe_open(exported_file(run, "mmdit.safetensors"), "pt") as file:
        metadata = file.metadata()
    base = lab.model / "mmdit.safetensors"
    assert metadata["modelspec.architecture"] == "stable-diffusion-3-5-medium"
    assert metadata["mmdit_pipe.step"] == "6"
    assert metadata["mmdit_pipe.text_tokens"] == '{"clip_max_token_length": 8, "t5xxl_max_token_length": 8}'
    assert metadata["mmdit_pipe.discrete_flow_shift"] == "3.0"
    assert '"discrete_flow_shift":3.0' in metadata["mmdit_pipe.objective"]
    assert metadata["ss_new_sd_model_hash"] == hashlib.sha256(base.read_bytes()).hexdigest()
    assert json.loads(metadata["mmdit_pipe.base_sha256"]) == [[base.name, metadata["ss_new_sd_model_hash"]]]
    config = json.loads(metadata["mmdit_pipe.training_config"])
    assert config["optimizer"]["learning_rate"] == 1e-3
    assert config["model"]["mmdit"] == "mmdit.safetensors"
    assert "modelspec.prediction_type" not in metadata


def test_header_has_no_folders_and_no_secrets(lab: Lab) -> None:
    """It has the settings of the training only: paths are reduced to file names, and no table can hold a secret."""
    with safe_open(exported_file(lab.shared_run(1, FULL), "mmdit.safetensors"), "pt") as file:
        metadata = file.metadata()
    assert str(lab.folder) not in json.dumps(metadata)
    assert str(lab.model) not in json.dumps(metadata)
    tables = json.loads(metadata["mmdit_pipe.training_config"])
    assert set(tables) <= {"seed", "model", "objective", "adapter", "ema", "optimizer", "pipeline"}


def test_native_file_gives_the_trained_velocity_in_diffusers(lab: Lab) -> None:
    """The file is read by diffusers' own loader of single files."""
    from diffusers import SD3Transformer2DModel

    run = lab.shared_run(2, ALL_FORMATS)
    network = SD3Transformer2DModel.from_single_file(
        str(exported_file(run, "mmdit.safetensors")), config=str(exported_file(run, "transformer")), local_files_only=True
    )
    trained = trained_velocity(run)
    assert relative_error(diffusers_velocity(network), trained) <= TOLERANCE
    path = exported_file(run, "mmdit.safetensors")
    assert relative_error(native_velocity(load_file(path), path), trained) <= TOLERANCE
    assert relative_error(diffusers_velocity(base_network(lab)), trained) > 0.01, "training has changed it"


@pytest.mark.parametrize("num_stages", [1, 2])
def test_diffusers_folder_gives_the_trained_velocity(lab: Lab, num_stages: int) -> None:
    """The folder is read by from_pretrained, from one shard per stage."""
    from diffusers import SD3Transformer2DModel

    run = lab.shared_run(num_stages, ALL_FORMATS)
    folder = exported_file(run, "transformer")
    assert len(list(folder.glob("*.safetensors"))) == num_stages
    network, report = SD3Transformer2DModel.from_pretrained(folder, output_loading_info=True, local_files_only=True)
    assert not any(report.values()), "no key missing, none unexpected"
    assert relative_error(diffusers_velocity(network), trained_velocity(run)) <= TOLERANCE


def test_complete_file_is_read_by_diffusers(lab: Lab) -> None:
    """diffusers loads network, autoencoder and text encoders; only tokenizers and settings come from a folder."""
    from diffusers import AutoencoderKL, SD3Transformer2DModel
    from diffusers.loaders.single_file_utils import (
        convert_ldm_vae_checkpoint,
        convert_sd3_transformer_checkpoint_to_diffusers,
    )
    from transformers import CLIPTextModelWithProjection, T5EncoderModel

    run = lab.shared_run(2, ALL_FORMATS)
    tensors = load_file(exported_file(run, "complete.safetensors"))
    network = SD3Transformer2DModel.from_config(SD3Transformer2DModel.load_config(exported_file(run, "transformer")))
    network.load_state_dict(convert_sd3_transformer_checkpoint_to_diffusers(dict(tensors)))
    assert relative_error(diffusers_velocity(network), trained_velocity(run)) <= TOLERANCE
    autoencoder = AutoencoderKL.from_pretrained(lab.model / "vae")
    converted = convert_ldm_vae_checkpoint(dict(tensors), autoencoder.config)
    original = autoencoder.state_dict()
    assert converted.keys() == original.keys()
    assert all(torch.equal(converted[name], original[name]) for name in original)
    folders = {"clip_l": "text_encoder", "clip_g": "text_encoder_2", "t5xxl": "text_encoder_3"}
    for name, folder in folders.items():
        kind: Any = T5EncoderModel if name == "t5xxl" else CLIPTextModelWithProjection
        encoder = kind.from_pretrained(lab.model / folder)
        prefix = f"text_encoders.{name}.transformer."
        encoder_tensors = {key.removeprefix(prefix): tensor for key, tensor in tensors.items() if key.startswith(prefix)}
        missing, unexpected = encoder.load_state_dict(encoder_tensors, strict=False)
        assert not unexpected
        assert set(missing) <= {"text_projection.weight", "encoder.embed_tokens.weight"}
        before = kind.from_pretrained(lab.model / folder).state_dict()
        assert all(torch.equal(encoder_tensors[key], before[key]) for key in encoder_tensors)


def test_complete_file_alone_continues_training(lab: Lab) -> None:
    """As the only model file it has everything: the first previews equal the last ones of the earlier run."""
    before = lab.shared_run(2, {**PREVIEWS, **ALL_FORMATS})
    tokenizers = {f"model.{name}_tokenizer": str(lab.model / folder) for name, folder in TOKENIZERS.items()}
    alone = {"model.vae": None, "model.clip_l": None, "model.clip_g": None, "model.t5xxl": None}
    path = exported_file(before, "complete.safetensors")
    after = lab.run(1, lab.experiment({**PREVIEWS, **alone, **tokenizers, "model.mmdit": str(path), "max_steps": 1}))
    assert_first_previews_equal_last_ones(after, before)


TOKENIZERS = {"clip_l": "tokenizer", "clip_g": "tokenizer_2", "t5xxl": "tokenizer_3"}


def assert_first_previews_equal_last_ones(after: Run, before: Run) -> None:
    """The previews before the first step equal those after the other run's last step bitwise."""
    last, first = images(before), images(after)
    for index in range(3):
        ended = last[f"step_{before.last_step:06d}/{index:03d}.png"]
        assert np.array_equal(ended, first[f"step_000000/{index:03d}.png"])
        assert not np.array_equal(ended, last[f"step_000000/{index:03d}.png"]), "training has changed it"


@pytest.mark.parametrize("name", ["mmdit.safetensors", "transformer"])
def test_next_run_starts_from_the_export(lab: Lab, name: str) -> None:
    before = lab.shared_run(2, {**PREVIEWS, **ALL_FORMATS})
    path = exported_file(before, name)
    after = lab.run(2, lab.experiment({**PREVIEWS, "model.mmdit": str(path), "max_steps": 1}))
    assert_first_previews_equal_last_ones(after, before)


@pytest.mark.parametrize(("name", "dtype"), [("bfloat16", torch.bfloat16), ("float16", torch.float16)])
def test_exports_in_low_precision_are_the_rounded_weights_at_the_configured_steps(
    lab: Lab, name: str, dtype: torch.dtype
) -> None:
    run = lab.run(2, lab.experiment({"save.dtype": name, "save.export_every_n_steps": 4}))
    assert sorted(path.name for path in (run.folder / "weights").iterdir()) == ["step_000004", "step_000006"]
    exact = lab.shared_run(2, FULL).weights
    for key, tensor in run.weights.items():
        expected = exact[key] if key.endswith("pos_embed") else exact[key].to(dtype)
        assert tensor.dtype == expected.dtype
        assert torch.equal(tensor, expected)


@pytest.mark.parametrize("changes", [FULL, LORA], ids=["full", "lora"])
def test_averaged_weights_are_exported_too(lab: Lab, changes: dict[str, Any]) -> None:
    """Every format has the averages of the checkpoint, which differ from the weights."""
    formats = {} if "adapter" in changes else ALL_FORMATS
    run = lab.shared_run(2, {**changes, **formats, "ema": {"decay": 0.9}})
    folder = exported_file(run, "")
    names = sorted(path.name for path in folder.iterdir())
    assert sorted(path.name for path in (folder / "ema").iterdir()) == [name for name in names if name != "ema"]
    averages: dict[str, Tensor] = {}
    layers = opened(run).family.layers
    for path in (run.folder / "checkpoints" / f"step_{run.last_step:06d}").glob("layer_*.safetensors"):
        prefix = layers[int(path.stem.split("_")[1])].prefix
        averages |= {prefix + k.split("//")[0]: v for k, v in load_file(path).items() if k.endswith("//ema")}
    if "adapter" in changes:
        name = "joint_blocks.1.x_block.attn.qkv"
        key = "lora_unet_" + name.replace(".", "_") + ".lora_up.weight"
        average, weights = (load_file(folder / place / "lora.safetensors")[key] for place in ("ema", ""))
        assert torch.equal(average, averages[f"{name}.lora_B.default.weight"])
    else:
        name = "joint_blocks.1.x_block.attn.qkv.weight"
        average, weights = (load_file(folder / place / "mmdit.safetensors")[name] for place in ("ema", ""))
        assert torch.equal(average, averages[name])
    assert not torch.equal(average, weights)


# --- adapters ----------------------------------------------------------------------------------------------------------

EVERYTHING = ["attn", "attn2", "mlp", "adaLN_modulation", "final_layer", "embedders"]
KINDS: dict[str, dict[str, Any]] = {
    "lora": LORA,
    "rslora": {**LORA, "adapter": {"type": "lora", "rank": 4, "alpha": 3.0, "rank_stabilized": True}},
    "dora": {**LORA, "adapter": {"type": "lora", "rank": 4, "alpha": 8.0, "dora": True, "targets": EVERYTHING}},
    "everything": {
        **LORA,
        "adapter": {
            "type": "lora",
            "rank": 4,
            "alpha": 6.0,
            "targets": [
                *({"pattern": group} for group in EVERYTHING),
                {"pattern": r".*\.attn\.qkv", "rank": 2, "alpha": 5.0},
            ],
        },
    },
    "lokr": {**LORA, "adapter": {"type": "lokr", "rank": 2, "alpha": 4.0}},
}


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


def merged_by_hand(weights: dict[str, Tensor], adapters: dict[str, Tensor]) -> dict[str, Tensor]:
    """Applies a native file as sd-scripts (LoRA) and ComfyUI (DoRA, LoKr) do."""
    merged = dict(weights)
    for name, weight in weights.items():
        key = "lora_unet_" + name.removesuffix(".weight").replace(".", "_")
        parts = {k.removeprefix(f"{key}."): v for k, v in adapters.items() if k.startswith(f"{key}.")}
        if not name.endswith(".weight") or not parts:
            continue
        if "lora_down.weight" in parts:
            down, up = parts["lora_down.weight"], parts["lora_up.weight"]
            delta = parts["alpha"] / down.shape[0] * (up.flatten(1) @ down.flatten(1)).reshape(weight.shape)
        else:
            w1 = parts["lokr_w1"]
            w2 = parts["lokr_w2"] if "lokr_w2" in parts else parts["lokr_w2_a"] @ parts["lokr_w2_b"]
            scale = parts["alpha"] / parts["lokr_w2_b"].shape[0] if "lokr_w2_b" in parts else 1.0
            delta = scale * torch.kron(w1, w2)
        new = weight + delta
        if "dora_scale" in parts:
            length = new.reshape(new.shape[0], -1).norm(dim=1).reshape(-1, *[1] * (new.dim() - 1))
            new = new * parts["dora_scale"] / length
        merged[name] = new
    return merged


@pytest.mark.parametrize("kind", KINDS)
def test_native_adapter_merged_gives_the_trained_velocity(lab: Lab, kind: str) -> None:
    run = lab.shared_run(1, KINDS[kind])
    base = lab.model / "mmdit.safetensors"
    adapters = load_file(exported_file(run, "lokr.safetensors" if kind == "lokr" else "lora.safetensors"))
    merged = merged_by_hand(load_file(base), adapters)
    trained = trained_velocity(run)
    assert relative_error(native_velocity(merged, base), trained) <= TOLERANCE
    assert relative_error(native_velocity(load_file(base), base), trained) > 0.01, "the adapter changes the velocity"


@pytest.mark.parametrize("loader", ["load_lora_adapter", "StableDiffusion3Pipeline"])
@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "lokr"])
def test_diffusers_lora_gives_the_trained_velocity(lab: Lab, kind: str, loader: str) -> None:
    from diffusers import FlowMatchEulerDiscreteScheduler, StableDiffusion3Pipeline

    run = lab.shared_run(1, KINDS[kind])
    path = exported_file(run, "lora_diffusers.safetensors")
    network = base_network(lab)
    if loader == "load_lora_adapter":
        network.load_lora_adapter(load_file(path))
    else:
        parts = dict.fromkeys(("vae", "text_encoder", "text_encoder_2", "text_encoder_3"))
        parts.update(dict.fromkeys(("tokenizer", "tokenizer_2", "tokenizer_3")))
        pipeline = StableDiffusion3Pipeline(transformer=network, scheduler=FlowMatchEulerDiscreteScheduler(), **parts)
        pipeline.load_lora_weights(path.parent, weight_name=path.name)
    assert relative_error(diffusers_velocity(network), trained_velocity(run)) <= TOLERANCE


def test_alpha_is_exact_in_low_precision(lab: Lab) -> None:
    """A rank-stabilized alpha is not a round number; bfloat16 would change it by up to 0.4%."""
    run = lab.run(1, lab.experiment({**KINDS["rslora"], "save.dtype": "bfloat16", "max_steps": 1}))
    tensors = load_file(exported_file(run, "lora.safetensors"))
    alphas = {float(tensor) for name, tensor in tensors.items() if name.endswith(".alpha")}
    assert alphas == {3.0 * 4**0.5}
    assert {tensor.dtype for name, tensor in tensors.items() if name.endswith("weight")} == {torch.bfloat16}


@pytest.mark.parametrize("name", ["lora.safetensors", "lora_diffusers.safetensors"])
@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_training_continues_from_an_exported_adapter(lab: Lab, kind: str, name: str) -> None:
    """From either file: the next run's first loss on a sample is that of this run's network, to float tolerance."""
    before = lab.shared_run(1, KINDS[kind])
    changes = {**KINDS[kind], "adapter": {**KINDS[kind]["adapter"], "init_from": str(exported_file(before, name))}}
    after = lab.run(2, lab.experiment({**changes, "max_steps": 1, "optimizer.learning_rate": 1e-12}))
    assert relative_error(trained_velocity(after), trained_velocity(before)) <= TOLERANCE


@pytest.mark.parametrize(("kind", "name"), [("lora", "lora_diffusers"), ("dora", "lora"), ("lokr", "lokr")])
def test_training_starts_from_the_merged_adapter(lab: Lab, kind: str, name: str) -> None:
    before = lab.shared_run(1, KINDS[kind])
    merge = [{"path": str(exported_file(before, f"{name}.safetensors"))}]
    after = lab.run(2, lab.experiment({"model.merge_adapters": merge, "max_steps": 1, "optimizer.learning_rate": 1e-12}))
    assert "merged into" in after.output
    assert relative_error(trained_velocity(after), trained_velocity(before)) <= TOLERANCE


# --- disabled encoders -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "kept",
    [("clip_l", "clip_g"), ("t5xxl",), ("clip_g",)],
    ids=["without_t5", "t5_alone", "clip_g_alone"],
)
@pytest.mark.parametrize("missing", ["zeros", "absent"])
def test_run_with_some_encoders_caches_trains_and_generates_previews(lab: Lab, kept: tuple[str, ...], missing: str) -> None:
    off = {f"model.{name}": False for name in ("clip_l", "clip_g", "t5xxl") if name not in kept}
    cache = lab.folder / f"cache_of_{'_'.join(kept)}"
    changes = {**PREVIEWS, **off, "model.missing_encoders": missing, "cache_dir": str(cache), "max_steps": 2}
    run = lab.run(2, lab.experiment(changes))
    assert {path.name.rpartition("-")[0] for path in cache.glob("*-*")} == {"vae", *kept}
    assert all(np.isfinite(line["loss"]) for line in run.metrics)
    previews = images(run)
    assert not np.array_equal(previews["step_000002/000.png"], previews["step_000002/001.png"])
