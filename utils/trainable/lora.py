"""Adapters through peft: put into a layer, given their start, taken out again.

Low rank: W + scale * up @ down, with scale alpha / rank, or alpha / sqrt(rank) when rank-stabilized (arXiv 2312.03732).
DoRA (arXiv 2402.09353): the same, each row then brought to a trained length.
LoKr (arXiv 2309.14859): W + alpha / rank * kron(w1, w2). The sides of W are each split in two factors, as equal as they can
be, the smaller ones for w1. w1 is whole; w2 is w2_a @ w2_b of that rank, or whole where that would save nothing.

Works on one pipeline layer at a time; a layer's module names with its prefix in front are the network's native names.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from models.family import LoraFile, ModuleAdapter
from utils import randomness

Shape = tuple[int, ...]

ADAPTER_NAME = "default"
_ENDINGS = {
    "down": f".lora_A.{ADAPTER_NAME}.weight",
    "up": f".lora_B.{ADAPTER_NAME}.weight",
    "magnitude": f".lora_magnitude_vector.{ADAPTER_NAME}.weight",
    **{part: f".lokr_{part}.{ADAPTER_NAME}" for part in ("w1", "w2", "w2_a", "w2_b")},
}
"""Tensor name of ModuleAdapter -> what peft puts behind a module's name. In the order in which a start is written."""
_DRAWN = ("down", "w2", "w2_a", "w2_b")
"""Tensors that start at random. The others start at zero, magnitudes at the length of the weight's rows."""


# --- what is to be trained ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class LoraTarget:
    """The adapter of one module whose weight is (out, in) or, of a convolution, (out, in, k, k)."""

    weight_shape: Shape
    rank: int
    alpha: float


@dataclass(frozen=True)
class LoraTargets:
    """Kind of adapter, and the modules that get one by native name, in the network's order."""

    kind: Literal["lora", "lokr"]
    rank_stabilized: bool
    dora: bool
    modules: Mapping[str, LoraTarget]

    def shapes(self, module: str) -> dict[str, Shape]:
        """Of what is trained for the module, by its name in ModuleAdapter."""
        plan = self.modules[module]
        num_rows, *rest = plan.weight_shape
        if self.kind == "lokr":
            return _kronecker_shapes(num_rows, rest[0], plan.rank)
        shapes: dict[str, Shape] = {
            "down": (plan.rank, *rest),
            "up": (num_rows, plan.rank, *[1] * (len(rest) - 1)),
        }
        return {**shapes, "magnitude": (num_rows,)} if self.dora else shapes

    def num_parameters(self, module: str) -> int:
        return sum(math.prod(shape) for shape in self.shapes(module).values())

    def describe(self) -> str:
        name = "LoKr" if self.kind == "lokr" else "DoRA" if self.dora else "LoRA"
        ranks = sorted({plan.rank for plan in self.modules.values()})
        shown = f"{ranks[0]}" if len(ranks) == 1 else f"{ranks[0]} to {ranks[-1]}"
        stabilized = "rank-stabilized " if self.rank_stabilized else ""
        return f"{stabilized}{name} of rank {shown} on {len(self.modules)} modules"


def _kronecker_shapes(num_rows: int, num_columns: int, rank: int) -> dict[str, Shape]:
    from peft.tuners.lokr.layer import factorization  # here: see `inject`

    (w1_rows, w2_rows), (w1_columns, w2_columns) = factorization(num_rows), factorization(num_columns)
    shapes = {"w1": (w1_rows, w1_columns)}
    if rank >= max(w2_rows, w2_columns) / 2:
        return {**shapes, "w2": (w2_rows, w2_columns)}
    return {**shapes, "w2_a": (w2_rows, rank), "w2_b": (rank, w2_columns)}


# --- putting it in -----------------------------------------------------------------------------------------------------


def inject(layer: nn.Module, prefix: str, plan: LoraTargets, *, seed: int) -> None:
    """Freeze the layer and give its modules that are in the plan an adapter that changes nothing yet.

    What starts at random is drawn by the module's name, so that no layout changes it.
    """
    layer.requires_grad_(False)
    names = [name for name, _ in layer.named_modules() if prefix + name in plan.modules]
    if not names:
        return
    from peft import inject_adapter_in_model  # here: a run without adapter need not wait for the import

    config = _peft_config(plan, {name: plan.modules[prefix + name] for name in names})
    with torch.random.fork_rng(devices=[]):  # peft draws too; nothing else may depend on how often
        inject_adapter_in_model(config, layer, adapter_name=ADAPTER_NAME)
    for name, parts in _adapters(layer).items():
        for part in _DRAWN:
            if part in parts:
                # `down` goes by the module's name alone, as in the versions that had nothing else.
                key = (prefix + name,) if part == "down" else (prefix + name, part)
                drawn = randomness.kaiming_uniform(seed, "lora", *key, shape=tuple(parts[part].shape))
                with torch.no_grad():
                    parts[part].copy_(drawn)


