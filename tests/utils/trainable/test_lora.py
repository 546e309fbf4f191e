"""Adapters in a layer: initial weights, arithmetic, collection of their tensors, and initial weights from a file."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from models.family import LoraFile, ModuleAdapter
from utils import randomness
from utils.trainable.initial_weights import load_initial_values
from utils.trainable.peft_layers import collect, inject
from utils.trainable.targets import LoraTarget, LoraTargets

PREFIX = "blocks.1."
RANK, ALPHA = 4, 6.0
KINDS: dict[str, dict[str, Any]] = {
    "lora": {"kind": "lora"},
    "rslora": {"kind": "lora", "rank_stabilized": True},
    "dora": {"kind": "lora", "dora": True},
    "rsdora": {"kind": "lora", "rank_stabilized": True, "dora": True},
    "lokr": {"kind": "lokr"},
}
LINEARS = ("x.attn.qkv", "x.attn2.qkv", "attn.qkv", "mlp.fc2")
INPUTS = {"x.attn.qkv": 24, "x.attn2.qkv": 24, "attn.qkv": 24, "mlp.fc2": 96}
MODULES = (*LINEARS, "patches")


class Layer(nn.Module):
    """Modules whose names are prefixes and suffixes of each other, and a convolution; 24 is 4 x 6, 72 is 8 x 9."""

    def __init__(self) -> None:
        super().__init__()
        self.x = nn.ModuleDict({name: nn.ModuleDict({"qkv": nn.Linear(24, 72)}) for name in ("attn", "attn2")})
        self.attn = nn.ModuleDict({"qkv": nn.Linear(24, 72)})
        self.mlp = nn.ModuleDict({"fc2": nn.Linear(96, 24)})
        self.patches = nn.Conv2d(3, 24, kernel_size=2, stride=2)


def layer(seed: int = 0, dtype: torch.dtype = torch.float32) -> Layer:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Layer().to(dtype)


def input_of(module: str, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    shape = (2, 3, 4, 6) if module == "patches" else (2, 5, INPUTS[module])
    return torch.randn(shape, generator=generator).to(dtype)


def targets_of(
    kind: str, modules: tuple[str, ...] | None = None, *, rank: int = RANK, alpha: float = ALPHA, **ranks: Any
) -> LoraTargets:
    """Targets of a kind. `ranks`: rank and alpha of single modules, by name with underscores for dots."""
    shapes = {name: tuple(module.weight.shape) for name, module in layer().named_modules() if hasattr(module, "weight")}
    chosen = modules if modules is not None else LINEARS if kind == "lokr" else MODULES
    settings = {"rank_stabilized": False, "dora": False, **KINDS[kind]}
    entries = {PREFIX + name: LoraTarget(shapes[name], *ranks.get(name.replace(".", "_"), (rank, alpha))) for name in chosen}
    return LoraTargets(modules=entries, **settings)


def injected(targets: LoraTargets, *, seed: int = 0, dtype: torch.dtype = torch.float32) -> Layer:
    adapted = layer(dtype=dtype)
    inject(adapted, PREFIX, targets, seed=seed)
    return adapted


def trained_tensors(module: nn.Module) -> dict[str, Tensor]:
    return {name: parameter.detach().clone() for name, parameter in module.named_parameters() if parameter.requires_grad}


def adapters_of(module: nn.Module) -> dict[str, ModuleAdapter]:
    return collect(module, PREFIX, {name: tensor.detach().clone() for name, tensor in module.named_parameters()})


def shake(module: nn.Module, seed: int = 5) -> None:
    """Moves every trained tensor away from its initial values, as training does."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.requires_grad:
                noise = 0.3 * torch.randn(parameter.shape, generator=generator)
                parameter.add_(noise.to(parameter.dtype))


def call(module: nn.Module, name: str, dtype: torch.dtype = torch.float32) -> Tensor:
    with torch.no_grad():
        return module.get_submodule(name)(input_of(name, dtype))


def file_of(adapters: Mapping[str, ModuleAdapter]) -> LoraFile:
    shapes = {
        name: {part: tuple(tensor.shape) for part, tensor in adapter.tensors.items()} for name, adapter in adapters.items()
    }
    return LoraFile(Path("start.safetensors"), shapes, lambda name: adapters[name], ())


def trained_file(kind: str, **changes: Any) -> tuple[Layer, LoraFile]:
    """A layer with a trained adapter, and the file it would be saved to."""
    adapted = injected(targets_of(kind, **changes))
    shake(adapted)
    return adapted, file_of(adapters_of(adapted))


