"""Adapters: how they start, what they compute, what is taken out of them, how one goes on from a file."""

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
from utils.trainable import lora
from utils.trainable.lora import LoraTarget, LoraTargets

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
    """Modules whose names are ends and beginnings of each other's, and a convolution; 24 is 4 x 6, 72 is 8 x 9."""

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


def plan_of(
    kind: str, modules: tuple[str, ...] | None = None, *, rank: int = RANK, alpha: float = ALPHA, **ranks: Any
) -> LoraTargets:
    """`ranks`: rank and alpha of single modules, their names with underscores for dots."""
    shapes = {name: tuple(module.weight.shape) for name, module in layer().named_modules() if hasattr(module, "weight")}
    chosen = modules if modules is not None else LINEARS if kind == "lokr" else MODULES
    settings = {"rank_stabilized": False, "dora": False, **KINDS[kind]}
    plans = {PREFIX + name: LoraTarget(shapes[name], *ranks.get(name.replace(".", "_"), (rank, alpha))) for name in chosen}
    return LoraTargets(modules=plans, **settings)


def injected(plan: LoraTargets, *, seed: int = 0, dtype: torch.dtype = torch.float32) -> Layer:
    adapted = layer(dtype=dtype)
    lora.inject(adapted, PREFIX, plan, seed=seed)
    return adapted


def trained_tensors(module: nn.Module) -> dict[str, Tensor]:
    return {name: parameter.detach().clone() for name, parameter in module.named_parameters() if parameter.requires_grad}


def adapters_of(module: nn.Module) -> dict[str, ModuleAdapter]:
    return lora.collect(module, PREFIX, {name: tensor.detach().clone() for name, tensor in module.named_parameters()})


def shake(module: nn.Module, seed: int = 5) -> None:
    """As if trained: every trained tensor moves away from where it started."""
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
    """A layer whose adapter has been trained, and the file it would be saved as."""
    adapted = injected(plan_of(kind, **changes))
    shake(adapted)
    return adapted, file_of(adapters_of(adapted))


# --- the start ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_a_fresh_adapter_changes_nothing(kind: str, dtype: torch.dtype) -> None:
    plan = plan_of(kind)
    adapted, plain = injected(plan, dtype=dtype), layer(dtype=dtype)
    for name in (name.removeprefix(PREFIX) for name in plan.modules):
        assert torch.equal(call(adapted, name, dtype), call(plain, name, dtype)), name


@pytest.mark.parametrize("kind", KINDS)
def test_only_the_adapter_is_trained_in_the_layer_s_own_precision(kind: str) -> None:
    plan = plan_of(kind)
    tensors = trained_tensors(injected(plan, dtype=torch.bfloat16))
    assert len(tensors) == sum(len(plan.shapes(module)) for module in plan.modules)
    assert all(".lora_" in name or ".lokr_" in name for name in tensors)
    assert {tensor.dtype for tensor in tensors.values()} == {torch.bfloat16}


def test_a_layer_without_targets_is_frozen_and_otherwise_left_alone() -> None:
    adapted = layer()
    names = list(adapted.state_dict())
    lora.inject(adapted, "blocks.0.", plan_of("lora"), seed=0)
    assert not trained_tensors(adapted)
    assert list(adapted.state_dict()) == names
    assert adapters_of(adapted) == {}


@pytest.mark.parametrize("kind", KINDS)
def test_one_factor_starts_at_zero_and_the_others_do_not(kind: str) -> None:
    for adapter in adapters_of(injected(plan_of(kind))).values():
        for part, tensor in adapter.tensors.items():
            assert bool(tensor.any()) == (part not in ("up", "w1", "w1_a")), part


def test_magnitudes_start_as_the_lengths_of_the_rows() -> None:
    plain = layer()
    for name, adapter in adapters_of(injected(plan_of("dora"))).items():
        rows = plain.get_parameter(name.removeprefix(PREFIX) + ".weight").detach().flatten(1)
        torch.testing.assert_close(adapter.tensors["magnitude"], (rows**2).sum(1).sqrt())


@pytest.mark.parametrize("kind", KINDS)
def test_start_depends_on_seed_and_module_and_on_nothing_else(kind: str) -> None:
    """Injected alone, after another layer, or in the company of more targets: no layout changes the start."""
    first = trained_tensors(injected(plan_of(kind, LINEARS[:2])))
    torch.manual_seed(123)
    lora.inject(layer(), "blocks.2.", plan_of(kind), seed=0)
    later = trained_tensors(injected(plan_of(kind)))
    assert all(torch.equal(later[name], tensor) for name, tensor in first.items())
    changed = trained_tensors(injected(plan_of(kind, LINEARS[:2]), seed=1))
    drawn = [name for name, tensor in first.items() if tensor.any() and "magnitude" not in name]
    assert drawn
    assert not any(torch.equal(changed[name], first[name]) for name in drawn)


