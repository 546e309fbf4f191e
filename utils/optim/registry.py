"""Optimizers by name: where their classes are, the errors of names and arguments, and their construction.

Names are found without regard to case, hyphens and underscores, in this order: the program's own, torch.optim, schedulefree,
pytorch-optimizer, bitsandbytes, torchao. A package in front of the name ("pytorch_optimizer.muon") chooses another. Packages
other than torch are optional.
"""

from __future__ import annotations

import contextlib
import difflib
import importlib
import inspect
import io
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import torch
from torch import nn

from utils import randomness
from utils.config.schema.optimizer import OptimizerConfig
from utils.optim.adamw_8bit import AdamW8bit
from utils.optim.arguments import argument_errors
from utils.optim.muon import MuonWithAdamW, split_matrices
from utils.optim.prodigy import Prodigy
from utils.optim.refused import OTHER_NAMES, REFUSED
from utils.optim.state_tensors import to_tensors
from utils.optim.torchao_optimizers import without_compiler

OWN, TORCH, SCHEDULE_FREE, COLLECTION, LOW_BIT = "own", "torch.optim", "schedulefree", "pytorch_optimizer", "bitsandbytes"
TORCHAO = "torchao"
INSTALLATION = {
    SCHEDULE_FREE: "schedulefree",
    COLLECTION: "pytorch-optimizer",
    LOW_BIT: "bitsandbytes",
    TORCHAO: "torchao",
}
"""Package -> what pip calls it."""
_WITH_FLAG = ("muon", "adamuon", "normuon", "adago")
"""Optimizers of pytorch-optimizer that take matrices and other parameters in groups with the flag `use_muon`."""


@dataclass(frozen=True)
class OptimizerKind:
    """An optimizer and where it comes from."""

    package: str
    name: str
    load: Callable[[], type]

    @property
    def refusal(self) -> str | None:
        """Why a run cannot use it; None if it can."""
        return REFUSED.get(self.package, {}).get(self.name)

    @property
    def num_sums(self) -> int:
        """How many sums over all parameters of the network a step needs."""
        return Prodigy.num_sums if self.package == OWN and self.name == "Prodigy" else 0

    @property
    def is_schedule_free(self) -> bool:
        return "schedulefree" in self.name.lower()


# --- names -------------------------------------------------------------------------------------------------------------


def _key(name: str) -> str:
    return name.lower().replace("-", "").replace("_", "")


def _own() -> Iterator[OptimizerKind]:
    for kind in (AdamW8bit, Prodigy):
        yield OptimizerKind(OWN, kind.__name__, partial(_itself, kind))


def _itself(kind: type) -> type:
    return kind


def _members(package: str, module: Any) -> Iterator[OptimizerKind]:
    for name in sorted(dir(module)):
        member = getattr(module, name)
        is_optimizer = isinstance(member, type) and issubclass(member, torch.optim.Optimizer)
        if is_optimizer and member is not torch.optim.Optimizer and not name.startswith("_"):
            load = partial(without_compiler, member) if package == TORCHAO else partial(_itself, member)
            yield OptimizerKind(package, name, load)


def _collection(module: Any) -> Iterator[OptimizerKind]:
    for name in sorted(module.get_supported_optimizers()):
        yield OptimizerKind(COLLECTION, name, partial(module.load_optimizer, name))


@cache
def _installed(package: str) -> tuple[OptimizerKind, ...]:
    """The optimizers of a package; none where it is not installed."""
    if package == OWN:
        return tuple(_own())
    module_name = f"{package}.optim" if package in (LOW_BIT, TORCHAO) else package
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        try:
            module = importlib.import_module(module_name)
        except ImportError:
            return ()
    return tuple(_collection(module) if package == COLLECTION else _members(package, module))


def is_installed(package: str) -> bool:
    return bool(_installed(package))


PACKAGES = (OWN, TORCH, SCHEDULE_FREE, COLLECTION, LOW_BIT, TORCHAO)


def all_kinds() -> Iterator[OptimizerKind]:
    """Every optimizer of the installed packages, in order of precedence."""
    for package in PACKAGES:
        yield from _installed(package)


def find(name: str) -> OptimizerKind | None:
    """The optimizer of that name; None if no installed package has it. A usable one comes before a refused one."""
    package, _, short = name.rpartition(".")
    refused = None
    for place in [package] if package else PACKAGES:
        for kind in _installed(place) if place in PACKAGES else ():  # packages that are not needed are not imported
            if _key(kind.name) == _key(short):
                if kind.refusal is None:
                    return kind
                refused = refused or kind
    return refused


# --- errors ------------------------------------------------------------------------------------------------------------