# --- initial weights ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_new_adapter_does_not_change_the_output(kind: str, dtype: torch.dtype) -> None:
    targets = targets_of(kind)
    adapted, plain = injected(targets, dtype=dtype), layer(dtype=dtype)
    for name in (name.removeprefix(PREFIX) for name in targets.modules):
        assert torch.equal(call(adapted, name, dtype), call(plain, name, dtype)), name


@pytest.mark.parametrize("kind", KINDS)
def test_only_adapter_tensors_are_trained_in_the_precision_of_the_layer(kind: str) -> None:
    targets = targets_of(kind)
    tensors = trained_tensors(injected(targets, dtype=torch.bfloat16))
    assert len(tensors) == sum(len(targets.shapes(module)) for module in targets.modules)
    assert all(".lora_" in name or ".lokr_" in name for name in tensors)
    assert {tensor.dtype for tensor in tensors.values()} == {torch.bfloat16}


def test_layer_without_targets_is_frozen_and_otherwise_unchanged() -> None:
    adapted = layer()
    names = list(adapted.state_dict())
    inject(adapted, "blocks.0.", targets_of("lora"), seed=0)
    assert not trained_tensors(adapted)
    assert list(adapted.state_dict()) == names
    assert adapters_of(adapted) == {}


@pytest.mark.parametrize("kind", KINDS)
def test_one_factor_is_zero_at_first_and_the_others_are_not(kind: str) -> None:
    for adapter in adapters_of(injected(targets_of(kind))).values():
        for part, tensor in adapter.tensors.items():
            assert bool(tensor.any()) == (part not in ("up", "w1", "w1_a")), part


def test_initial_magnitudes_are_the_norms_of_the_rows() -> None:
    plain = layer()
    for name, adapter in adapters_of(injected(targets_of("dora"))).items():
        rows = plain.get_parameter(name.removeprefix(PREFIX) + ".weight").detach().flatten(1)
        torch.testing.assert_close(adapter.tensors["magnitude"], (rows**2).sum(1).sqrt())


@pytest.mark.parametrize("kind", KINDS)
def test_initial_weights_depend_on_seed_and_module_only(kind: str) -> None:
    """Injection alone, after another layer or together with more targets gives the same initial weights."""
    first = trained_tensors(injected(targets_of(kind, LINEARS[:2])))
    torch.manual_seed(123)
    inject(layer(), "blocks.2.", targets_of(kind), seed=0)
    later = trained_tensors(injected(targets_of(kind)))
    assert all(torch.equal(later[name], tensor) for name, tensor in first.items())
    changed = trained_tensors(injected(targets_of(kind, LINEARS[:2]), seed=1))
    drawn = [name for name, tensor in first.items() if tensor.any() and "magnitude" not in name]
    assert drawn
    assert not any(torch.equal(changed[name], first[name]) for name in drawn)


@pytest.mark.parametrize("kind", KINDS)
def test_modules_of_equal_shape_have_different_initial_weights(kind: str) -> None:
    tensors = trained_tensors(injected(targets_of(kind, LINEARS[:3])))
    drawn = [tensor.flatten() for name, tensor in tensors.items() if tensor.any() and "magnitude" not in name]
    numbers = torch.cat(drawn)
    assert len(numbers.unique()) > 0.99 * len(numbers)


def test_equal_modules_of_two_blocks_have_different_initial_weights() -> None:
    modules = targets_of("lora", ("attn.qkv",)).modules
    both = LoraTargets("lora", False, False, {**modules, "blocks.2.attn.qkv": modules["blocks.1.attn.qkv"]})
    downs = []
    for prefix in ("blocks.1.", "blocks.2."):
        adapted = layer()
        inject(adapted, prefix, both, seed=0)
        downs.append(trained_tensors(adapted)["attn.qkv.lora_A.default.weight"])
    assert not torch.equal(*downs)


@pytest.mark.parametrize(
    ("kind", "name", "fan_in"),
    [("lora", "mlp.fc2.lora_A.default.weight", 96), ("lora", "patches.lora_A.default.weight", 12)],
)
def test_initial_weights_have_the_range_of_a_new_module(kind: str, name: str, fan_in: int) -> None:
    down = trained_tensors(injected(targets_of(kind, rank=64)))[name]
    bound = 1 / fan_in**0.5
    assert 0.98 * bound < float(down.abs().max()) <= bound