@pytest.mark.parametrize("kind", KINDS)
def test_same_shaped_modules_and_tensors_start_differently(kind: str) -> None:
    tensors = trained_tensors(injected(plan_of(kind, LINEARS[:3])))
    drawn = [tensor.flatten() for name, tensor in tensors.items() if tensor.any() and "magnitude" not in name]
    numbers = torch.cat(drawn)
    assert len(numbers.unique()) > 0.99 * len(numbers)


def test_the_same_module_of_two_blocks_starts_differently() -> None:
    plans = plan_of("lora", ("attn.qkv",)).modules
    both = LoraTargets("lora", False, False, {**plans, "blocks.2.attn.qkv": plans["blocks.1.attn.qkv"]})
    downs = []
    for prefix in ("blocks.1.", "blocks.2."):
        adapted = layer()
        lora.inject(adapted, prefix, both, seed=0)
        downs.append(trained_tensors(adapted)["attn.qkv.lora_A.default.weight"])
    assert not torch.equal(*downs)


@pytest.mark.parametrize(
    ("kind", "name", "fan_in"),
    [("lora", "mlp.fc2.lora_A.default.weight", 96), ("lora", "patches.lora_A.default.weight", 12)],
)
def test_start_has_the_spread_of_a_fresh_module(kind: str, name: str, fan_in: int) -> None:
    down = trained_tensors(injected(plan_of(kind, rank=64)))[name]
    bound = 1 / fan_in**0.5
    assert 0.98 * bound < float(down.abs().max()) <= bound


def test_start_of_lora_is_the_one_it_always_was() -> None:
    """The draw's key is part of every seed's meaning."""
    down = trained_tensors(injected(plan_of("lora", ("attn.qkv",)), seed=3))["attn.qkv.lora_A.default.weight"]
    expected = lora.randomness.kaiming_uniform(3, "lora", "blocks.1.attn.qkv", shape=(RANK, 24))
    assert torch.equal(down, expected)


@pytest.mark.parametrize("kind", KINDS)
def test_the_process_s_own_random_numbers_are_left_alone(kind: str) -> None:
    plan, adapted = plan_of(kind), layer()
    torch.manual_seed(11)
    before = torch.get_rng_state()
    lora.inject(adapted, PREFIX, plan, seed=0)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("kind", KINDS)
def test_injecting_warns_of_nothing(kind: str) -> None:
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        injected(plan_of(kind, attn_qkv=(2, 1.0)))
    assert [str(warning.message) for warning in told] == []


# --- what it computes --------------------------------------------------------------------------------------------------


def scale_of(kind: str, rank: int, alpha: float) -> float:
    return alpha / math.sqrt(rank) if kind.startswith("rs") else alpha / rank


