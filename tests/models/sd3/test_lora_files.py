"""Adapters in public files: the keys, what is read back, what other programs make of them, merging, what is refused.

Updates are computed here once more, in float64 and by other operations; names in diffusers come from diffusers_reference.py.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from models.family import LoraFile, ModelFilesError, ModuleAdapter
from models.sd3.family import SD3Family
from models.sd3.layers import layer_prefix, num_layers
from models.sd3.lora_export import diffusers_adapter, native_adapter
from models.sd3.lora_files import open_lora_file
from models.sd3.mmdit import MMDiT
from models.sd3.network_shapes import adaptable_modules
from models.sd3.variants import detect_config
from models.sd3.weights import NetworkFiles
from models.tensor_files import MAX_ERRORS_SHOWN, open_file
from tests.golden.make_lora_keys import RANK, RELEASED, golden_path, golden_text, read_golden, released_shapes
from tests.models.sd3.diffusers_reference import convert_module, diffusers_network, relative_error, to_diffusers
from tests.tiny_model import CONTEXT_DIM, DEPTH, POOLED_DIM, Shape, random_weights, tiny_shapes

CONFIG = detect_config(tiny_shapes())
WEIGHTS = random_weights(tiny_shapes())
MODULES: dict[str, Shape] = {
    name.removesuffix(".weight"): shape
    for name, shape in tiny_shapes().items()
    if name.endswith(".weight") and len(shape) in (2, 4)
}
KINDS = ("lora", "dora", "lokr", "lokr_whole", "lokr_products")
TOLERANCE = 1e-5

Adapters = dict[str, ModuleAdapter]


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    """Matrices this small only wait for a second thread, long where other work keeps it busy."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


# --- adapters to test with, and what they do by our own account --------------------------------------------------------


def draw_adapters(kind: str, seed: int = 0) -> Adapters:
    """An adapter on every module (of LoKr on every linear), ranks 2 to 5, every scale another, no tensor zero."""
    generator = torch.Generator().manual_seed(seed)
    adapters: Adapters = {}
    for index, (name, shape) in enumerate(MODULES.items()):
        if kind.startswith("lokr") and len(shape) == 4:
            continue
        draw = draw_kronecker if kind.startswith("lokr") else draw_low_rank
        tensors = draw(kind, shape, 2 + index % 4, generator)
        if kind == "dora":
            stretched = 0.7 + 0.6 * torch.rand(shape[0], generator=generator)
            tensors["magnitude"] = WEIGHTS[f"{name}.weight"].flatten(1).norm(dim=1) * stretched
        adapters[name] = ModuleAdapter(tensors, 0.3 + 0.07 * index)
    return adapters


def draw_low_rank(_: str, shape: Shape, rank: int, generator: torch.Generator) -> dict[str, Tensor]:
    down = torch.randn(rank, *shape[1:], generator=generator) / math.sqrt(math.prod(shape[1:]))
    up = 0.3 * torch.randn(shape[0], rank, *[1] * (len(shape) - 2), generator=generator)
    return {"down": down, "up": up}


