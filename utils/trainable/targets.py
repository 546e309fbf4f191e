"""The modules that get an adapter, chosen by the configuration, with rank and alpha.

An entry of `targets` is the name of a group of the family ("attn") or a regular expression over whole native names. Where
several entries match a module, the last one decides its rank and alpha: general entries first, special ones after them.
"""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

from models.family import ModelFamily
from utils.config.schema.adapter import AdapterConfig, TargetConfig
from utils.trainable.base import ErrorList
from utils.trainable.name_lists import MAX_NAMES_SHOWN, shortened

Shape = tuple[int, ...]


# --- targets -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class LoraTarget:
    """The adapter of one module whose weight is (out, in) or, for a convolution, (out, in, k, k)."""

    weight_shape: Shape
    rank: int
    alpha: float


@dataclass(frozen=True)
class LoraTargets:
    """The kind of adapter, and the modules that get one by native name, in the network's order."""

    kind: Literal["lora", "lokr"]
    rank_stabilized: bool
    dora: bool
    modules: Mapping[str, LoraTarget]

    def shapes(self, module: str) -> dict[str, Shape]:
        """Returns the shape of each trained tensor of the module, by its name in ModuleAdapter."""
        target = self.modules[module]
        num_rows, *rest = target.weight_shape
        if self.kind == "lokr":
            return _kronecker_shapes(num_rows, rest[0], target.rank)
        shapes: dict[str, Shape] = {
            "down": (target.rank, *rest),
            "up": (num_rows, target.rank, *[1] * (len(rest) - 1)),
        }
        return {**shapes, "magnitude": (num_rows,)} if self.dora else shapes

    def num_parameters(self, module: str) -> int:
        """Returns the number of trained elements of the module's adapter."""
        return sum(math.prod(shape) for shape in self.shapes(module).values())

    def describe(self) -> str:
        """Returns kind, rank and number of modules: "LoRA of rank 16 on 187 modules"."""
        name = "LoKr" if self.kind == "lokr" else "DoRA" if self.dora else "LoRA"
        ranks = sorted({target.rank for target in self.modules.values()})
        rank = f"{ranks[0]}" if len(ranks) == 1 else f"{ranks[0]} to {ranks[-1]}"
        stabilized = "rank-stabilized " if self.rank_stabilized else ""
        return f"{stabilized}{name} of rank {rank} on {len(self.modules)} modules"


def _kronecker_shapes(num_rows: int, num_columns: int, rank: int) -> dict[str, Shape]:
    from peft.tuners.lokr.layer import factorization  # imported here: peft is slow to import

    (w1_rows, w2_rows), (w1_columns, w2_columns) = factorization(num_rows), factorization(num_columns)
    shapes = {"w1": (w1_rows, w1_columns)}
    if rank >= max(w2_rows, w2_columns) / 2:
        return {**shapes, "w2": (w2_rows, w2_columns)}
    return {**shapes, "w2_a": (w2_rows, rank), "w2_b": (rank, w2_columns)}


# --- choosing ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Entry:
    """An entry of `targets` with its place in the file, such as "adapter.targets[1]"."""

    key: str
    entry: TargetConfig


def choose_modules(settings: AdapterConfig, family: ModelFamily) -> tuple[LoraTargets, ErrorList]:
    """Returns the target modules with rank and alpha, and the errors of the settings as (key, message)."""
    errors: ErrorList = []
    if settings.targets is None:
        targets = [_Entry("adapter.targets", TargetConfig(pattern=name)) for name in family.default_lora_targets]
    else:
        targets = [_Entry(f"adapter.targets[{index}]", entry) for index, entry in enumerate(settings.targets)]
    within = modules_within_blocks(settings, family, errors)
    deciding: dict[str, _Entry] = {}
    for target in targets:
        matched, error = _match(target.entry.pattern, family)
        if error is None and not within.intersection(matched):
            error = f"= {target.entry.pattern!r}: {_none_within(matched, settings.blocks, family)}"
        if error is not None:
            errors.append((target.key, error))
        deciding.update(dict.fromkeys(within.intersection(matched), target))
    modules = {
        name: _lora_target(settings, deciding[name].entry, shape)
        for name, shape in family.adaptable_modules.items()
        if name in deciding
    }
    errors += _size_errors(settings, modules, deciding)
    return LoraTargets(settings.type, settings.rank_stabilized, settings.dora, modules), errors


def _lora_target(settings: AdapterConfig, entry: TargetConfig, shape: Shape) -> LoraTarget:
    rank = entry.rank if entry.rank is not None else settings.rank
    alphas = (entry.alpha, settings.alpha, float(rank))
    return LoraTarget(shape, rank, next(alpha for alpha in alphas if alpha is not None))


# --- blocks ------------------------------------------------------------------------------------------------------------


def parse_blocks(text: str, num_blocks: int) -> set[int]:
    """Returns the numbers in "0-11,20". Raises ValueError with each wrong part and what is allowed."""
    chosen: set[int] = set()
    wrong = []
    for part in (part.strip() for part in text.split(",")):
        match = re.fullmatch(r"([0-9]+)(?:\s*-\s*([0-9]+))?", part)
        if match is None:
            wrong.append(f"{part!r} is neither a number nor a range such as 0-11" if part else "a number is missing")
            continue
        first, last = int(match[1]), int(match[2] or match[1])
        if first > last:
            wrong.append(f"{part!r} is a descending range; write {last}-{first}")
        elif last >= num_blocks:
            wrong.append(f"there is no block {last} in {part!r}" if match[2] else f"there is no block {last}")
        else:
            chosen.update(range(first, last + 1))
    if wrong:
        raise ValueError(f"{'; '.join(wrong)}; blocks are 0 to {num_blocks - 1}, written such as 0-11,20")
    return chosen


