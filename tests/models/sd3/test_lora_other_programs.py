"""Adapters exchanged with diffusers, peft and LyCORIS: the effect on the network's output is the same in both programs."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from models.sd3.lora_export import diffusers_adapter, native_adapter
from models.sd3.lora_files import open_lora_file
from tests.models.sd3.diffusers_reference import diffusers_network, relative_error
from tests.models.sd3.lora_cases import (
    CONFIG,
    KINDS,
    MODULES,
    TOLERANCE,
    WEIGHTS,
    adapted_weights,
    diffusers_pipeline,
    diffusers_velocity,
    draw_adapters,
    opened,
    own_network,
    own_velocity,
    read_all,
)
from tests.tiny_model import DEPTH

pytestmark = pytest.mark.usefixtures("one_thread")

# --- files saved by other programs with their settings -----------------------------------------------------------------


def lora_settings(**changes: Any) -> Any:
    """Returns a peft config with different ranks and alphas for some modules, by patterns with and without ^."""
    from peft import LoraConfig

    # DoRA of only one part of a fused qkv is not supported.
    context = ["add_q_proj", "add_k_proj", "add_v_proj"] if changes.get("use_dora") else ["add_q_proj"]
    return LoraConfig(
        r=4,
        lora_alpha=6,
        rank_pattern={"to_v": 3, "norm_out.linear": 2},
        alpha_pattern={"^transformer_blocks.0.attn.to_q": 1.5, "ff.net.2": 5, "norm_out.linear": 7},
        target_modules=["to_q", "to_k", "to_v", "to_out.0", "ff.net.2", "norm_out.linear", "pos_embed.proj", *context],
        init_lora_weights=False,
        **changes,
    )


@pytest.mark.parametrize("changes", [{}, {"use_rslora": True}, {"use_dora": True}], ids=str)
def test_adapter_saved_by_diffusers_has_the_same_effect_as_in_diffusers(tmp_path: Path, changes: dict[str, bool]) -> None:
    from peft.utils import get_peft_model_state_dict

    torch.manual_seed(0)
    pipeline = diffusers_pipeline()
    pipeline.transformer.add_adapter(lora_settings(**changes))
    trained = diffusers_velocity(pipeline.transformer)
    pipeline.save_lora_weights(
        tmp_path,
        transformer_lora_layers=get_peft_model_state_dict(pipeline.transformer, adapter_name="default"),
        transformer_lora_adapter_metadata=pipeline.transformer.peft_config["default"].to_dict(),
    )
    again = diffusers_pipeline()
    again.load_lora_weights(tmp_path)
    assert relative_error(diffusers_velocity(again.transformer), trained) <= TOLERANCE

    read = read_all(open_lora_file(tmp_path / "pytorch_lora_weights.safetensors", MODULES, DEPTH))
    assert relative_error(own_velocity(own_network(adapted_weights(read))), trained) <= TOLERANCE
    assert relative_error(own_velocity(own_network(WEIGHTS)), trained) > 0.05


@pytest.mark.parametrize("kind", ["lora", "dora", "lokr", "lokr_whole"])
def test_adapter_saved_by_peft_has_the_same_effect_as_in_peft(tmp_path: Path, kind: str) -> None:
    from peft import LoKrConfig, get_peft_model

    torch.manual_seed(0)
    settings = lora_settings(use_dora=kind == "dora")
    if kind.startswith("lokr"):
        rank, other_rank = (64, 50) if kind == "lokr_whole" else (3, 2)
        settings = LoKrConfig(
            r=rank,
            alpha=rank - 1,
            rank_pattern={"norm_out.linear": other_rank},
            alpha_pattern={"to_out.0": 1},
            target_modules=["ff.net.0.proj", "to_out.0", "norm_out.linear"],
            init_weights=False,
        )
    network = get_peft_model(diffusers_network(CONFIG, WEIGHTS), settings)
    network.eval()
    trained = diffusers_velocity(network)
    network.save_pretrained(tmp_path)
    read = read_all(open_lora_file(tmp_path / "adapter_model.safetensors", MODULES, DEPTH))
    assert relative_error(own_velocity(own_network(adapted_weights(read))), trained) <= TOLERANCE
    assert relative_error(own_velocity(own_network(WEIGHTS)), trained) > 0.01


# --- exported files in other programs ----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_diffusers_applies_the_diffusers_file(tmp_path: Path, kind: str) -> None:
    adapters = draw_adapters(kind)
    expected = own_velocity(own_network(adapted_weights(adapters)))
    save_file(diffusers_adapter(adapters, DEPTH), tmp_path / "adapter.safetensors")
    network = diffusers_network(CONFIG, WEIGHTS)
    network.load_lora_adapter(load_file(tmp_path / "adapter.safetensors"), prefix="transformer")
    assert relative_error(diffusers_velocity(network), expected) <= TOLERANCE
    pipeline = diffusers_pipeline()
    pipeline.load_lora_weights(tmp_path / "adapter.safetensors")
    assert relative_error(diffusers_velocity(pipeline.transformer), expected) <= TOLERANCE
    assert relative_error(diffusers_velocity(diffusers_network(CONFIG, WEIGHTS)), expected) > 0.1


def test_diffusers_ignores_native_keys_and_rejects_a_file_with_both(tmp_path: Path) -> None:
    """The reason for exporting two files. If diffusers reads native keys, one is enough."""
    adapters = draw_adapters("lora")
    native, both = tmp_path / "native.safetensors", tmp_path / "both.safetensors"
    save_file(native_adapter(adapters), native)
    pipeline = diffusers_pipeline()
    before = diffusers_velocity(pipeline.transformer)
    pipeline.load_lora_weights(native)
    assert torch.equal(diffusers_velocity(pipeline.transformer), before)
    with_alpha = {"transformer.proj_out.alpha": torch.tensor(1.0)}
    save_file({**diffusers_adapter(adapters, DEPTH), **with_alpha}, both)
    with pytest.raises(ValueError, match="Invalid LoRA checkpoint"):
        pipeline.load_lora_weights(both)


@pytest.mark.parametrize("kind", KINDS)
def test_lycoris_applies_the_native_file(kind: str) -> None:
    """In its forward pass. NOTE LyCORIS 4.1.3 applies the scale twice when it merges LoKr (`get_diff_weight`)."""
    kohya = pytest.importorskip("lycoris.kohya")
    adapters = draw_adapters(kind)
    network = own_network(WEIGHTS)
    theirs, _ = kohya.create_network_from_weights(1.0, None, None, None, network, weights_sd=native_adapter(adapters))
    assert len(theirs.unet_loras) == len(adapters)
    for module in theirs.unet_loras:
        module.apply_to()
    expected = own_velocity(own_network(adapted_weights(adapters)))
    assert relative_error(own_velocity(network), expected) <= TOLERANCE
    assert relative_error(own_velocity(own_network(WEIGHTS)), expected) > 0.1


@pytest.mark.parametrize(
    ("module_class", "settings"),
    [
        ("LoConModule", {"weight_decompose": True, "wd_on_out": True}),
        ("LoConModule", {"rs_lora": True}),
        ("LokrModule", {"decompose_both": True}),
        ("LokrModule", {"full_matrix": True}),
        ("LokrModule", {"factor": 4, "weight_decompose": True}),
    ],
    ids=str,
)
def test_adapter_made_by_lycoris_has_the_same_effect_as_in_lycoris(
    tmp_path: Path, module_class: str, settings: dict[str, Any]
) -> None:
    lycoris = pytest.importorskip("lycoris")
    torch.manual_seed(0)
    network = own_network(WEIGHTS)
    tensors: dict[str, Tensor] = {}
    for name, module in network.named_modules():
        if name not in MODULES or (module_class == "LokrModule" and len(MODULES[name]) == 4):
            continue
        key = "lora_unet_" + name.replace(".", "_")
        theirs = getattr(lycoris, module_class)(key, module, lora_dim=3, alpha=2, **settings)
        with torch.no_grad():
            for parameter in theirs.parameters():
                parameter.copy_(parameter * 1.1 + 0.2 * torch.randn_like(parameter) / math.sqrt(parameter.shape[-1]))
        theirs.apply_to()
        tensors.update({f"{key}.{part}": value.detach().clone() for part, value in theirs.custom_state_dict().items()})
    read = read_all(opened(tmp_path, tensors))
    expected = own_velocity(network)
    assert relative_error(own_velocity(own_network(adapted_weights(read))), expected) <= TOLERANCE
    assert relative_error(own_velocity(own_network(WEIGHTS)), expected) > 0.01
