"""Public files of the network and of adapters: detected from shapes, checked by name, read layer by layer."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from models.base import LoraWeights, ModelFilesError
from models.sd3 import weights
from models.sd3.layers import layer_prefix, num_layers
from models.sd3.mmdit import MMDiT, MMDiTConfig, unpatchify
from models.sd3.weights import MMDiTFile, detect_config, expected_shapes
from tests.models.sd3.diffusers_reference import diffusers_network, relative_error
from tests.tiny_model import CONTEXT_DIM, DEPTH, POOLED_DIM, native_shapes, random_weights, tiny_shapes
from utils import lora

GOLDEN_KEYS = Path(__file__).resolve().parents[2] / "golden" / "lora_keys.txt"

RELEASED = {
    "SD3-medium": (
        {"depth": 24, "width": 1536, "pos_embed_max_size": 192, "qk_norm": False},
        {"parameters": 2_028_328_000, "keys": 491, "table": 56_623_104},
    ),
    "SD3.5-medium": (
        {
            "depth": 24,
            "width": 1536,
            "pos_embed_max_size": 384,
            "qk_norm": True,
            "dual_attention_layers": tuple(range(13)),
        },
        {"parameters": 2_243_171_520, "keys": 665, "table": 226_492_416},
    ),
    "SD3.5-large": (
        {"depth": 38, "width": 2432, "pos_embed_max_size": 192, "qk_norm": True},
        {"parameters": 8_056_627_520, "keys": 923, "table": 89_653_248},
    ),
}
"""What the released files hold, counted in them."""


def write_network(folder: Path, change: Callable[[dict[str, Tensor]], None]) -> Path:
    """The tiny network's file with a change."""
    tensors = random_weights(tiny_shapes())
    change(tensors)
    path = folder / "changed.safetensors"
    save_file(tensors, path)
    return path


def problems_of(path: Path) -> str:
    with pytest.raises(ModelFilesError) as caught:
        MMDiTFile(path)
    assert {key for key, _ in caught.value.problems} == {"mmdit"}
    return "\n".join(text for _, text in caught.value.problems)


# --- variants ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", RELEASED)
def test_released_variant_is_told_from_shapes_alone(variant: str) -> None:
    shape, _ = RELEASED[variant]
    config = detect_config(native_shapes(context_dim=4096, pooled_dim=2048, **shape))
    assert config == MMDiTConfig(
        patch_size=2,
        in_channels=16,
        depth=shape["depth"],
        hidden_size=shape["width"],
        context_dim=4096,
        pooled_dim=2048,
        pos_embed_max_size=shape["pos_embed_max_size"],
        qk_norm=shape["qk_norm"],
        dual_attention_layers=shape.get("dual_attention_layers", ()),
    )
    assert config.num_heads == config.depth
    assert weights.variant_name(config) == variant


@pytest.mark.parametrize("variant", RELEASED)
def test_released_variant_has_its_published_tensors(variant: str) -> None:
    shape, counts = RELEASED[variant]
    published = native_shapes(context_dim=4096, pooled_dim=2048, **shape)
    ours = expected_shapes(detect_config(published))
    assert ours == published
    assert len(ours) == counts["keys"]
    assert math.prod(ours.pop("pos_embed")) == counts["table"]
    assert sum(math.prod(shape) for shape in ours.values()) == counts["parameters"]


@pytest.mark.parametrize(
    ("variant", "name"),
    [
        ("SD3-medium", "stable-diffusion-3-medium"),
        ("SD3.5-medium", "stable-diffusion-3-5-medium"),
        ("SD3.5-large", "stable-diffusion-3-5-large"),
    ],
)
def test_architecture_carries_its_standard_name(variant: str, name: str) -> None:
    shape, _ = RELEASED[variant]
    assert weights.architecture_id(detect_config(native_shapes(context_dim=4096, pooled_dim=2048, **shape))) == name


def test_linear_modules_are_those_of_the_file(tiny_model: Path) -> None:
    config = MMDiTFile(tiny_model / "mmdit.safetensors").config
    expected = {name.removesuffix(".weight") for name, shape in tiny_shapes().items() if len(shape) == 2}
    assert set(weights.linear_module_names(config)) == expected


