"""Random adapters of every kind on the tiny network, their effect by an independent computation, and helpers to read files.

Updates are computed in float64 and with different operations from the program's.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from models.family import LoraFile, ModelFilesError, ModuleAdapter
from models.sd3.lora_files import open_lora_file
from models.sd3.mmdit import MMDiT
from models.sd3.variants import detect_config
from tests.models.sd3.diffusers_reference import diffusers_network, relative_error
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


# --- adapters and their effect -----------------------------------------------------------------------------------------


def draw_adapters(kind: str, seed: int = 0) -> Adapters:
    """Random adapters on every module (LoKr: every linear layer), ranks 2 to 5, all scales different, no tensor zero."""
    generator = torch.Generator().manual_seed(seed)
    adapters: Adapters = {}
    for index, (name, shape) in enumerate(MODULES.items()):
        if kind.startswith("lokr") and len(shape) == 4:
            continue
        draw = draw_kronecker if kind.startswith("lokr") else draw_low_rank
        tensors = draw(kind, shape, 2 + index % 4, generator)
        if kind == "dora":
            stretch = 0.7 + 0.6 * torch.rand(shape[0], generator=generator)
            tensors["magnitude"] = WEIGHTS[f"{name}.weight"].flatten(1).norm(dim=1) * stretch
        adapters[name] = ModuleAdapter(tensors, 0.3 + 0.07 * index)
    return adapters


def draw_low_rank(_: str, shape: Shape, rank: int, generator: torch.Generator) -> dict[str, Tensor]:
    down = torch.randn(rank, *shape[1:], generator=generator) / math.sqrt(math.prod(shape[1:]))
    up = 0.3 * torch.randn(shape[0], rank, *[1] * (len(shape) - 2), generator=generator)
    return {"down": down, "up": up}


def draw_kronecker(kind: str, shape: Shape, rank: int, generator: torch.Generator) -> dict[str, Tensor]:
    """Splits both sides of the weight into two factors of similar size; w1 has the smaller ones."""
    rank = 2 + rank % 2  # LyCORIS factorizes only for ranks this low
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
    """Returns the update of a weight before any magnitude: (out, in * k * k), float64."""
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
    """Returns the weight with its adapter, float64."""
    flat = weight.double().flatten(1)
    with_update = flat + delta(adapter)
    if "magnitude" in adapter.tensors:
        norms = with_update.square().sum(dim=1).sqrt()
        with_update = torch.diag(adapter.tensors["magnitude"].double() / norms) @ with_update
    return (flat + strength * (with_update - flat)).reshape(weight.shape)


def adapted_weights(adapters: Mapping[str, ModuleAdapter], strength: float = 1.0) -> dict[str, Tensor]:
    changed = {f"{name}.weight": adapted(WEIGHTS[f"{name}.weight"], adapters[name], strength).float() for name in adapters}
    return {**WEIGHTS, **changed}


# --- the network with adapters -----------------------------------------------------------------------------------------


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
    """Returns diffusers' pipeline with the tiny network and no other component."""
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
    """Reads every module of the file and checks that its shapes are those announced."""
    adapters = {name: file.read(name) for name in file.shapes}
    for name, adapter in adapters.items():
        assert {kind: tuple(tensor.shape) for kind, tensor in adapter.tensors.items()} == dict(file.shapes[name]), name
        assert all(tensor.dtype == torch.float32 for tensor in adapter.tensors.values())
    return adapters


def assert_same_effect(found: Mapping[str, ModuleAdapter], expected: Mapping[str, ModuleAdapter]) -> None:
    assert set(found) == set(expected)
    for name in expected:
        weight = WEIGHTS[f"{name}.weight"]
        assert relative_error(delta(found[name]), delta(expected[name])) <= TOLERANCE, name
        assert relative_error(adapted(weight, found[name]), adapted(weight, expected[name])) <= TOLERANCE, name