def test_random_key_of_lora_is_unchanged() -> None:
    """The key decides which initial weights a seed gives."""
    down = trained_tensors(injected(targets_of("lora", ("attn.qkv",)), seed=3))["attn.qkv.lora_A.default.weight"]
    expected = randomness.kaiming_uniform(3, "lora", "blocks.1.attn.qkv", shape=(RANK, 24))
    assert torch.equal(down, expected)


@pytest.mark.parametrize("kind", KINDS)
def test_global_random_state_is_unchanged(kind: str) -> None:
    targets, adapted = targets_of(kind), layer()
    torch.manual_seed(11)
    before = torch.get_rng_state()
    inject(adapted, PREFIX, targets, seed=0)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("kind", KINDS)
def test_injection_gives_no_warning(kind: str) -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        injected(targets_of(kind, attn_qkv=(2, 1.0)))
    assert [str(warning.message) for warning in caught] == []


# --- arithmetic --------------------------------------------------------------------------------------------------------


def scale_of(kind: str, rank: int, alpha: float) -> float:
    return alpha / math.sqrt(rank) if kind.startswith("rs") else alpha / rank


def update(tensors: Mapping[str, Tensor]) -> Tensor:
    """The update without scale and magnitude, in index notation."""
    if "down" in tensors:
        axes = "ro,oi->ri" if tensors["down"].dim() == 2 else "roxy,oikl->rikl"
        return torch.einsum(axes, tensors["up"], tensors["down"])
    w2 = tensors["w2"] if "w2" in tensors else torch.einsum("br,rd->bd", tensors["w2_a"], tensors["w2_b"])
    product = torch.einsum("ac,bd->abcd", tensors["w1"], w2)
    return product.reshape(product.shape[0] * product.shape[1], -1)


def merged(weight: Tensor, tensors: Mapping[str, Tensor], scale: float) -> Tensor:
    changed = weight + scale * update(tensors)
    if "magnitude" in tensors:
        for row, length in enumerate(tensors["magnitude"]):
            changed[row] *= length / (changed[row] ** 2).sum().sqrt()
    return changed


SIZES: list[dict[str, Any]] = [{}, {"rank": 1}, {"alpha": 1.0}, {"rank": 8, "alpha": 2.0}, {"rank": 7, "alpha": 7.0}]