def optimizer_errors(config: OptimizerConfig) -> list[tuple[str, str]]:
    """Returns the errors of the optimizer's name and arguments as (key, message)."""
    kind = find(config.type)
    refusal = kind.refusal if kind is not None else OTHER_NAMES.get(_key(config.type))
    if refusal is not None:
        return [("optimizer.type", f"= {config.type!r}: cannot be used here: {refusal}")]
    if kind is None:
        return [("optimizer.type", f"= {config.type!r}: unknown; {_advice(config.type)}")]
    errors = argument_errors(config.type, kind.load(), config.args)
    if errors:
        return [(f"optimizer.args.{argument}", text) for argument, text in errors]
    weights = [nn.Parameter(torch.zeros(2, 2)), nn.Parameter(torch.zeros(2))]
    trial = {"names": ["blocks.0.weight", "bias"], "params": weights}
    try:
        make_optimizer(config, [trial])
    except Exception as error:  # some classes check their arguments, others fail on them with any exception
        text = str(error) if isinstance(error, ValueError) else repr(error)
        return [("optimizer.args", f"{config.type} rejects them: {text}")]
    return []


def _advice(name: str) -> str:
    names = {_key(kind.name): kind.name for kind in reversed(list(all_kinds())) if kind.refusal is None}
    close = difflib.get_close_matches(_key(name.rpartition(".")[2]), names, n=1)
    missing = [pip for package, pip in INSTALLATION.items() if not _installed(package)]
    more = f"; further optimizers come with: pip install {' '.join(missing)}" if missing else ""
    if close:
        return f"did you mean {names[close[0]]!r}?{more}"
    return f"torch.optim has {', '.join(kind.name for kind in _installed(TORCH) if kind.refusal is None)}{more}"


# --- construction ------------------------------------------------------------------------------------------------------


def make_optimizer(config: OptimizerConfig, entries: Sequence[Mapping[str, Any]]) -> Any:
    """Returns the configured optimizer over torch's dictionaries of parameter groups.

    Each has the parameters' native "names". Keys that a dictionary lacks ("lr", "weight_decay", ...) have the values of the
    config. What is returned has `param_groups`, `state` and `step` of a torch optimizer.
    """
    kind = find(config.type)
    assert kind is not None
    config_arguments = {key: tuple(value) if isinstance(value, list) else value for key, value in config.args.items()}
    rate = {"lr": config.learning_rate} if "lr" in _signature(kind) else {}
    groups = [dict(entry) for entry in entries]
    if kind.package == TORCH and kind.name == "Muon":
        return MuonWithAdamW(*split_matrices(groups), config.learning_rate, config_arguments)
    if kind.package == COLLECTION and kind.name in _WITH_FLAG:
        matrices, rest = split_matrices(groups)
        groups = [{**entry, "use_muon": True} for entry in matrices] + [{**entry, "use_muon": False} for entry in rest]
    optimizer = kind.load()(groups, **rate, **_fused(kind, groups, config_arguments), **config_arguments)
    if kind.is_schedule_free:
        optimizer.train()
    return optimizer


def _fused(kind: OptimizerKind, groups: Sequence[Mapping[str, Any]], arguments: Mapping[str, Any]) -> dict[str, Any]:
    """On accelerators, torch's update in one kernel, which needs no memory of the size of the weights."""
    weights = [weight for entry in groups for weight in entry["params"]]
    if kind.package != TORCH or "fused" not in _signature(kind) or {"fused", "foreach", "differentiable"} & set(arguments):
        return {}
    return {} if any(weight.device.type == "cpu" for weight in weights) else {"fused": True}


def state_bytes(config: OptimizerConfig, size: int = 128) -> float:
    """Returns the bytes of state that the optimizer keeps per weight, measured on a matrix of size x size."""
    weight = nn.Parameter(randomness.normal(0, "weights", shape=(size, size)))
    weight.grad = torch.ones_like(weight)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        optimizer = make_optimizer(config, [{"name": "all", "names": ["blocks.0.weight"], "params": [weight], "lr": 1e-3}])
        optimizer.step()
    return sum(tensor.nbytes for tensor in to_tensors(optimizer.state.get(weight, {})).values()) / weight.numel()


def is_separable(config: OptimizerConfig) -> bool:
    """Returns whether the configured optimizer may update some parameters in one call of `step` and others in another.

    Others count their steps for a whole group.
    """
    kind = find(config.type)
    return kind is not None and kind.package in (OWN, TORCH) and not kind.num_sums


def num_sums(config: OptimizerConfig) -> int:
    """Returns how many sums over all parameters of the network a step of the configured optimizer needs."""
    kind = find(config.type)
    return kind.num_sums if kind is not None else 0


def canonical_name(name: str) -> str:
    """Returns the one spelling of an optimizer's name, by which checkpoints are compared."""
    kind = find(name)
    return name if kind is None else kind.name if kind.package in (OWN, TORCH) else f"{kind.package}.{kind.name}"


@cache
def _signature(kind: OptimizerKind) -> frozenset[str]:
    return frozenset(inspect.signature(kind.load()).parameters)