def draw_kronecker(kind: str, shape: Shape, rank: int, generator: torch.Generator) -> dict[str, Tensor]:
    """Both sides of the weight split into factors as equal as can be, the smaller for w1."""
    rank = 2 + rank % 2  # LyCORIS makes products only of ranks this low
    rows, columns = (max(size for size in range(1, math.isqrt(side) + 1) if side % size == 0) for side in shape)
    sizes = {"w1": (rows, columns), "w2": (shape[0] // rows, shape[1] // columns)}
    are_products = {"w1": kind == "lokr_products", "w2": kind != "lokr_whole"}
    tensors = {}
    for name, (out_size, in_size) in sizes.items():
        size = 0.4 / in_size**0.25
        if are_products[name]:
            tensors[f"{name}_a"] = size * torch.randn(out_size, rank, generator=generator)
            tensors[f"{name}_b"] = torch.randn(rank, in_size, generator=generator) / math.sqrt(rank)
        else:
            tensors[name] = size * torch.randn(out_size, in_size, generator=generator)
    return tensors


def delta(adapter: ModuleAdapter) -> Tensor:
    """What is added to a weight, magnitude aside: (out, in * k * k), float64."""
    tensors = {name: tensor.double() for name, tensor in adapter.tensors.items()}
    if "down" in tensors:
        return adapter.scale * torch.einsum("or,ri->oi", tensors["up"].flatten(1), tensors["down"].flatten(1))
    w1, w2 = (
        tensors[name] if name in tensors else torch.einsum("or,ri->oi", tensors[f"{name}_a"], tensors[f"{name}_b"])
        for name in ("w1", "w2")
    )
    blocks = torch.einsum("ab,cd->acbd", w1, w2)
    return adapter.scale * blocks.reshape(w1.shape[0] * w2.shape[0], -1)


def adapted(weight: Tensor, adapter: ModuleAdapter, strength: float = 1.0) -> Tensor:
    """The weight with its adapter, float64."""
    flat = weight.double().flatten(1)
    changed = flat + delta(adapter)
    if "magnitude" in adapter.tensors:
        changed = torch.diag(adapter.tensors["magnitude"].double() / changed.square().sum(dim=1).sqrt()) @ changed
    return (flat + strength * (changed - flat)).reshape(weight.shape)


def adapted_weights(adapters: Mapping[str, ModuleAdapter], strength: float = 1.0) -> dict[str, Tensor]:
    changed = {f"{name}.weight": adapted(WEIGHTS[f"{name}.weight"], adapters[name], strength).float() for name in adapters}
    return {**WEIGHTS, **changed}


# --- the network with them ---------------------------------------------------------------------------------------------


def network_inputs() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(5)
    context = torch.randn(2, 6, CONTEXT_DIM, generator=generator)
    pooled = torch.randn(2, POOLED_DIM, generator=generator)
    return torch.randn(2, 16, 8, 4, generator=generator), torch.tensor([900.0, 30.0]), context, pooled


def own_network(values: Mapping[str, Tensor]) -> MMDiT:
    network = MMDiT(CONFIG)
    network.load_state_dict(values)
    return network


@torch.no_grad()
def own_velocity(network: MMDiT) -> Tensor:
    return network(*network_inputs())


@torch.no_grad()
def diffusers_velocity(network: Any) -> Tensor:
    latents, timestep, context, pooled = network_inputs()
    return network(latents, context, pooled, timestep, return_dict=False)[0]


def diffusers_pipeline() -> Any:
    """The tiny network in diffusers' pipeline, which has no other part."""
    from diffusers import StableDiffusion3Pipeline

    encoders = {f"{part}{number}": None for part in ("text_encoder", "tokenizer") for number in ("", "_2", "_3")}
    network = diffusers_network(CONFIG, WEIGHTS)
    return StableDiffusion3Pipeline(transformer=network, scheduler=None, vae=None, **encoders)


# --- files -------------------------------------------------------------------------------------------------------------


def opened(folder: Path, tensors: Mapping[str, Tensor], metadata: dict[str, str] | None = None) -> LoraFile:
    path = folder / "adapter.safetensors"
    save_file(dict(tensors), path, metadata=metadata)
    return open_lora_file(path, MODULES, DEPTH)


def errors_of(path: Path, modules: Mapping[str, Shape] = MODULES) -> list[str]:
    with pytest.raises(ModelFilesError) as caught:
        open_lora_file(path, modules, DEPTH)
    assert {key for key, _ in caught.value.errors} == {""}
    assert all(str(path) in text for _, text in caught.value.errors)
    return [text.replace(str(path), "FILE") for _, text in caught.value.errors]


def errors_with(folder: Path, tensors: Mapping[str, Tensor], metadata: dict[str, str] | None = None) -> list[str]:
    path = folder / "adapter.safetensors"
    save_file(dict(tensors), path, metadata=metadata)
    return errors_of(path)


def read_all(file: LoraFile) -> Adapters:
    """Every module of the file, and that it is as the file said it would be."""
    adapters = {name: file.read(name) for name in file.shapes}
    for name, adapter in adapters.items():
        assert {what: tuple(tensor.shape) for what, tensor in adapter.tensors.items()} == dict(file.shapes[name]), name
        assert all(tensor.dtype == torch.float32 for tensor in adapter.tensors.values())
    return adapters


def assert_same_effect(found: Mapping[str, ModuleAdapter], expected: Mapping[str, ModuleAdapter]) -> None:
    assert set(found) == set(expected)
    for name in expected:
        weight = WEIGHTS[f"{name}.weight"]
        assert relative_error(delta(found[name]), delta(expected[name])) <= TOLERANCE, name
        assert relative_error(adapted(weight, found[name]), adapted(weight, expected[name])) <= TOLERANCE, name


# --- keys --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", RELEASED)
def test_golden_file_is_what_its_script_writes(variant: str) -> None:
    assert golden_path(variant).read_text(encoding="utf-8") == golden_text(variant)


@pytest.mark.parametrize("variant", RELEASED)
def test_native_file_of_a_released_network_has_the_golden_keys_and_shapes(variant: str) -> None:
    modules = adaptable_modules(detect_config(released_shapes(variant)))
    adapters = {
        name: ModuleAdapter(
            {
                "down": torch.empty(RANK, *shape[1:], device="meta"),
                "up": torch.empty(shape[0], RANK, *[1] * (len(shape) - 2), device="meta"),
            },
            1.0,
        )
        for name, shape in modules.items()
    }
    assert {key: tuple(tensor.shape) for key, tensor in native_adapter(adapters).items()} == read_golden(variant)


@pytest.mark.parametrize(("variant", "count"), [("sd3_medium", 237), ("sd35_medium", 263), ("sd35_large", 377)])
def test_released_networks_have_as_many_modules_in_blocks_as_sd_scripts_finds(variant: str, count: int) -> None:
    modules = adaptable_modules(detect_config(released_shapes(variant)))
    assert sum(name.startswith("joint_blocks.") for name in modules) == count
    assert len(modules) == count + 8


def test_native_keys_of_the_tiny_network_are_those_written_down_by_hand() -> None:
    golden = golden_path("keys").read_text(encoding="utf-8").splitlines()
    expected = {
        f"{line}.{part}"
        for line in golden
        if not line.startswith("#")
        for part in ("lora_down.weight", "lora_up.weight", "alpha")
    }
    linears = {name: adapter for name, adapter in draw_adapters("lora").items() if len(MODULES[name]) == 2}
    assert set(native_adapter(linears)) == expected


DEFAULT_TARGETS = """
joint_blocks.0.context_block.attn.qkv joint_blocks.0.context_block.attn.proj
joint_blocks.0.context_block.mlp.fc1 joint_blocks.0.context_block.mlp.fc2
joint_blocks.0.x_block.attn.qkv joint_blocks.0.x_block.attn.proj
joint_blocks.0.x_block.mlp.fc1 joint_blocks.0.x_block.mlp.fc2
joint_blocks.1.context_block.attn.qkv joint_blocks.1.context_block.attn.proj
joint_blocks.1.context_block.mlp.fc1 joint_blocks.1.context_block.mlp.fc2
joint_blocks.1.x_block.attn.qkv joint_blocks.1.x_block.attn.proj
joint_blocks.1.x_block.mlp.fc1 joint_blocks.1.x_block.mlp.fc2
joint_blocks.2.context_block.attn.qkv
joint_blocks.2.x_block.attn.qkv joint_blocks.2.x_block.attn.proj
joint_blocks.2.x_block.mlp.fc1 joint_blocks.2.x_block.mlp.fc2
final_layer.linear final_layer.adaLN_modulation.1
""".split()


def in_group(group: str, name: str) -> bool:
    return re.fullmatch(SD3Family.lora_target_groups[group], name) is not None


def test_default_targets_are_these() -> None:
    chosen = {name for name in MODULES if any(in_group(group, name) for group in SD3Family.default_lora_targets)}
    assert chosen == set(DEFAULT_TARGETS)


@pytest.mark.parametrize("variant", RELEASED)
def test_every_module_is_in_exactly_one_group(variant: str) -> None:
    modules = adaptable_modules(detect_config(released_shapes(variant)))
    for name in modules:
        assert sum(in_group(group, name) for group in SD3Family.lora_target_groups) == 1, name


# --- written and read back ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_native_file_reads_back_as_the_same_adapter(tmp_path: Path, kind: str) -> None:
    written = draw_adapters(kind)
    read = read_all(opened(tmp_path, native_adapter(written)))
    assert_same_effect(read, written)
    if kind == "lokr_whole":  # the scale is in a factor
        return
    for name, adapter in written.items():
        assert read[name].scale == pytest.approx(adapter.scale, rel=1e-6)
        assert read[name].tensors.keys() == adapter.tensors.keys()
        assert all(torch.equal(read[name].tensors[what], tensor) for what, tensor in adapter.tensors.items())


@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_diffusers_file_reads_back_with_the_same_effect(tmp_path: Path, kind: str) -> None:
    written = draw_adapters(kind)
    read = read_all(opened(tmp_path, diffusers_adapter(written, DEPTH)))
    assert_same_effect(read, written)
    assert {adapter.tensors["down"].shape for adapter in read.values()} == {
        adapter.tensors["down"].shape for adapter in written.values()
    }, "a fused qkv that was written as three keeps its rank"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_both_files_hold_the_dtype_they_are_given(tmp_path: Path, dtype: torch.dtype) -> None:
    adapters = {
        name: ModuleAdapter({what: tensor.to(dtype) for what, tensor in adapter.tensors.items()}, adapter.scale)
        for name, adapter in draw_adapters("dora").items()
    }
    native, diffusers = native_adapter(adapters), diffusers_adapter(adapters, DEPTH)
    assert {tensor.dtype for tensor in diffusers.values()} == {dtype}
    assert {tensor.dtype for key, tensor in native.items() if not key.endswith(".alpha")} == {dtype}
    assert {tensor.dtype for key, tensor in native.items() if key.endswith(".alpha")} == {torch.float32}
    assert_same_effect(read_all(opened(tmp_path, native)), adapters)


def test_native_lengths_of_rows_have_the_axes_of_the_weight() -> None:
    tensors = native_adapter(draw_adapters("dora"))
    assert tensors["lora_unet_final_layer_linear.dora_scale"].shape == (64, 1)
    assert tensors["lora_unet_x_embedder_proj.dora_scale"].shape == (128, 1, 1, 1)


def test_kronecker_alpha_is_for_products_only(tmp_path: Path) -> None:
    """sd-scripts, LyCORIS and ComfyUI take alpha / rank where a factor is a product, else 1 whatever alpha says."""
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


def test_kronecker_adapter_with_lengths_of_rows_is_read(tmp_path: Path) -> None:
    name, key = "final_layer.linear", "lora_unet_final_layer_linear"
    adapter = draw_adapters("lokr")[name]
    lengths = 1 + torch.rand(64, 1)
    read = read_all(opened(tmp_path, {**native_adapter({name: adapter}), f"{key}.dora_scale": lengths}))
    assert_same_effect(read, {name: ModuleAdapter({**adapter.tensors, "magnitude": lengths.flatten()}, adapter.scale)})


# --- as others spell it ------------------------------------------------------------------------------------------------

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
"""Prefix, whether names have underscores for dots, and a native module's names."""


def spelled(adapters: Mapping[str, ModuleAdapter], spelling: str, suffixes: str) -> dict[str, Tensor]:
    """The low-rank file as another program writes it, alpha as it is."""
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
    """Ranks 2, 3 and 4; query and value only; one rank but each its own `down`; key only."""
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


def test_text_encoders_in_the_file_are_left_out_and_named(tmp_path: Path) -> None:
    written = draw_adapters("lora")
    beside = {
        "lora_te1_text_model_encoder_layers_0_mlp_fc1.lora_down.weight": torch.zeros(1),
        "text_encoder_2.text_model.encoder.layers.0.mlp.fc1.lora_A.weight": torch.zeros(1),
    }
    file = opened(tmp_path, {**native_adapter(written), **beside})
    assert set(file.skipped_keys) == set(beside)
    assert set(file.shapes) == set(written)


# --- the scale ---------------------------------------------------------------------------------------------------------


def test_without_alpha_the_scale_is_one(tmp_path: Path) -> None:
    written = draw_adapters("lora")
    tensors = {key: value for key, value in native_adapter(written).items() if not key.endswith(".alpha")}
    assert {adapter.scale for adapter in read_all(opened(tmp_path, tensors)).values()} == {1.0}


def test_alpha_in_a_tensor_goes_before_the_header(tmp_path: Path) -> None:
    name = "final_layer.linear"
    tensors = spelled({name: draw_adapters("lora")[name]}, "diffusers", "peft")
    header = json.dumps({"transformer.lora_alpha": 100, "transformer.r": 4})
    read = opened(tmp_path, tensors, {"lora_adapter_metadata": header}).read(name)
    assert read.scale == pytest.approx(draw_adapters("lora")[name].scale)
    del tensors["transformer.proj_out.alpha"]
    read = opened(tmp_path, tensors, {"lora_adapter_metadata": header}).read(name)
    assert read.scale == pytest.approx(100 / read.tensors["down"].shape[0])


def lora_settings(**changes: Any) -> Any:
    """peft's, with another rank or alpha for some modules; patterns that begin with ^ and ones that do not."""
    from peft import LoraConfig

    # Of a part of a fused qkv no DoRA can be read.
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
def test_adapter_that_diffusers_saved_with_its_settings_reads_as_diffusers_reads_it(
    tmp_path: Path, changes: dict[str, bool]
) -> None:
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
def test_adapter_that_peft_saved_with_its_settings_reads_as_peft_applies_it(tmp_path: Path, kind: str) -> None:
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


# --- in other programs -------------------------------------------------------------------------------------------------


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


def test_diffusers_finds_nothing_in_the_native_file_and_refuses_a_file_of_both(tmp_path: Path) -> None:
    """Why there are two files. When diffusers reads native keys, one is enough."""
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
    """By its forward pass. NOTE LyCORIS 4.1.3 merges LoKr with the scale taken twice (`get_diff_weight`)."""
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
def test_adapter_that_lycoris_made_reads_as_lycoris_applies_it(
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


# --- merged into the network -------------------------------------------------------------------------------------------


def network_files(folder: Path, tensors: Mapping[str, Tensor]) -> NetworkFiles:
    path = folder / "network.safetensors"
    save_file(dict(tensors), path)
    return NetworkFiles(open_file(path))


def layers_read(network: NetworkFiles, dtype: torch.dtype) -> dict[str, Tensor]:
    """Every tensor of every layer by its native name."""
    return {
        layer_prefix(CONFIG, index) + name: tensor
        for index in range(num_layers(CONFIG))
        for name, tensor in network.load_layer(index, dtype).state_dict().items()
    }


@pytest.mark.parametrize("strength", [1.0, 0.5, -1.0])
@pytest.mark.parametrize("kind", ["lora", "dora", "lokr"])
def test_layers_carry_the_merged_adapter(tmp_path: Path, kind: str, strength: float) -> None:
    adapters = draw_adapters(kind)
    network = network_files(tmp_path, WEIGHTS)
    network.merge(opened(tmp_path, native_adapter(adapters)), strength)
    found = layers_read(network, torch.float32)
    expected = adapted_weights(adapters, strength)
    assert found.keys() == WEIGHTS.keys()
    for name in WEIGHTS:
        if name.removesuffix(".weight") in adapters and name.endswith(".weight"):
            assert relative_error(found[name], expected[name]) <= 1e-6, name
            assert relative_error(found[name], WEIGHTS[name]) > 0.01, name
        else:
            assert torch.equal(found[name], WEIGHTS[name]), name


def test_merged_weights_are_rounded_once(tmp_path: Path) -> None:
    """Stored in bfloat16, added to in float32, rounded when all is added."""
    stored = {name: tensor.bfloat16() for name, tensor in WEIGHTS.items()}
    first, second = draw_adapters("lora", seed=1), draw_adapters("dora", seed=2)
    network = network_files(tmp_path, stored)
    for index, adapters in enumerate((first, second)):
        (tmp_path / f"{index}").mkdir()
        network.merge(opened(tmp_path / f"{index}", native_adapter(adapters)), 0.3)
    exact, rounded = layers_read(network, torch.float32), layers_read(network, torch.bfloat16)
    for name in set(exact) - {"pos_embed"}:
        assert rounded[name].dtype == torch.bfloat16
        assert torch.equal(rounded[name], exact[name].bfloat16()), name
    name = "joint_blocks.0.x_block.mlp.fc1"
    expected = adapted(adapted(stored[f"{name}.weight"], first[name], 0.3), second[name], 0.3)
    assert relative_error(exact[f"{name}.weight"].double(), expected) <= 1e-6


def test_adapters_are_merged_one_after_the_other(tmp_path: Path) -> None:
    """The second, a DoRA, meets the weights the first has changed."""
    first, second = draw_adapters("lora", seed=1), draw_adapters("dora", seed=2)
    network = network_files(tmp_path, WEIGHTS)
    for adapters, strength in ((first, 0.7), (second, 1.0)):
        folder = tmp_path / f"{strength}"
        folder.mkdir()
        network.merge(opened(folder, native_adapter(adapters)), strength)
    found = layers_read(network, torch.float32)
    for name in MODULES:
        expected = adapted(adapted(WEIGHTS[f"{name}.weight"], first[name], 0.7), second[name])
        assert relative_error(found[f"{name}.weight"].double(), expected) <= 1e-6, name
        lengths = found[f"{name}.weight"].flatten(1).norm(dim=1)
        assert relative_error(lengths, second[name].tensors["magnitude"]) <= 1e-6, name


def test_either_file_merges_into_a_network_in_diffusers_names(tmp_path: Path) -> None:
    adapters = draw_adapters("dora")
    expected = adapted_weights(adapters)
    for index, tensors in enumerate((native_adapter(adapters), diffusers_adapter(adapters, DEPTH))):
        (tmp_path / f"{index}").mkdir()
        network = network_files(tmp_path / f"{index}", to_diffusers(WEIGHTS, DEPTH))
        network.merge(opened(tmp_path / f"{index}", tensors), 1.0)
        found = layers_read(network, torch.float32)
        assert all(relative_error(found[name], expected[name]) <= TOLERANCE for name in WEIGHTS)


# --- what is refused ---------------------------------------------------------------------------------------------------

FC1 = "lora_unet_joint_blocks_0_x_block_mlp_fc1"
TO = "transformer.transformer_blocks.0.attn.to_"


def low_rank(key: str, rows: int, columns: int, rank: int = 2) -> dict[str, Tensor]:
    return {f"{key}.lora_down.weight": torch.zeros(rank, columns), f"{key}.lora_up.weight": torch.zeros(rows, rank)}


@pytest.mark.parametrize(
    ("content", "text"),
    [
        (b"", "FILE is empty"),
        (b"PK\x03\x04 a pickled adapter", "FILE is a pickled file, which is not supported: convert it to safetensors"),
        (b"<!DOCTYPE html>", "FILE is a web page: the download failed"),
    ],
)
def test_a_file_of_another_format_is_named(tmp_path: Path, content: bytes, text: str) -> None:
    (tmp_path / "adapter.safetensors").write_bytes(content)
    assert errors_of(tmp_path / "adapter.safetensors")[0].startswith(text)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    assert errors_of(tmp_path / "none.safetensors") == ["FILE does not exist"]


def test_a_file_without_tensors_is_refused(tmp_path: Path) -> None:
    assert errors_with(tmp_path, {}) == ["FILE: contains no adapter for this network"]


def test_a_file_for_text_encoders_only_is_refused(tmp_path: Path) -> None:
    tensors = low_rank("lora_te1_text_model_encoder_layers_0_mlp_fc1", 8, 8)
    assert errors_with(tmp_path, tensors) == [
        "FILE: contains no adapter for this network; its 2 tensors are for text encoders"
    ]


@pytest.mark.parametrize(
    "module",
    [
        "lora_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_q",  # SDXL
        "lora_unet_double_blocks_0_img_attn_qkv",  # Flux
        "transformer.single_transformer_blocks.0.attn.to_q",  # Flux in diffusers
    ],
)
def test_an_adapter_of_another_network_is_refused(tmp_path: Path, module: str) -> None:
    names = [f"{module}{number}" for number in ("", "_b", "_c")]
    tensors = {key: value for name in names for key, value in low_rank(name, 8, 8).items()}
    [error] = errors_with(tmp_path, tensors)
    assert error.startswith(f"FILE: has tensors that belong to no module of this network: {module}")
    assert error.endswith(" and 3 more")


@pytest.mark.parametrize(("present", "missing"), [("lora_down.weight", "up"), ("lora_up.weight", "down")])
def test_half_a_pair_is_refused(tmp_path: Path, present: str, missing: str) -> None:
    tensors = {f"{FC1}.{present}": torch.zeros(2, 2), f"{FC1}.alpha": torch.tensor(1.0)}
    assert errors_with(tmp_path, tensors) == [f"FILE: {FC1} has no {missing}"]


@pytest.mark.parametrize(("key", "shape"), [("alpha", ()), ("dora_scale", (512, 1)), ("lokr_w1_b", (2, 2))])
def test_a_module_with_nothing_to_apply_is_refused(tmp_path: Path, key: str, shape: Shape) -> None:
    errors = errors_with(tmp_path, {f"{FC1}.{key}": torch.zeros(shape)})
    if key.startswith("lokr"):
        assert errors == [f"FILE: {FC1} has neither {w} nor {w}_a and {w}_b of matching shapes" for w in ("w1", "w2")]
    else:
        assert errors == [f"FILE: {FC1} has no down and no up"]


def test_an_adapter_of_a_wider_variant_is_refused_with_a_short_list(tmp_path: Path) -> None:
    tensors: dict[str, Tensor] = {}
    for name, shape in MODULES.items():
        if len(shape) == 2:
            tensors |= low_rank("lora_unet_" + name.replace(".", "_"), 2 * shape[0], 2 * shape[1])
    errors = errors_with(tmp_path, tensors)
    assert "FILE: lora_unet_final_layer_linear has down of (2, 256), expected (2, 128)" in errors_with(
        tmp_path, low_rank("lora_unet_final_layer_linear", 128, 256)
    )
    assert len(errors) == MAX_ERRORS_SHOWN + 1
    assert errors[-1] == f"FILE: and {2 * (len(MODULES) - 1) - MAX_ERRORS_SHOWN} more tensors that do not match"
    assert re.fullmatch(r"FILE: lora_unet_\w+ has (down|up) of \(\d+, \d+\), expected \(\d+, \d+\)", errors[0])


def test_an_adapter_of_sd35_large_does_not_fit_sd35_medium(tmp_path: Path) -> None:
    medium = adaptable_modules(detect_config(released_shapes("sd35_medium")))
    large = adaptable_modules(detect_config(released_shapes("sd35_large")))
    tensors: dict[str, Tensor] = {}
    for name, shape in large.items():
        if ".x_block.attn.proj" in name:
            tensors |= low_rank("lora_unet_" + name.replace(".", "_"), shape[0], shape[1], rank=1)
    save_file(tensors, tmp_path / "large.safetensors")
    errors = errors_of(tmp_path / "large.safetensors", medium)
    assert errors[0].startswith(
        "FILE: has tensors that belong to no module of this network: lora_unet_joint_blocks_24_x_block_attn_proj"
    )
    assert "has down of (1, 2432), expected (1, 1536)" in errors[1]


def test_a_module_under_two_names_is_refused(tmp_path: Path) -> None:
    twice = {**low_rank("lora_unet_final_layer_linear", 64, 128), **low_rank("transformer.proj_out", 64, 128)}
    assert errors_with(tmp_path, twice) == [
        "FILE: final_layer.linear occurs twice, as lora_unet_final_layer_linear and transformer.proj_out"
    ]
    fused = low_rank("lora_unet_joint_blocks_0_x_block_attn_qkv", 384, 128)
    [error] = errors_with(tmp_path, {**fused, **low_rank(f"{TO}k", 128, 128)})
    assert error.startswith("FILE: joint_blocks.0.x_block.attn.qkv occurs twice, as ")


def test_a_tensor_under_two_suffixes_is_refused(tmp_path: Path) -> None:
    tensors = {**low_rank(FC1, 512, 128), f"{FC1}.lora_A.weight": torch.zeros(2, 128)}
    assert errors_with(tmp_path, tensors) == [
        f"FILE: has the same tensor twice, as {FC1}.lora_A.weight and {FC1}.lora_down.weight"
    ]


@pytest.mark.parametrize(
    ("suffix", "shape", "text"),
    [
        ("dora_scale", (100, 1), "has magnitudes of shape (100, 1), expected 512 rows"),
        (
            "dora_scale",
            (1, 128),
            "has one magnitude per column, (1, 128); only DoRA with one per row, (512, 1), is supported",
        ),
        ("lora_magnitude_vector", (128,), "has magnitudes of shape (128,), expected 512 rows"),
    ],
)
def test_lengths_that_are_not_those_of_the_rows_are_refused(tmp_path: Path, suffix: str, shape: Shape, text: str) -> None:
    tensors = {**low_rank(FC1, 512, 128), f"{FC1}.{suffix}": torch.ones(shape)}
    assert errors_with(tmp_path, tensors) == [f"FILE: {FC1} {text}"]


def test_lengths_of_columns_are_told_from_those_of_rows_where_there_are_as_many(tmp_path: Path) -> None:
    """As LyCORIS' input-axis DoRA of a square weight has them."""
    key = "lora_unet_joint_blocks_0_x_block_attn_proj"
    [error] = errors_with(tmp_path, {**low_rank(key, 128, 128), f"{key}.dora_scale": torch.ones(1, 128)})
    assert "has one magnitude per column" in error


def test_lengths_of_only_some_of_query_key_and_value_are_refused(tmp_path: Path) -> None:
    tensors = {key: value for part in "qkv" for key, value in low_rank(f"{TO}{part}", 128, 128).items()}
    tensors[f"{TO}q.lora_magnitude_vector"] = torch.ones(128)
    text = "FILE: joint_blocks.0.x_block.attn.qkv has DoRA for only some of query, key and value"
    assert errors_with(tmp_path, tensors) == [text]
    only_query = {key: value for key, value in tensors.items() if key.startswith(f"{TO}q.")}
    assert errors_with(tmp_path, only_query) == [text]


def test_kronecker_adapters_that_cannot_be_applied_are_refused(tmp_path: Path) -> None:
    def factors(key: str, *shapes: Shape) -> dict[str, Tensor]:
        return {f"{key}.lokr_w{index}": torch.zeros(shape) for index, shape in enumerate(shapes, start=1)}

    assert errors_with(tmp_path, factors(f"{TO}q", (8, 8), (16, 16))) == [
        f"FILE: {TO}q is a Kronecker adapter of one part of a fused qkv; only Kronecker adapters with native keys are supported there"
    ]
    assert errors_with(tmp_path, factors("lora_unet_x_embedder_proj", (8, 4), (16, 4, 2, 2))) == [
        "FILE: lora_unet_x_embedder_proj is a Kronecker adapter of a convolution, which is not supported"
    ]
    assert errors_with(tmp_path, factors("transformer.norm_out.linear", (1, 8), (256, 16))) == [
        "FILE: transformer.norm_out.linear is a Kronecker adapter whose halves cannot be swapped; "
        "only native keys are supported for this module"
    ]
    assert errors_with(tmp_path, factors(FC1, (8, 8), (16, 16))) == [
        f"FILE: {FC1} has an update of shape (128, 128), expected (512, 128)"
    ]
    apart = {f"{FC1}.lokr_w2_a": torch.zeros(64, 2), f"{FC1}.lokr_w2_b": torch.zeros(3, 16)}
    assert errors_with(tmp_path, {**factors(FC1, (8, 8)), **apart}) == [
        f"FILE: {FC1} has neither w2 nor w2_a and w2_b of matching shapes"
    ]
    assert errors_with(tmp_path, {**factors(FC1, (8, 8), (64, 16)), **low_rank(FC1, 512, 128)}) == [
        f"FILE: {FC1} is a low-rank and a Kronecker adapter at once"
    ]


def test_an_alpha_of_several_numbers_is_refused(tmp_path: Path) -> None:
    tensors = {**low_rank(FC1, 512, 128), f"{FC1}.alpha": torch.ones(2)}
    assert errors_with(tmp_path, tensors) == [f"FILE: {FC1}.alpha is not a single number"]


@pytest.mark.parametrize("header", ["{", "[1]"])
def test_settings_of_peft_that_cannot_be_read_are_refused(tmp_path: Path, header: str) -> None:
    [error] = errors_with(tmp_path, low_rank(FC1, 512, 128), {"lora_adapter_metadata": header})
    assert error.startswith("FILE: comes with peft settings that cannot be read: ")


def test_every_error_is_told_at_once(tmp_path: Path) -> None:
    tensors = {
        f"{FC1}.lora_down.weight": torch.zeros(2, 128),
        "lora_unet_unheard_of.lora_down.weight": torch.zeros(2, 2),
        **low_rank("lora_unet_final_layer_linear", 64, 99),
    }
    assert len(errors_with(tmp_path, tensors)) == 3


def test_an_integer_alpha_is_a_number_too(tmp_path: Path) -> None:
    """As scripts that extract adapters write it."""
    written = draw_adapters("lora")
    tensors = native_adapter(written)
    whole = {key: torch.tensor(3) if key.endswith(".alpha") else tensor for key, tensor in tensors.items()}
    for name, adapter in read_all(opened(tmp_path, whole)).items():
        assert adapter.scale == 3 / written[name].tensors["down"].shape[0]


@pytest.mark.parametrize("alpha", [float("nan"), float("inf")])
def test_an_alpha_that_is_no_number_is_refused(tmp_path: Path, alpha: float) -> None:
    tensors = native_adapter(draw_adapters("lora"))
    spoiled = {key: torch.tensor(alpha) if key.endswith(".alpha") else tensor for key, tensor in tensors.items()}
    with pytest.raises(ModelFilesError, match="has no finite scale"):
        opened(tmp_path, spoiled)
