"""Invalid adapter files: every message names the file, what was found and what was expected."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from models.family import ModelFilesError
from models.sd3.lora_export import native_adapter
from models.sd3.network_shapes import adaptable_modules
from models.sd3.variants import detect_config
from models.tensor_files import MAX_ERRORS_SHOWN
from tests.golden.make_lora_keys import released_shapes
from tests.models.sd3.lora_cases import (
    MODULES,
    draw_adapters,
    errors_of,
    errors_with,
    opened,
    read_all,
)
from tests.tiny_model import Shape

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
def test_file_of_another_format_is_named(tmp_path: Path, content: bytes, text: str) -> None:
    (tmp_path / "adapter.safetensors").write_bytes(content)
    assert errors_of(tmp_path / "adapter.safetensors")[0].startswith(text)


def test_missing_file_is_named(tmp_path: Path) -> None:
    assert errors_of(tmp_path / "none.safetensors") == ["FILE does not exist"]


def test_file_without_tensors_is_refused(tmp_path: Path) -> None:
    assert errors_with(tmp_path, {}) == ["FILE: contains no adapter for this network"]


def test_file_for_text_encoders_only_is_refused(tmp_path: Path) -> None:
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
def test_adapter_of_another_network_is_refused(tmp_path: Path, module: str) -> None:
    names = [f"{module}{number}" for number in ("", "_b", "_c")]
    tensors = {key: value for name in names for key, value in low_rank(name, 8, 8).items()}
    [error] = errors_with(tmp_path, tensors)
    assert error.startswith(f"FILE: has tensors that belong to no module of this network: {module}")
    assert error.endswith(" and 3 more")


@pytest.mark.parametrize(("present", "missing"), [("lora_down.weight", "up"), ("lora_up.weight", "down")])
def test_down_without_up_and_up_without_down_are_refused(tmp_path: Path, present: str, missing: str) -> None:
    tensors = {f"{FC1}.{present}": torch.zeros(2, 2), f"{FC1}.alpha": torch.tensor(1.0)}
    assert errors_with(tmp_path, tensors) == [f"FILE: {FC1} has no {missing}"]


@pytest.mark.parametrize(("key", "shape"), [("alpha", ()), ("dora_scale", (512, 1)), ("lokr_w1_b", (2, 2))])
def test_module_without_an_update_is_refused(tmp_path: Path, key: str, shape: Shape) -> None:
    errors = errors_with(tmp_path, {f"{FC1}.{key}": torch.zeros(shape)})
    if key.startswith("lokr"):
        assert errors == [f"FILE: {FC1} has neither {w} nor {w}_a and {w}_b of matching shapes" for w in ("w1", "w2")]
    else:
        assert errors == [f"FILE: {FC1} has no down and no up"]


def test_errors_of_an_adapter_for_a_wider_variant_are_limited(tmp_path: Path) -> None:
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


def test_adapter_of_sd35_large_is_refused_for_sd35_medium(tmp_path: Path) -> None:
    medium = adaptable_modules(detect_config(released_shapes("SD3.5-medium")))
    large = adaptable_modules(detect_config(released_shapes("SD3.5-large")))
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


def test_module_under_two_names_is_refused(tmp_path: Path) -> None:
    twice = {**low_rank("lora_unet_final_layer_linear", 64, 128), **low_rank("transformer.proj_out", 64, 128)}
    assert errors_with(tmp_path, twice) == [
        "FILE: final_layer.linear occurs twice, as lora_unet_final_layer_linear and transformer.proj_out"
    ]
    fused = low_rank("lora_unet_joint_blocks_0_x_block_attn_qkv", 384, 128)
    [error] = errors_with(tmp_path, {**fused, **low_rank(f"{TO}k", 128, 128)})
    assert error.startswith("FILE: joint_blocks.0.x_block.attn.qkv occurs twice, as ")


def test_tensor_under_two_suffixes_is_refused(tmp_path: Path) -> None:
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
def test_magnitudes_that_are_not_one_per_row_are_refused(tmp_path: Path, suffix: str, shape: Shape, text: str) -> None:
    tensors = {**low_rank(FC1, 512, 128), f"{FC1}.{suffix}": torch.ones(shape)}
    assert errors_with(tmp_path, tensors) == [f"FILE: {FC1} {text}"]


def test_magnitudes_per_column_of_a_square_weight_are_refused(tmp_path: Path) -> None:
    """LyCORIS writes them for DoRA along the input axis."""
    key = "lora_unet_joint_blocks_0_x_block_attn_proj"
    [error] = errors_with(tmp_path, {**low_rank(key, 128, 128), f"{key}.dora_scale": torch.ones(1, 128)})
    assert "has one magnitude per column" in error


def test_magnitudes_of_only_some_of_query_key_and_value_are_refused(tmp_path: Path) -> None:
    tensors = {key: value for part in "qkv" for key, value in low_rank(f"{TO}{part}", 128, 128).items()}
    tensors[f"{TO}q.lora_magnitude_vector"] = torch.ones(128)
    text = "FILE: joint_blocks.0.x_block.attn.qkv has DoRA for only some of query, key and value"
    assert errors_with(tmp_path, tensors) == [text]
    only_query = {key: value for key, value in tensors.items() if key.startswith(f"{TO}q.")}
    assert errors_with(tmp_path, only_query) == [text]


def test_kronecker_adapters_of_unsupported_modules_and_shapes_are_refused(tmp_path: Path) -> None:
    def factors(key: str, *shapes: Shape) -> dict[str, Tensor]:
        return {f"{key}.lokr_w{index}": torch.zeros(shape) for index, shape in enumerate(shapes, start=1)}

    assert errors_with(tmp_path, factors(f"{TO}q", (8, 8), (16, 16))) == [
        f"FILE: {TO}q is a Kronecker adapter of one part of a fused qkv; "
        "only Kronecker adapters with native keys are supported there"
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
    mismatched = {f"{FC1}.lokr_w2_a": torch.zeros(64, 2), f"{FC1}.lokr_w2_b": torch.zeros(3, 16)}
    assert errors_with(tmp_path, {**factors(FC1, (8, 8)), **mismatched}) == [
        f"FILE: {FC1} has neither w2 nor w2_a and w2_b of matching shapes"
    ]
    assert errors_with(tmp_path, {**factors(FC1, (8, 8), (64, 16)), **low_rank(FC1, 512, 128)}) == [
        f"FILE: {FC1} is a low-rank and a Kronecker adapter at once"
    ]


def test_alpha_with_several_numbers_is_refused(tmp_path: Path) -> None:
    tensors = {**low_rank(FC1, 512, 128), f"{FC1}.alpha": torch.ones(2)}
    assert errors_with(tmp_path, tensors) == [f"FILE: {FC1}.alpha is not a single number"]


@pytest.mark.parametrize("header", ["{", "[1]"])
def test_unreadable_peft_settings_are_refused(tmp_path: Path, header: str) -> None:
    [error] = errors_with(tmp_path, low_rank(FC1, 512, 128), {"lora_adapter_metadata": header})
    assert error.startswith("FILE: comes with peft settings that cannot be read: ")


def test_all_errors_are_reported_at_once(tmp_path: Path) -> None:
    tensors = {
        f"{FC1}.lora_down.weight": torch.zeros(2, 128),
        "lora_unet_unheard_of.lora_down.weight": torch.zeros(2, 2),
        **low_rank("lora_unet_final_layer_linear", 64, 99),
    }
    assert len(errors_with(tmp_path, tensors)) == 3


def test_integer_alpha_is_accepted(tmp_path: Path) -> None:
    """Scripts that extract adapters write integers."""
    written = draw_adapters("lora")
    tensors = native_adapter(written)
    integers = {key: torch.tensor(3) if key.endswith(".alpha") else tensor for key, tensor in tensors.items()}
    for name, adapter in read_all(opened(tmp_path, integers)).items():
        assert adapter.scale == 3 / written[name].tensors["down"].shape[0]


@pytest.mark.parametrize("alpha", [float("nan"), float("inf")])
def test_non_finite_alpha_is_refused(tmp_path: Path, alpha: float) -> None:
    tensors = native_adapter(draw_adapters("lora"))
    changed = {key: torch.tensor(alpha) if key.endswith(".alpha") else tensor for key, tensor in tensors.items()}
    with pytest.raises(ModelFilesError, match="has no finite scale"):
        opened(tmp_path, changed)