def modules_within_blocks(settings: AdapterConfig, family: ModelFamily, errors: ErrorList) -> set[str]:
    """Returns the modules that `blocks` allows; all of them if it is unset or wrong. Adds its errors."""
    modules = set(family.adaptable_modules)
    if settings.blocks is None:
        return modules
    try:
        allowed = parse_blocks(settings.blocks, family.num_blocks)
    except ValueError as error:
        errors.append(("adapter.blocks", f"= {settings.blocks!r}: {error}"))
        return modules
    return {name for name in modules if family.block_of(name) is None or family.block_of(name) in allowed}


def _none_within(matched: Iterable[str], blocks: str | None, family: ModelFamily) -> str:
    found = sorted({block for name in matched if (block := family.block_of(name)) is not None})
    return f"matches only modules of blocks {found[0]} to {found[-1]}, and none of these is among blocks = {blocks!r}"


# --- names -------------------------------------------------------------------------------------------------------------


def _match(pattern: str, family: ModelFamily) -> tuple[list[str], str | None]:
    """Returns the modules that a group's name or an expression matches, and None; or no modules and the error."""
    expression = family.lora_target_groups.get(pattern, pattern)
    try:
        compiled = re.compile(expression)
    except (re.error, OverflowError) as error:
        return [], f"= {pattern!r}: is not a regular expression: {error}"
    matched = [name for name in family.adaptable_modules if compiled.fullmatch(name)]
    if matched:
        return matched, None
    if pattern in family.lora_target_groups:
        return [], f"= {pattern!r}: this network has no module of that group"
    return [], f"= {pattern!r}: matches no module{_advice(pattern, compiled, family)}"


def _advice(pattern: str, compiled: re.Pattern[str], family: ModelFamily) -> str:
    """Returns suggestions for an expression that matches no module."""
    texts = []
    found = next((name for name in family.adaptable_modules if (hit := compiled.search(name)) and hit.group()), None)
    if found is not None:
        longer = _longer_expression(pattern, family)
        proposal = f": write '{longer}'" if longer is not None else ""  # in single quotes, as TOML keeps backslashes there
        texts.append(f"it is part of the name {found}, but must match the whole name{proposal}")
    close = _near_misses(pattern, family)
    if close:
        texts.append("did you mean " + " or ".join(f"'{name}'" for name in close) + "?")
    if not texts:
        groups = ", ".join(family.lora_target_groups)
        texts.append(f"groups are {groups}; names are like {shortened(family.adaptable_modules)}")
    return "; " + "; ".join(texts)


def _longer_expression(pattern: str, family: ModelFamily) -> str | None:
    """Returns the expression with `.*` before, after or around it, whichever matches a module first; else None."""
    inner = f"({pattern})" if "|" in pattern else pattern
    for longer in (f".*{inner}", f"{inner}.*", f".*{inner}.*"):
        try:
            compiled = re.compile(longer)
        except re.error:  # flags are allowed only at the start
            return None
        if any(compiled.fullmatch(name) for name in family.adaptable_modules):
            return longer
    return None


def _near_misses(pattern: str, family: ModelFamily) -> list[str]:
    """Returns valid entries of `targets` that are spelled like the pattern: groups, then whole names or ends of names."""
    groups = {name.lower(): name for name in family.lora_target_groups}
    close = [groups[key] for key in difflib.get_close_matches(pattern.lower(), groups, n=MAX_NAMES_SHOWN)]
    spellings: dict[str, str] = {}
    for name in family.adaptable_modules:
        block = family.block_of(name)
        general = name if block is None else name.replace(f".{block}.", r".\d+.", 1)
        parts = general.split(".")
        for start in range(len(parts)):
            end = ".".join(parts[start:])
            spellings.setdefault(_spelling(end), end if start == 0 else f".*{end}")
    found = difflib.get_close_matches(_spelling(pattern), spellings, n=MAX_NAMES_SHOWN, cutoff=0.75)
    return [*close, *(spellings[key] for key in found)][:MAX_NAMES_SHOWN]


def _spelling(expression: str) -> str:
    """Returns the expression for comparison: equal block numbers, without the symbols of regular expressions."""
    plain = expression.lower().replace(r"\d+", "0").replace("[0-9]+", "0").replace(".*", "").replace("\\", "")
    return re.sub(r"\.\d+\.", ".0.", plain.strip("^$"))


# --- sizes -------------------------------------------------------------------------------------------------------------


def _size_errors(settings: AdapterConfig, modules: Mapping[str, LoraTarget], deciding: Mapping[str, _Entry]) -> ErrorList:
    """Returns errors for ranks above those of the weights, and for convolutions as targets of LoKr."""
    too_high: dict[tuple[str, int], list[str]] = {}
    convolutions: dict[_Entry, list[str]] = {}
    for name, plan in modules.items():
        target = deciding[name]
        limit = min(plan.weight_shape[0], math.prod(plan.weight_shape[1:]))
        if settings.type == "lora" and plan.rank > limit:
            key = "adapter.rank" if target.entry.rank is None else f"{target.key}.rank"
            too_high.setdefault((key, plan.rank), []).append(f"{name} (at most {limit})")
        if settings.type == "lokr" and len(plan.weight_shape) == 4:
            convolutions.setdefault(target, []).append(name)
    errors = [
        (
            key,
            f"= {rank}: is above the maximum of these modules: {shortened(names)}; set a lower one for them in targets",
        )
        for (key, rank), names in too_high.items()
    ]
    errors += [
        (
            target.key,
            f"= {target.entry.pattern!r}: matches {shortened(names)}, a convolution, which LoKr does not support; "
            "use an expression that excludes it",
        )
        for target, names in convolutions.items()
    ]
    return errors