# --- reading -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_layer_holds_the_file_s_values(tiny_model: Path, dtype: torch.dtype) -> None:
    file = MMDiTFile(tiny_model / "mmdit.safetensors")
    written = load_file(file.path)
    for index in range(num_layers(file.config)):
        for name, value in file.load_layer(index, 6, dtype).state_dict().items():
            assert value.device.type == "cpu"
            native = layer_prefix(file.config, index) + name
            assert torch.equal(value, written[native].to(torch.float32 if native == "pos_embed" else dtype)), native


def test_shapes_of_a_layer_are_those_of_its_parameters(tiny_model: Path) -> None:
    file = MMDiTFile(tiny_model / "mmdit.safetensors")
    for index in range(num_layers(file.config)):
        parameters = file.load_layer(index, 6, torch.float32).named_parameters()
        assert file.layer_shapes(index, 6) == {name: tuple(parameter.shape) for name, parameter in parameters}


def test_loading_a_layer_reads_its_own_tensors_only(tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[str] = []

    class Recorder:
        def __init__(self, *arguments: Any) -> None:
            self._inner = safe_open(*arguments)

        def __enter__(self) -> Recorder:
            self._file = self._inner.__enter__()
            return self

        def __exit__(self, *arguments: Any) -> None:
            self._inner.__exit__(*arguments)

        def get_tensor(self, name: str) -> Tensor:
            read.append(name)
            return self._file.get_tensor(name)

    file = MMDiTFile(tiny_model / "mmdit.safetensors")
    monkeypatch.setattr(weights, "safe_open", Recorder)
    file.load_layer(2, 6, torch.float32)
    assert sorted(read) == sorted(name for name in tiny_shapes() if name.startswith("joint_blocks.1."))
    read.clear()
    file.load_layer(num_layers(file.config) - 1, 6, torch.float32)
    assert sorted(read) == sorted(name for name in tiny_shapes() if name.startswith("final_layer."))


def test_a_checkpoint_with_prefix_and_other_networks_reads_like_a_plain_one(tiny_model: Path, tmp_path: Path) -> None:
    plain = load_file(tiny_model / "mmdit.safetensors")
    path = tmp_path / "checkpoint.safetensors"
    prefixed = {f"model.diffusion_model.{name}": tensor for name, tensor in plain.items()}
    save_file({**prefixed, "first_stage_model.decoder.conv_in.weight": torch.zeros(1)}, path)
    file = MMDiTFile(path)
    assert file.config == MMDiTFile(tiny_model / "mmdit.safetensors").config
    layer = file.load_layer(1, 6, torch.float32)
    assert torch.equal(layer.state_dict()["x_block.mlp.fc1.weight"], plain["joint_blocks.0.x_block.mlp.fc1.weight"])


# --- what is refused ---------------------------------------------------------------------------------------------------


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    assert problems_of(tmp_path / "none.safetensors") == f"{tmp_path / 'none.safetensors'} does not exist"


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 a pickled checkpoint", b"\xff" * 64])
def test_a_file_of_another_format_is_named(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "model.ckpt"
    path.write_bytes(content)
    text = problems_of(path)
    assert str(path) in text
    assert "not a readable safetensors file" in text


def test_a_truncated_file_is_refused(tiny_model: Path, tmp_path: Path) -> None:
    path = tmp_path / "half.safetensors"
    content = (tiny_model / "mmdit.safetensors").read_bytes()
    path.write_bytes(content[: len(content) // 2])
    assert "not a readable safetensors file" in problems_of(path)


def test_another_network_is_told_by_what_it_lacks(tmp_path: Path) -> None:
    path = tmp_path / "flux.safetensors"
    save_file({"double_blocks.0.img_attn.qkv.weight": torch.zeros(4, 4), "pos_embed": torch.zeros(1, 4, 4)}, path)
    text = problems_of(path)
    assert "not an SD3 network with native keys" in text
    assert "x_embedder.proj.weight" in text
    assert "pos_embed" not in text


def test_a_network_without_blocks_is_refused(tmp_path: Path) -> None:
    def without_blocks(tensors: dict[str, Tensor]) -> None:
        for name in [name for name in tensors if name.startswith("joint_blocks.")]:
            del tensors[name]

    assert "joint_blocks" in problems_of(write_network(tmp_path, without_blocks))


def test_missing_misshapen_and_foreign_tensors_are_all_named_at_once(tmp_path: Path) -> None:
    def change(tensors: dict[str, Tensor]) -> None:
        del tensors["joint_blocks.1.x_block.mlp.fc2.bias"]
        tensors["final_layer.linear.weight"] = torch.zeros(32, 128)
        tensors["joint_blocks.0.x_block.attn.to_q.weight"] = torch.zeros(2)

    text = problems_of(write_network(tmp_path, change))
    assert "misses tensor joint_blocks.1.x_block.mlp.fc2.bias (128,)" in text
    assert "tensor final_layer.linear.weight has shape (32, 128), expected (64, 128)" in text
    assert "has tensor joint_blocks.0.x_block.attn.to_q.weight, which this network does not have" in text


def test_a_long_list_of_problems_is_cut_and_says_so(tmp_path: Path) -> None:
    def change(tensors: dict[str, Tensor]) -> None:
        for name in [name for name in tensors if name.startswith("joint_blocks.1.")]:
            del tensors[name]

    lines = problems_of(write_network(tmp_path, change)).splitlines()
    deleted = [name for name in tiny_shapes() if name.startswith("joint_blocks.1.")]
    assert len(lines) == weights.MAX_PROBLEMS_SHOWN + 1
    assert f"and {len(deleted) - weights.MAX_PROBLEMS_SHOWN} more" in lines[-1]


@pytest.mark.parametrize(
    "name", ["x_embedder.proj.weight", "pos_embed", "context_embedder.weight", "y_embedder.mlp.0.weight"]
)
def test_a_defining_tensor_of_the_wrong_rank_is_refused_by_name(tmp_path: Path, name: str) -> None:
    def flatten(tensors: dict[str, Tensor]) -> None:
        tensors[name] = tensors[name].flatten()

    assert name in problems_of(write_network(tmp_path, flatten))


def test_a_width_of_no_whole_heads_is_refused() -> None:
    shapes = native_shapes(depth=2, width=100, context_dim=8, pooled_dim=8, pos_embed_max_size=4, qk_norm=False)
    with pytest.raises(ModelFilesError, match="width 100 is not a multiple of the head width, 64"):
        detect_config(shapes)


# --- adapters ----------------------------------------------------------------------------------------------------------

RANK, ALPHA = 4, 6.0


@pytest.fixture(scope="module")
def config(tiny_model: Path) -> MMDiTConfig:
    return MMDiTFile(tiny_model / "mmdit.safetensors").config


@pytest.fixture(scope="module")
def adapted(tiny_model: Path, config: MMDiTConfig) -> tuple[list[torch.nn.Module], LoraWeights]:
    """The layers with an adapter on every linear module, none of it zero, and its weights."""
    file = MMDiTFile(tiny_model / "mmdit.safetensors")
    targets = weights.linear_module_names(config)
    generator = torch.Generator().manual_seed(0)
    layers, pairs = [], {}
    for index in range(num_layers(config)):
        layer, prefix = file.load_layer(index, 6, torch.float32), layer_prefix(config, index)
        lora.inject(layer, prefix, targets, rank=RANK, alpha=ALPHA, seed=1)
        for name, parameter in layer.named_parameters():
            if ".lora_B." in name:
                parameter.data = 0.1 * torch.randn(parameter.shape, generator=generator)
        values = {name: parameter.detach() for name, parameter in layer.named_parameters()}
        pairs.update(lora.collect(layer, prefix, values, ALPHA).pairs)
        layers.append(layer)
    assert set(pairs) == set(targets)
    return layers, LoraWeights(pairs, ALPHA)


@pytest.fixture(scope="module")
def adapted_velocity(adapted: tuple[list[torch.nn.Module], LoraWeights]) -> Tensor:
    value: Any = network_inputs()
    with torch.no_grad():
        for layer in adapted[0]:
            value = layer(value)
    return unpatchify(value, 8, 4, 2)


def network_inputs() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(5)
    context = torch.randn(2, 6, CONTEXT_DIM, generator=generator)
    pooled = torch.randn(2, POOLED_DIM, generator=generator)
    return torch.randn(2, 16, 8, 4, generator=generator), torch.tensor([900.0, 30.0]), context, pooled


@torch.no_grad()
def diffusers_velocity(network: Any) -> Tensor:
    latents, timestep, context, pooled = network_inputs()
    return network(latents, context, pooled, timestep, return_dict=False)[0]


def test_the_adapter_matters(tiny_model: Path, config: MMDiTConfig, adapted_velocity: Tensor) -> None:
    base = diffusers_velocity(diffusers_network(config, load_file(tiny_model / "mmdit.safetensors")))
    assert relative_error(adapted_velocity, base) > 0.1


def test_exported_adapter_in_diffusers_gives_the_trained_velocity(
    tiny_model: Path,
    tmp_path: Path,
    config: MMDiTConfig,
    adapted: tuple[list[torch.nn.Module], LoraWeights],
    adapted_velocity: Tensor,
) -> None:
    path = tmp_path / "lora_diffusers.safetensors"
    save_file(weights.diffusers_lora_tensors(adapted[1], config), path)
    network = diffusers_network(config, load_file(tiny_model / "mmdit.safetensors"))
    network.load_lora_adapter(load_file(path), prefix="transformer")
    assert relative_error(diffusers_velocity(network), adapted_velocity) <= 1e-5


def test_native_adapter_merged_as_other_tools_do_gives_the_trained_velocity(
    tiny_model: Path,
    config: MMDiTConfig,
    adapted: tuple[list[torch.nn.Module], LoraWeights],
    adapted_velocity: Tensor,
) -> None:
    """W + up down alpha / rank, over modules found by their underscored names."""
    exported = weights.native_lora_tensors(adapted[1])
    merged = load_file(tiny_model / "mmdit.safetensors")
    for name in [name for name, tensor in merged.items() if name.endswith(".weight") and tensor.dim() == 2]:
        key = "lora_unet_" + name.removesuffix(".weight").replace(".", "_")
        down, up = exported.pop(f"{key}.lora_down.weight"), exported.pop(f"{key}.lora_up.weight")
        merged[name] = merged[name] + up @ down * (float(exported.pop(f"{key}.alpha")) / down.shape[0])
    assert not exported
    network = MMDiT(config)
    network.load_state_dict(merged)
    with torch.no_grad():
        assert relative_error(network(*network_inputs()), adapted_velocity) <= 1e-5


def test_native_keys_are_those_of_other_tools(adapted: tuple[list[torch.nn.Module], LoraWeights]) -> None:
    modules = [line for line in GOLDEN_KEYS.read_text().splitlines() if not line.startswith("#")]
    expected = {f"{module}.{part}" for module in modules for part in ("lora_down.weight", "lora_up.weight", "alpha")}
    assert set(weights.native_lora_tensors(adapted[1])) == expected


def test_native_alpha_is_a_scalar_that_is_not_folded_in(adapted: tuple[list[torch.nn.Module], LoraWeights]) -> None:
    exported = weights.native_lora_tensors(adapted[1])
    alphas = [tensor for key, tensor in exported.items() if key.endswith(".alpha")]
    assert all(alpha.shape == () and float(alpha) == ALPHA for alpha in alphas)
    key, (down, up) = next(iter(adapted[1].pairs.items()))
    assert torch.equal(exported[f"lora_unet_{key.replace('.', '_')}.lora_up.weight"], up)
    assert torch.equal(exported[f"lora_unet_{key.replace('.', '_')}.lora_down.weight"], down)


def test_diffusers_keys_carry_no_alpha_and_the_transformer_prefix(
    adapted: tuple[list[torch.nn.Module], LoraWeights], config: MMDiTConfig
) -> None:
    keys = list(weights.diffusers_lora_tensors(adapted[1], config))
    assert all(key.startswith("transformer.") and key.endswith((".lora_A.weight", ".lora_B.weight")) for key in keys)
    num_fused = sum(name.endswith(".qkv") for name in adapted[1].pairs)
    assert num_fused == 2 * DEPTH + 1
    assert len(keys) == 2 * (len(adapted[1].pairs) + 2 * num_fused)


@pytest.mark.parametrize("variant", ["SD3-medium", "SD3.5-medium", "SD3.5-large"])
def test_every_linear_of_a_released_model_has_a_name_in_diffusers(variant: str) -> None:
    from diffusers import SD3Transformer2DModel

    shape, _ = RELEASED[variant]
    released = detect_config(native_shapes(context_dim=4096, pooled_dim=2048, **shape))
    ours = [name for module in weights.linear_module_names(released) for name in weights.diffusers_modules(module, released)]
    with torch.device("meta"):
        network = SD3Transformer2DModel(
            num_layers=released.depth,
            num_attention_heads=released.num_heads,
            attention_head_dim=64,
            caption_projection_dim=released.hidden_size,
            joint_attention_dim=4096,
            pooled_projection_dim=2048,
            pos_embed_max_size=4,
            dual_attention_layers=released.dual_attention_layers,
            qk_norm="rms_norm" if released.qk_norm else None,
        )
    theirs = [name for name, module in network.named_modules() if isinstance(module, torch.nn.Linear)]
    assert sorted(ours) == sorted(theirs)