def _peft_config(plan: LoraTargets, modules: Mapping[str, LoraTarget]) -> Any:
    """peft's settings for these modules of a layer (names within it)."""
    from peft import LoKrConfig, LoraConfig

    first = next(iter(modules.values()))
    # peft matches the end of a name unless told that the name starts here; the first pattern that matches wins.
    ranks = {f"^{re.escape(name)}": module.rank for name, module in modules.items()}
    alphas = {f"^{re.escape(name)}": module.alpha for name, module in modules.items()}
    targets = "|".join(re.escape(name) for name in modules)
    if plan.kind == "lokr":
        # NOTE peft 0.21 leaves a module out whenever a number drawn from [0, 1) is not above module_dropout, at 0.0 too.
        return LoKrConfig(
            r=first.rank,
            alpha=first.alpha,  # type: ignore[arg-type]
            rank_pattern=ranks,
            alpha_pattern=alphas,
            target_modules=targets,
            module_dropout=-1.0,
        )
    return LoraConfig(
        r=first.rank,
        lora_alpha=first.alpha,  # type: ignore[arg-type]
        rank_pattern=ranks,
        alpha_pattern=alphas,
        target_modules=targets,
        lora_dropout=0.0,
        use_rslora=plan.rank_stabilized,
        use_dora=plan.dora,
    )


def _adapters(layer: nn.Module) -> dict[str, dict[str, nn.Parameter]]:
    """Name of a module within the layer -> its adapter's parameters by their names in ModuleAdapter."""
    found: dict[str, dict[str, nn.Parameter]] = {}
    for part, ending in _ENDINGS.items():
        for name, parameter in layer.named_parameters():
            if name.endswith(ending):
                found.setdefault(name.removesuffix(ending), {})[part] = parameter
    return found


def _peft_module(layer: nn.Module, name: str) -> Any:
    return layer.get_submodule(name)


# --- out of a file, and out of the layer -------------------------------------------------------------------------------


def start_values(layer: nn.Module, prefix: str, file: LoraFile) -> dict[str, Tensor]:
    """What the layer's adapters are to be so that they compute what they do in a file: parameter name -> float32 tensor.

    The scale stays ours; the first factor makes up for the difference. Rank that the file lacks keeps its start.
    """
    values: dict[str, Tensor] = {}
    for name, parts in _adapters(layer).items():
        if prefix + name not in file.shapes:
            continue
        adapter = file.read(prefix + name)
        scaled = "up" if "up" in adapter.tensors else "w1"
        for part in parts.keys() & adapter.tensors.keys():
            tensor = adapter.tensors[part]
            if part == scaled:
                tensor = tensor * (adapter.scale / _peft_module(layer, name).scaling[ADAPTER_NAME])
            if part == "magnitude":
                tensor = tensor.reshape(parts[part].shape)
            value = parts[part].detach().float().clone()
            value[tuple(slice(size) for size in tensor.shape)] = tensor.to(value.device)
            values[name + _ENDINGS[part]] = value
    return values


@torch.no_grad()
def load_start(layer: nn.Module, prefix: str, file: LoraFile) -> None:
    """Write `start_values` into the layer, rounded to its precision.

    The file may have less rank, and no magnitudes for a DoRA; `targets.start_errors` tells what it may not.
    """
    for name, value in start_values(layer, prefix, file).items():
        layer.get_parameter(name).copy_(value)
    for name, parts in _adapters(layer).items():
        if "magnitude" in parts and "magnitude" not in file.shapes.get(prefix + name, {"magnitude": ()}):
            parts["magnitude"].copy_(_row_lengths(_peft_module(layer, name)).reshape(parts["magnitude"].shape))


def _row_lengths(module: Any) -> Tensor:
    """Of a DoRA module's weight with its update, to the bit what the forward pass divides by."""
    dora, weight = module.lora_magnitude_vector[ADAPTER_NAME], module.get_base_layer().weight
    update = dora.get_lora_weight(module.lora_A[ADAPTER_NAME], module.lora_B[ADAPTER_NAME])
    return dora.get_weight_norm(weight, update.reshape(weight.shape), module.scaling[ADAPTER_NAME])


def collect(layer: nn.Module, prefix: str, values: Mapping[str, Tensor]) -> dict[str, ModuleAdapter]:
    """The layer's adapters by native module name, with the tensors taken from `values` (parameter name -> tensor)."""
    adapters = {}
    for name, parts in _adapters(layer).items():
        tensors = {part: values[name + _ENDINGS[part]] for part in parts}
        if "magnitude" in tensors:
            tensors["magnitude"] = tensors["magnitude"].flatten()  # of a convolution (1, out, 1, 1)
        adapters[prefix + name] = ModuleAdapter(tensors, float(_peft_module(layer, name).scaling[ADAPTER_NAME]))
    return adapters