@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_module_with_adapter_equals_module_with_merged_weight(kind: str, sizes: dict[str, Any]) -> None:
    targets = targets_of(kind, **sizes)
    adapted, plain = injected(targets), layer()
    shake(adapted)
    for name, adapter in adapters_of(adapted).items():
        module = plain.get_submodule(name.removeprefix(PREFIX))
        assert adapter.scale == pytest.approx(scale_of(kind, targets.modules[name].rank, targets.modules[name].alpha))
        assert isinstance(module.weight, Tensor)
        with torch.no_grad():
            before = module(input_of(name.removeprefix(PREFIX)))
            module.weight.copy_(merged(module.weight, adapter.tensors, adapter.scale))
        result = call(adapted, name.removeprefix(PREFIX))
        assert (result - before).abs().max() > 0.01
        torch.testing.assert_close(result, call(plain, name.removeprefix(PREFIX)), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_each_module_has_its_own_rank_and_alpha(kind: str) -> None:
    """Holds also where a name is a suffix of another: peft compares suffixes."""
    own: dict[str, Any] = {"attn_qkv": (2, 1.0), "x_attn_qkv": (3, 5.0)}
    found = adapters_of(injected(targets_of(kind, LINEARS, **own)))
    expected = {"attn.qkv": (2, 1.0), "x.attn.qkv": (3, 5.0), "x.attn2.qkv": (RANK, ALPHA)}
    for name, (rank, alpha) in expected.items():
        adapter = found[PREFIX + name]
        assert adapter.tensors["w2_b" if kind == "lokr" else "down"].shape[0] == rank
        assert adapter.scale == pytest.approx(scale_of(kind, rank, alpha))


@pytest.mark.parametrize("chosen", [("attn.qkv",), ("x.attn.qkv",), ("x.attn2.qkv",)], ids=str)
def test_target_does_not_match_names_that_contain_it(chosen: tuple[str, ...]) -> None:
    assert set(adapters_of(injected(targets_of("lora", chosen)))) == {PREFIX + name for name in chosen}


@pytest.mark.parametrize("kind", KINDS)
def test_every_adapter_tensor_has_a_gradient(kind: str) -> None:
    targets = targets_of(kind)
    adapted = injected(targets).train()
    shake(adapted)
    for name in targets.modules:
        local = name.removeprefix(PREFIX)
        adapted.get_submodule(local)(input_of(local)).square().mean().backward()
    trained = [(name, parameter) for name, parameter in adapted.named_parameters() if parameter.requires_grad]
    assert [name for name, parameter in trained if parameter.grad is None or not parameter.grad.any()] == []


def test_no_module_is_skipped_at_random(monkeypatch: pytest.MonkeyPatch) -> None:
    """peft's LoKr draws a number in each forward and skips the module when it is 0, even with module_dropout = 0."""
    from peft import LoKrConfig, inject_adapter_in_model

    adapted = injected(targets_of("lokr")).train()
    shake(adapted)
    expected = call(adapted, "attn.qkv")
    unpatched = inject_adapter_in_model(LoKrConfig(r=RANK, target_modules="attn.qkv", init_weights=False), layer()).train()
    monkeypatch.setattr(torch, "rand", lambda *shape: torch.zeros(*shape))
    assert torch.equal(call(adapted, "attn.qkv"), expected)
    assert torch.equal(call(unpatched, "attn.qkv"), call(layer(), "attn.qkv")), "the setting is no longer needed"


# --- shapes without weights --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rank", [1, 4, 5, 12])
@pytest.mark.parametrize("kind", KINDS)
def test_targets_have_the_shape_of_every_tensor(kind: str, rank: int) -> None:
    """LoKr's second factor, 9 x 6 of qkv and 6 x 12 of fc2, is a full matrix from ranks 4.5 and 6 on."""
    targets = targets_of(kind, rank=rank)
    adapted = injected(targets)
    found = adapters_of(adapted)
    assert list(found) == list(targets.modules)
    for name, adapter in found.items():
        assert {part: tuple(tensor.shape) for part, tensor in adapter.tensors.items()} == targets.shapes(name)
    counted = sum(tensor.numel() for tensor in trained_tensors(adapted).values())
    assert sum(targets.num_parameters(name) for name in targets.modules) == counted


@pytest.mark.parametrize("size", [1, 2, 64, 127, 1536, 4608])
def test_targets_have_the_factors_of_any_side(size: int) -> None:
    module = nn.ModuleDict({"m": nn.Linear(size, 8, bias=False)})
    targets = LoraTargets("lokr", False, False, {"m": LoraTarget((8, size), 2, 2.0)})
    inject(module, "", targets, seed=0)
    (adapter,) = adapters_of(module).values()
    assert {part: tuple(tensor.shape) for part, tensor in adapter.tensors.items()} == targets.shapes("m")


@pytest.mark.parametrize(
    ("kind", "ranks", "text"),
    [
        ("lora", {}, "LoRA of rank 4 on 5 modules"),
        ("dora", {}, "DoRA of rank 4 on 5 modules"),
        ("lokr", {}, "LoKr of rank 4 on 4 modules"),
        ("rslora", {"mlp_fc2": (16, 1.0)}, "rank-stabilized LoRA of rank 4 to 16 on 5 modules"),
    ],
)
def test_targets_describe_kind_rank_and_number_of_modules(kind: str, ranks: dict[str, Any], text: str) -> None:
    assert targets_of(kind, **ranks).describe() == text


# --- collecting --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_collected_adapters_have_the_given_values_by_native_name(kind: str) -> None:
    """Holds for tensors on the meta device too."""
    targets = targets_of(kind)
    adapted = injected(targets)
    values = {name: parameter.detach() for name, parameter in adapted.named_parameters()}
    empty = {name: tensor.to("meta") for name, tensor in values.items()}
    collected = collect(adapted, PREFIX, values)
    assert set(collected) == set(targets.modules)
    by_address = {tensor.data_ptr() for name, tensor in values.items() if ".lora_" in name or ".lokr_" in name}
    assert {tensor.data_ptr() for adapter in collected.values() for tensor in adapter.tensors.values()} == by_address
    for name, adapter in collect(adapted, PREFIX, empty).items():
        assert {part: tuple(tensor.shape) for part, tensor in adapter.tensors.items()} == targets.shapes(name)


# --- initial weights from a file ---------------------------------------------------------------------------------------


def assert_same_function(adapted: nn.Module, reference: nn.Module, tolerance: float = 1e-5) -> None:
    for name in adapters_of(reference):
        local = name.removeprefix(PREFIX)
        torch.testing.assert_close(call(adapted, local), call(reference, local), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("kind", KINDS)
def test_file_of_equal_settings_is_loaded_bitwise(kind: str) -> None:
    reference, file = trained_file(kind)
    adapted = injected(targets_of(kind))
    load_initial_values(adapted, PREFIX, file)
    expected, found = trained_tensors(reference), trained_tensors(adapted)
    assert expected.keys() == found.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


@pytest.mark.parametrize("kind", KINDS)
def test_file_of_another_scale_gives_the_same_function(kind: str) -> None:
    reference, file = trained_file(kind, alpha=1.5)
    adapted = injected(targets_of(kind, alpha=40.0))
    load_initial_values(adapted, PREFIX, file)
    assert_same_function(adapted, reference)
    assert adapters_of(adapted)[PREFIX + "attn.qkv"].scale == pytest.approx(scale_of(kind, RANK, 40.0))


@pytest.mark.parametrize(("saved", "wanted"), [("lora", "rslora"), ("rslora", "lora"), ("dora", "rsdora")])
def test_file_of_lower_rank_is_padded_and_gives_the_same_function(saved: str, wanted: str) -> None:
    reference, file = trained_file(saved, rank=3)
    fresh, adapted = injected(targets_of(wanted, rank=8)), injected(targets_of(wanted, rank=8))
    load_initial_values(adapted, PREFIX, file)
    assert_same_function(adapted, reference)
    for name, adapter in adapters_of(adapted).items():
        assert torch.equal(adapter.tensors["down"][:3], file.read(name).tensors["down"])
        assert torch.equal(adapter.tensors["down"][3:], adapters_of(fresh)[name].tensors["down"][3:])
        assert not adapter.tensors["up"][:, 3:].any()


def test_lora_file_gives_a_dora_the_same_function() -> None:
    reference, file = trained_file("lora", rank=2)
    adapted = injected(targets_of("dora"))
    load_initial_values(adapted, PREFIX, file)
    assert_same_function(adapted, reference)
    for name, adapter in adapters_of(adapted).items():
        weight = layer().get_parameter(name.removeprefix(PREFIX) + ".weight").detach()
        rows = merged(weight, file.read(name).tensors, file.read(name).scale).flatten(1)
        torch.testing.assert_close(adapter.tensors["magnitude"], (rows**2).sum(1).sqrt())


def test_modules_missing_in_the_file_have_new_initial_weights() -> None:
    _, file = trained_file("lora", modules=("attn.qkv",))
    fresh, adapted = trained_tensors(injected(targets_of("lora"))), injected(targets_of("lora"))
    load_initial_values(adapted, PREFIX, file)
    different = {name for name, tensor in trained_tensors(adapted).items() if not torch.equal(tensor, fresh[name])}
    assert different == {"attn.qkv.lora_A.default.weight", "attn.qkv.lora_B.default.weight"}


@pytest.mark.parametrize("kind", KINDS)
def test_values_of_a_file_are_rounded_to_the_precision_of_the_parameters(kind: str) -> None:
    _, file = trained_file(kind, alpha=2.0)
    adapted = injected(targets_of(kind), dtype=torch.bfloat16)
    parameters = dict(adapted.named_parameters())
    load_initial_values(adapted, PREFIX, file)
    assert all(parameter is parameters[name] for name, parameter in adapted.named_parameters())
    assert {parameter.dtype for parameter in adapted.parameters() if parameter.requires_grad} == {torch.bfloat16}
    for name, adapter in adapters_of(adapted).items():
        saved = file.read(name)
        expected = saved.scale * update(saved.tensors)
        found = adapter.scale * update({part: tensor.float() for part, tensor in adapter.tensors.items()})
        torch.testing.assert_close(found, expected, rtol=0.05, atol=0.05)


def test_no_module_of_another_layer_is_read() -> None:
    _, file = trained_file("lora")
    requested: list[str] = []
    read: Callable[[str], ModuleAdapter] = file.read

    def remember(name: str) -> ModuleAdapter:
        requested.append(name)
        return read(name)

    shapes = {**file.shapes, "blocks.2.attn.qkv": file.shapes["blocks.1.attn.qkv"]}
    load_initial_values(injected(targets_of("lora")), PREFIX, LoraFile(file.path, shapes, remember, ()))
    assert sorted(requested) == sorted(file.shapes)