def update(tensors: Mapping[str, Tensor]) -> Tensor:
    """Without scale and magnitude, written out index by index."""
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
def test_a_module_with_adapter_is_one_with_the_merged_weight(kind: str, sizes: dict[str, Any]) -> None:
    plan = plan_of(kind, **sizes)
    adapted, plain = injected(plan), layer()
    shake(adapted)
    for name, adapter in adapters_of(adapted).items():
        module = plain.get_submodule(name.removeprefix(PREFIX))
        assert adapter.scale == pytest.approx(scale_of(kind, plan.modules[name].rank, plan.modules[name].alpha))
        assert isinstance(module.weight, Tensor)
        with torch.no_grad():
            before = module(input_of(name.removeprefix(PREFIX)))
            module.weight.copy_(merged(module.weight, adapter.tensors, adapter.scale))
        result = call(adapted, name.removeprefix(PREFIX))
        assert (result - before).abs().max() > 0.01
        torch.testing.assert_close(result, call(plain, name.removeprefix(PREFIX)), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_rank_and_alpha_are_each_module_s_own(kind: str) -> None:
    """Also where a name is the end of another one: peft looks at ends."""
    own: dict[str, Any] = {"attn_qkv": (2, 1.0), "x_attn_qkv": (3, 5.0)}
    found = adapters_of(injected(plan_of(kind, LINEARS, **own)))
    expected = {"attn.qkv": (2, 1.0), "x.attn.qkv": (3, 5.0), "x.attn2.qkv": (RANK, ALPHA)}
    for name, (rank, alpha) in expected.items():
        adapter = found[PREFIX + name]
        assert adapter.tensors["w2_b" if kind == "lokr" else "down"].shape[0] == rank
        assert adapter.scale == pytest.approx(scale_of(kind, rank, alpha))


@pytest.mark.parametrize("chosen", [("attn.qkv",), ("x.attn.qkv",), ("x.attn2.qkv",)], ids=str)
def test_a_name_that_is_part_of_another_gets_no_adapter_of_it(chosen: tuple[str, ...]) -> None:
    assert set(adapters_of(injected(plan_of("lora", chosen)))) == {PREFIX + name for name in chosen}


@pytest.mark.parametrize("kind", KINDS)
def test_every_tensor_of_a_trained_adapter_has_a_gradient(kind: str) -> None:
    plan = plan_of(kind)
    adapted = injected(plan).train()
    shake(adapted)
    for name in plan.modules:
        local = name.removeprefix(PREFIX)
        adapted.get_submodule(local)(input_of(local)).square().mean().backward()
    trained = [(name, parameter) for name, parameter in adapted.named_parameters() if parameter.requires_grad]
    assert [name for name, parameter in trained if parameter.grad is None or not parameter.grad.any()] == []


def test_no_module_is_left_out_by_chance(monkeypatch: pytest.MonkeyPatch) -> None:
    """peft's LoKr throws dice each time, with module_dropout = 0 too, and leaves the module out when they show 0."""
    from peft import LoKrConfig, inject_adapter_in_model

    adapted = injected(plan_of("lokr")).train()
    shake(adapted)
    expected = call(adapted, "attn.qkv")
    as_peft_does = inject_adapter_in_model(
        LoKrConfig(r=RANK, target_modules="attn.qkv", init_weights=False), layer()
    ).train()
    monkeypatch.setattr(torch, "rand", lambda *shape: torch.zeros(*shape))
    assert torch.equal(call(adapted, "attn.qkv"), expected)
    assert torch.equal(call(as_peft_does, "attn.qkv"), call(layer(), "attn.qkv")), "the setting is no longer needed"


# --- what is said of it before it is there -----------------------------------------------------------------------------


@pytest.mark.parametrize("rank", [1, 4, 5, 12])
@pytest.mark.parametrize("kind", KINDS)
def test_the_plan_knows_every_shape(kind: str, rank: int) -> None:
    """LoKr's second factor, 9 x 6 of qkv and 6 x 12 of fc2, is whole from ranks 4.5 and 6 on."""
    plan = plan_of(kind, rank=rank)
    adapted = injected(plan)
    found = adapters_of(adapted)
    assert list(found) == list(plan.modules)
    for name, adapter in found.items():
        assert {part: tuple(tensor.shape) for part, tensor in adapter.tensors.items()} == plan.shapes(name)
    counted = sum(tensor.numel() for tensor in trained_tensors(adapted).values())
    assert sum(plan.num_parameters(name) for name in plan.modules) == counted


@pytest.mark.parametrize("size", [1, 2, 64, 127, 1536, 4608])
def test_the_plan_knows_how_lokr_cuts_any_side(size: int) -> None:
    module = nn.ModuleDict({"m": nn.Linear(size, 8, bias=False)})
    plan = LoraTargets("lokr", False, False, {"m": LoraTarget((8, size), 2, 2.0)})
    lora.inject(module, "", plan, seed=0)
    (adapter,) = adapters_of(module).values()
    assert {part: tuple(tensor.shape) for part, tensor in adapter.tensors.items()} == plan.shapes("m")


@pytest.mark.parametrize(
    ("kind", "ranks", "text"),
    [
        ("lora", {}, "LoRA of rank 4 on 5 modules"),
        ("dora", {}, "DoRA of rank 4 on 5 modules"),
        ("lokr", {}, "LoKr of rank 4 on 4 modules"),
        ("rslora", {"mlp_fc2": (16, 1.0)}, "rank-stabilized LoRA of rank 4 to 16 on 5 modules"),
    ],
)
def test_the_plan_says_what_it_is(kind: str, ranks: dict[str, Any], text: str) -> None:
    assert plan_of(kind, **ranks).describe() == text


# --- what is taken out -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_collected_are_the_values_given_by_native_names(kind: str) -> None:
    """Also tensors without values, of which only the shapes are asked."""
    plan = plan_of(kind)
    adapted = injected(plan)
    values = {name: parameter.detach() for name, parameter in adapted.named_parameters()}
    empty = {name: tensor.to("meta") for name, tensor in values.items()}
    collected = lora.collect(adapted, PREFIX, values)
    assert set(collected) == set(plan.modules)
    by_address = {tensor.data_ptr() for name, tensor in values.items() if ".lora_" in name or ".lokr_" in name}
    assert {tensor.data_ptr() for adapter in collected.values() for tensor in adapter.tensors.values()} == by_address
    for name, adapter in lora.collect(adapted, PREFIX, empty).items():
        assert {part: tuple(tensor.shape) for part, tensor in adapter.tensors.items()} == plan.shapes(name)


# --- starting from a file ----------------------------------------------------------------------------------------------


def assert_same_function(adapted: nn.Module, reference: nn.Module, tolerance: float = 1e-5) -> None:
    for name in adapters_of(reference):
        local = name.removeprefix(PREFIX)
        torch.testing.assert_close(call(adapted, local), call(reference, local), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("kind", KINDS)
def test_a_file_of_the_same_settings_is_taken_over_to_the_bit(kind: str) -> None:
    reference, file = trained_file(kind)
    adapted = injected(plan_of(kind))
    lora.load_start(adapted, PREFIX, file)
    expected, found = trained_tensors(reference), trained_tensors(adapted)
    assert expected.keys() == found.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


@pytest.mark.parametrize("kind", KINDS)
def test_a_file_of_another_scale_computes_the_same(kind: str) -> None:
    reference, file = trained_file(kind, alpha=1.5)
    adapted = injected(plan_of(kind, alpha=40.0))
    lora.load_start(adapted, PREFIX, file)
    assert_same_function(adapted, reference)
    assert adapters_of(adapted)[PREFIX + "attn.qkv"].scale == pytest.approx(scale_of(kind, RANK, 40.0))


@pytest.mark.parametrize(("saved", "wanted"), [("lora", "rslora"), ("rslora", "lora"), ("dora", "rsdora")])
def test_a_file_of_lower_rank_is_filled_up_and_computes_the_same(saved: str, wanted: str) -> None:
    reference, file = trained_file(saved, rank=3)
    fresh, adapted = injected(plan_of(wanted, rank=8)), injected(plan_of(wanted, rank=8))
    lora.load_start(adapted, PREFIX, file)
    assert_same_function(adapted, reference)
    for name, adapter in adapters_of(adapted).items():
        assert torch.equal(adapter.tensors["down"][:3], file.read(name).tensors["down"])
        assert torch.equal(adapter.tensors["down"][3:], adapters_of(fresh)[name].tensors["down"][3:])
        assert not adapter.tensors["up"][:, 3:].any()


def test_a_low_rank_file_starts_a_dora_that_computes_the_same() -> None:
    reference, file = trained_file("lora", rank=2)
    adapted = injected(plan_of("dora"))
    lora.load_start(adapted, PREFIX, file)
    assert_same_function(adapted, reference)
    for name, adapter in adapters_of(adapted).items():
        weight = layer().get_parameter(name.removeprefix(PREFIX) + ".weight").detach()
        rows = merged(weight, file.read(name).tensors, file.read(name).scale).flatten(1)
        torch.testing.assert_close(adapter.tensors["magnitude"], (rows**2).sum(1).sqrt())


def test_modules_that_a_file_lacks_start_fresh() -> None:
    _, file = trained_file("lora", modules=("attn.qkv",))
    fresh, adapted = trained_tensors(injected(plan_of("lora"))), injected(plan_of("lora"))
    lora.load_start(adapted, PREFIX, file)
    different = {name for name, tensor in trained_tensors(adapted).items() if not torch.equal(tensor, fresh[name])}
    assert different == {"attn.qkv.lora_A.default.weight", "attn.qkv.lora_B.default.weight"}


@pytest.mark.parametrize("kind", KINDS)
def test_a_file_s_values_take_the_parameters_precision(kind: str) -> None:
    _, file = trained_file(kind, alpha=2.0)
    adapted = injected(plan_of(kind), dtype=torch.bfloat16)
    parameters = dict(adapted.named_parameters())
    lora.load_start(adapted, PREFIX, file)
    assert all(parameter is parameters[name] for name, parameter in adapted.named_parameters())
    assert {parameter.dtype for parameter in adapted.parameters() if parameter.requires_grad} == {torch.bfloat16}
    for name, adapter in adapters_of(adapted).items():
        saved = file.read(name)
        expected = saved.scale * update(saved.tensors)
        found = adapter.scale * update({part: tensor.float() for part, tensor in adapter.tensors.items()})
        torch.testing.assert_close(found, expected, rtol=0.05, atol=0.05)


def test_reading_is_asked_for_no_module_of_another_layer() -> None:
    _, file = trained_file("lora")
    asked: list[str] = []
    read: Callable[[str], ModuleAdapter] = file.read

    def remember(name: str) -> ModuleAdapter:
        asked.append(name)
        return read(name)

    shapes = {**file.shapes, "blocks.2.attn.qkv": file.shapes["blocks.1.attn.qkv"]}
    lora.load_start(injected(plan_of("lora")), PREFIX, LoraFile(file.path, shapes, remember, ()))
    assert sorted(asked) == sorted(file.shapes)
