"""Adapter files that are written and read back, and every spelling that other programs write.

Names in diffusers come from diffusers_reference.py.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch
from torch import Tensor

from models.family import ModuleAdapter
from models.sd3.lora_export import diffusers_adapter, native_adapter
from tests.models.sd3.diffusers_reference import convert_module, relative_error
from tests.models.sd3.lora_cases import (
    KINDS,
    MODULES,
    TOLERANCE,
    assert_same_effect,
    delta,
    draw_adapters,
    opened,
    read_all,
)
from tests.tiny_model import DEPTH

pytestmark = pytest.mark.usefixtures("one_thread")

# --- written and read back ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_native_file_reads_back_as_the_same_adapter(tmp_path: Path, kind: str) -> None:
    written = draw_adapters(kind)
    read = read_all(opened(tmp_path, native_adapter(written)))
    assert_same_effect(read, written)
    if kind == "lokr_whole":  # the scale is multiplied into a factor
        return
    for name, adapter in written.items():
        assert read[name].scale == pytest.approx(adapter.scale, rel=1e-6)
        assert read[name].tensors.keys() == adapter.tensors.keys()
        assert all(torch.equal(read[name].tensors[kind], tensor) for kind, tensor in adapter.tensors.items())


@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_diffusers_file_reads_back_with_the_same_effect(tmp_path: Path, kind: str) -> None:
    written = draw_adapters(kind)
    read = read_all(opened(tmp_path, diffusers_adapter(written, DEPTH)))
    assert_same_effect(read, written)
    assert {adapter.tensors["down"].shape for adapter in read.values()} == {
        adapter.tensors["down"].shape for adapter in written.values()
    }, "a fused qkv exported as three modules keeps its rank"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_both_formats_keep_the_dtype_of_the_tensors(tmp_path: Path, dtype: torch.dtype) -> None:
    adapters = {
        name: ModuleAdapter({kind: tensor.to(dtype) for kind, tensor in adapter.tensors.items()}, adapter.scale)
        for name, adapter in draw_adapters("dora").items()
    }
    native, diffusers = native_adapter(adapters), diffusers_adapter(adapters, DEPTH)
    assert {tensor.dtype for tensor in diffusers.values()} == {dtype}
    assert {tensor.dtype for key, tensor in native.items() if not key.endswith(".alpha")} == {dtype}
    assert {tensor.dtype for key, tensor in native.items() if key.endswith(".alpha")} == {torch.float32}
    assert_same_effect(read_all(opened(tmp_path, native)), adapters)


def test_native_magnitudes_have_the_axes_of_the_weight() -> None:
    tensors = native_adapter(draw_adapters("dora"))
    assert tensors["lora_unet_final_layer_linear.dora_scale"].shape == (64, 1)
    assert tensors["lora_unet_x_embedder_proj.dora_scale"].shape == (128, 1, 1, 1)


def test_kronecker_alpha_applies_to_products_only(tmp_path: Path) -> None:
    """sd-scripts, LyCORIS and ComfyUI use alpha / rank where a factor is a product, else 1 and ignore alpha."""
    name, key = "final_layer.linear", "lora_unet_final_layer_linear"
    product, whole = draw_adapters("lokr")[name], draw_adapters("lokr_whole")[name]
    assert float(native_adapter({name: product})[f"{key}.alpha"]) == pytest.approx(
        product.scale * product.tensors["w2_b"].shape[0]
    )
    tensors = native_adapter({name: whole})
    assert torch.allclose(tensors[f"{key}.lokr_w1"], whole.scale * whole.tensors["w1"])
    assert torch.equal(tensors[f"{key}.lokr_w2"], whole.tensors["w2"])
    other_alpha = opened(tmp_path, {**tensors, f"{key}.alpha": torch.tensor(123.0)})
    assert other_alpha.read(name).scale == 1.0


def test_kronecker_adapter_with_magnitudes_is_read(tmp_path: Path) -> None:
    name, key = "final_layer.linear", "lora_unet_final_layer_linear"
    adapter = draw_adapters("lokr")[name]
    magnitude = 1 + torch.rand(64, 1)
    read = read_all(opened(tmp_path, {**native_adapter({name: adapter}), f"{key}.dora_scale": magnitude}))
    assert_same_effect(read, {name: ModuleAdapter({**adapter.tensors, "magnitude": magnitude.flatten()}, adapter.scale)})


# --- spellings of other programs ---------------------------------------------------------------------------------------


SUFFIXES = {
    "kohya": ("lora_down.weight", "lora_up.weight"),
    "peft": ("lora_A.weight", "lora_B.weight"),
    "peft with the adapter's name": ("lora_A.default.weight", "lora_B.default.weight"),
    "old diffusers": ("lora.down.weight", "lora.up.weight"),
    "older diffusers": ("lora_linear_layer.down.weight", "lora_linear_layer.up.weight"),
    "bare": ("lora_A", "lora_B"),
}


def native_module(name: str) -> list[str]:
    return [name]


def diffusers_module(name: str) -> list[str]:
    return convert_module(name, DEPTH)[0]


SPELLINGS: dict[str, tuple[str, bool, Callable[[str], list[str]]]] = {
    "kohya": ("lora_unet_", True, native_module),
    "ComfyUI": ("diffusion_model.", False, native_module),
    "diffusers": ("transformer.", False, diffusers_module),
    "peft": ("base_model.model.", False, diffusers_module),
    "peft, the network within": ("base_model.model.transformer.", False, diffusers_module),
    "OneTrainer": ("lora_transformer_", True, diffusers_module),
}
"""Program -> (prefix, whether dots are replaced by underscores, native module -> names in the file)."""


def spelled(adapters: Mapping[str, ModuleAdapter], spelling: str, suffixes: str) -> dict[str, Tensor]:
    """Returns the tensors of a low-rank file as another program writes it, with alphas."""
    (prefix, underscores, modules), (down_suffix, up_suffix) = SPELLINGS[spelling], SUFFIXES[suffixes]
    tensors = {}
    for name, adapter in adapters.items():
        down, up = adapter.tensors["down"], adapter.tensors["up"]
        names = modules(name)
        if modules is diffusers_module and convert_module(name, DEPTH)[1]:
            up = torch.cat([up[len(up) // 2 :], up[: len(up) // 2]])
        for part, rows in zip(names, up.split(len(up) // len(names)), strict=True):
            key = prefix + (part.replace(".", "_") if underscores else part)
            tensors[f"{key}.{down_suffix}"], tensors[f"{key}.{up_suffix}"] = down.clone(), rows.clone()
            tensors[f"{key}.alpha"] = torch.tensor(adapter.scale * down.shape[0])
    return tensors


@pytest.mark.parametrize("suffixes", SUFFIXES)
@pytest.mark.parametrize("spelling", SPELLINGS)
def test_every_spelling_reads_the_same(tmp_path: Path, spelling: str, suffixes: str) -> None:
    written = draw_adapters("lora")
    assert_same_effect(read_all(opened(tmp_path, spelled(written, spelling, suffixes))), written)


def test_separately_trained_query_key_and_value_become_one_module(tmp_path: Path) -> None:
    """Ranks 2, 3 and 4; query and value only; equal ranks with different `down`; key only."""
    ranks = {
        "joint_blocks.0.x_block.attn.qkv": (2, 3, 4),
        "joint_blocks.0.context_block.attn.qkv": (3, 0, 2),
        "joint_blocks.0.x_block.attn2.qkv": (2, 2, 2),
        "joint_blocks.1.x_block.attn.qkv": (0, 4, 0),
    }
    generator = torch.Generator().manual_seed(0)
    tensors, expected = {}, {}
    for module, three in ranks.items():
        size = MODULES[module][1]
        rows = []
        for part, rank in zip(diffusers_module(module), three, strict=True):
            rows.append(torch.zeros(size, size, dtype=torch.float64))
            if rank == 0:
                continue
            down, up = torch.randn(rank, size, generator=generator), torch.randn(size, rank, generator=generator)
            tensors[f"transformer.{part}.lora_A.weight"], tensors[f"transformer.{part}.lora_B.weight"] = down, up
            tensors[f"transformer.{part}.alpha"] = torch.tensor(1.5 * rank + len(rows))
            rows[-1] = (1.5 * rank + len(rows)) / rank * up.double() @ down.double()
        expected[module] = torch.cat(rows)
    file = opened(tmp_path, tensors)
    assert {name: shapes["down"][0] for name, shapes in file.shapes.items()} == {n: sum(three) for n, three in ranks.items()}
    for module, adapter in read_all(file).items():
        assert relative_error(delta(adapter), expected[module]) <= TOLERANCE, module


def test_keys_for_text_encoders_are_skipped_and_listed(tmp_path: Path) -> None:
    written = draw_adapters("lora")
    other_keys = {
        "lora_te1_text_model_encoder_layers_0_mlp_fc1.lora_down.weight": torch.zeros(1),
        "text_encoder_2.text_model.encoder.layers.0.mlp.fc1.lora_A.weight": torch.zeros(1),
    }
    file = opened(tmp_path, {**native_adapter(written), **other_keys})
    assert set(file.skipped_keys) == set(other_keys)
    assert set(file.shapes) == set(written)


# --- the scale ---------------------------------------------------------------------------------------------------------


def test_without_alpha_the_scale_is_one(tmp_path: Path) -> None:
    written = draw_adapters("lora")
    tensors = {key: value for key, value in native_adapter(written).items() if not key.endswith(".alpha")}
    assert {adapter.scale for adapter in read_all(opened(tmp_path, tensors)).values()} == {1.0}


def test_alpha_tensor_takes_precedence_over_the_header(tmp_path: Path) -> None:
    name = "final_layer.linear"
    tensors = spelled({name: draw_adapters("lora")[name]}, "diffusers", "peft")
    header = json.dumps({"transformer.lora_alpha": 100, "transformer.r": 4})
    read = opened(tmp_path, tensors, {"lora_adapter_metadata": header}).read(name)
    assert read.scale == pytest.approx(draw_adapters("lora")[name].scale)
    del tensors["transformer.proj_out.alpha"]
    read = opened(tmp_path, tensors, {"lora_adapter_metadata": header}).read(name)
    assert read.scale == pytest.approx(100 / read.tensors["down"].shape[0])
