"""The modules an adapter is put on, chosen by the names people give; and whether a file can be its start.

An entry of `targets` is the name of a group of the family ("attn") or a regular expression over whole native names. Where
several match one module, the last decides its rank and alpha: the general first, the special after.
"""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from models.family import LoraFile, ModelFamily
from utils.config.schema.adapter import AdapterConfig, TargetConfig
from utils.trainable.lora import LoraTarget, LoraTargets, Shape

MAX_NAMES_SHOWN = 3

ErrorList = list[tuple[str, str]]
"""(key of the experiment file, what is wrong with it)"""


@dataclass(frozen=True)
class _Target:
    """An entry of `targets` and its place in the file, "adapter.targets[1]"."""

    key: str
    entry: TargetConfig


def choose_modules(settings: AdapterConfig, network: ModelFamily) -> tuple[LoraTargets, ErrorList]:
    """The modules to be trained, each with its rank and alpha, and everything that is wrong with the settings."""
    errors: ErrorList = []
    if settings.targets is None:
        targets = [_Target("adapter.targets", TargetConfig(pattern=name)) for name in network.default_lora_targets]
    else:
        targets = [_Target(f"adapter.targets[{index}]", entry) for index, entry in enumerate(settings.targets)]
    within = _modules_within_blocks(settings, network, errors)
    deciding: dict[str, _Target] = {}
    for target in targets:
        matched, error = _match(target.entry.pattern, network)
        if error is None and not within.intersection(matched):
            error = f"= {target.entry.pattern!r}: {_none_within(matched, settings.blocks, network)}"
        if error is not None:
            errors.append((target.key, error))
        deciding.update(dict.fromkeys(within.intersection(matched), target))
    modules = {
        name: _lora_target(settings, deciding[name].entry, shape)
        for name, shape in network.adaptable_modules.items()
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
    """The numbers in "0-11,20". Raises ValueError naming each part that is wrong and what is allowed."""
    chosen: set[int] = set()
    wrong = []
    for part in (part.strip() for part in text.split(",")):
        match = re.fullmatch(r"([0-9]+)(?:\s*-\s*([0-9]+))?", part)
        if match is None:
            wrong.append(f"{part!r} is neither a number nor a range such as 0-11" if part else "a number is missing")
            continue
        first, last = int(match[1]), int(match[2] or match[1])
        if first > last:
            wrong.append(f"{part!r} runs backwards; write {last}-{first}")
        elif last >= num_blocks:
            wrong.append(f"there is no block {last} in {part!r}" if match[2] else f"there is no block {last}")
        else:
            chosen.update(range(first, last + 1))
    if wrong:
        raise ValueError(f"{'; '.join(wrong)}; blocks are 0 to {num_blocks - 1}, written such as 0-11,20")
    return chosen


def _modules_within_blocks(settings: AdapterConfig, network: ModelFamily, errors: ErrorList) -> set[str]:
    """Every module that `blocks` does not rule out; all of them when it is unset or wrong."""
    modules = set(network.adaptable_modules)
    if settings.blocks is None:
        return modules
    try:
        allowed = parse_blocks(settings.blocks, network.num_blocks)
    except ValueError as error:
        errors.append(("adapter.blocks", f"= {settings.blocks!r}: {error}"))
        return modules
    return {name for name in modules if network.block_of(name) is None or network.block_of(name) in allowed}


def _none_within(matched: Iterable[str], blocks: str | None, network: ModelFamily) -> str:
    found = sorted({block for name in matched if (block := network.block_of(name)) is not None})
    return f"matches only modules of blocks {found[0]} to {found[-1]}, and none of these is among blocks = {blocks!r}"


# --- names -------------------------------------------------------------------------------------------------------------


def _match(pattern: str, network: ModelFamily) -> tuple[list[str], str | None]:
    """The modules that a group's name or an expression chooses, or none and why."""
    expression = network.lora_target_groups.get(pattern, pattern)
    try:
        compiled = re.compile(expression)
    except (re.error, OverflowError) as error:
        return [], f"= {pattern!r}: is no regular expression: {error}"
    matched = [name for name in network.adaptable_modules if compiled.fullmatch(name)]
    if matched:
        return matched, None
    if pattern in network.lora_target_groups:
        return [], f"= {pattern!r}: this network has no module of that group"
    return [], f"= {pattern!r}: matches no module{_advice(pattern, compiled, network)}"


def _advice(pattern: str, compiled: re.Pattern[str], network: ModelFamily) -> str:
    """What may have been meant by an expression that matches no module."""
    texts = []
    found = next((name for name in network.adaptable_modules if (hit := compiled.search(name)) and hit.group()), None)
    if found is not None:
        longer = _longer_expression(pattern, network)
        proposal = f": write '{longer}'" if longer is not None else ""  # quoted as in TOML, where backslashes stay single
        texts.append(f"it is a part of {found}, but must match the whole name{proposal}")
    close = _near_misses(pattern, network)
    if close:
        texts.append("did you mean " + " or ".join(f"'{name}'" for name in close) + "?")
    if not texts:
        groups = ", ".join(network.lora_target_groups)
        texts.append(f"groups are {groups}; names are like {some(network.adaptable_modules)}")
    return "; " + "; ".join(texts)


def _longer_expression(pattern: str, network: ModelFamily) -> str | None:
    """The expression with `.*` in front, behind or both, whichever matches a module first."""
    inner = f"({pattern})" if "|" in pattern else pattern
    for longer in (f".*{inner}", f"{inner}.*", f".*{inner}.*"):
        try:
            compiled = re.compile(longer)
        except re.error:  # flags may stand only in front
            return None
        if any(compiled.fullmatch(name) for name in network.adaptable_modules):
            return longer
    return None


def _near_misses(pattern: str, network: ModelFamily) -> list[str]:
    """What could be written in `targets` and is spelled much like the pattern: groups, then modules by name or its end."""
    groups = {name.lower(): name for name in network.lora_target_groups}
    close = [groups[key] for key in difflib.get_close_matches(pattern.lower(), groups, n=MAX_NAMES_SHOWN)]
    spellings: dict[str, str] = {}
    for name in network.adaptable_modules:
        block = network.block_of(name)
        general = name if block is None else name.replace(f".{block}.", r".\d+.", 1)
        parts = general.split(".")
        for start in range(len(parts)):
            end = ".".join(parts[start:])
            spellings.setdefault(_spelling(end), end if start == 0 else f".*{end}")
    found = difflib.get_close_matches(_spelling(pattern), spellings, n=MAX_NAMES_SHOWN, cutoff=0.75)
    return [*close, *(spellings[key] for key in found)][:MAX_NAMES_SHOWN]


def _spelling(expression: str) -> str:
    """For comparison: numbers between dots made equal, regular expressions' own signs taken away."""
    plain = expression.lower().replace(r"\d+", "0").replace("[0-9]+", "0").replace(".*", "").replace("\\", "")
    return re.sub(r"\.\d+\.", ".0.", plain.strip("^$"))


def some(names: Iterable[str]) -> str:
    """The first few, and how many more there are."""
    listed = list(names)
    more = f" and {len(listed) - MAX_NAMES_SHOWN} more" if len(listed) > MAX_NAMES_SHOWN else ""
    return ", ".join(listed[:MAX_NAMES_SHOWN]) + more


# --- sizes -------------------------------------------------------------------------------------------------------------


def _size_errors(settings: AdapterConfig, modules: Mapping[str, LoraTarget], deciding: Mapping[str, _Target]) -> ErrorList:
    """Ranks beyond what a weight can have, and convolutions where they cannot be."""
    too_high: dict[tuple[str, int], list[str]] = {}
    convolutions: dict[_Target, list[str]] = {}
    for name, plan in modules.items():
        target = deciding[name]
        limit = min(plan.weight_shape[0], math.prod(plan.weight_shape[1:]))
        if settings.type == "lora" and plan.rank > limit:
            key = "adapter.rank" if target.entry.rank is None else f"{target.key}.rank"
            too_high.setdefault((key, plan.rank), []).append(f"{name} (at most {limit})")
        if settings.type == "lokr" and len(plan.weight_shape) == 4:
            convolutions.setdefault(target, []).append(name)
    errors = [
        (key, f"= {rank}: is more than these can have: {some(names)}; give them a lower one by an entry of targets")
        for (key, rank), names in too_high.items()
    ]
    errors += [
        (
            target.key,
            f"= {target.entry.pattern!r}: chooses {some(names)}, a convolution, which LoKr is not made for; "
            "use an expression that leaves it out",
        )
        for target, names in convolutions.items()
    ]
    return errors


# --- starting from a file ----------------------------------------------------------------------------------------------


def start_errors(file: LoraFile, plan: LoraTargets, settings: AdapterConfig, network: ModelFamily) -> list[str]:
    """Why training of this plan cannot start from the file's adapter."""
    errors = _kind_errors(file, plan)
    strangers = [name for name in file.shapes if name not in plan.modules]
    if strangers:
        advice = _how_to_add(strangers, settings, network)
        errors.append(f"has modules that are not trained here: {some(strangers)}; {advice}")
    if not errors:
        shared = [name for name in file.shapes if name in plan.modules]
        errors += _kronecker_errors(shared, file, plan) if plan.kind == "lokr" else _rank_errors(shared, file, plan)
    return errors


def _kind_errors(file: LoraFile, plan: LoraTargets) -> list[str]:
    kinds: dict[str, list[str]] = {}
    for name, shapes in file.shapes.items():
        kind = "LoKr" if "down" not in shapes else "DoRA" if "magnitude" in shapes else "LoRA"
        kinds.setdefault(kind, []).append(name)
    allowed = ("LoKr",) if plan.kind == "lokr" else ("LoRA", "DoRA") if plan.dora else ("LoRA",)
    needed = {"LoKr": 'type = "lokr"', "LoRA": 'type = "lora"', "DoRA": 'type = "lora" and dora = true'}
    return [
        f"is a {kind} adapter, of {some(names)}; to start from it train with {needed[kind]}"
        for kind, names in kinds.items()
        if kind not in allowed
    ]


def _how_to_add(modules: Iterable[str], settings: AdapterConfig, network: ModelFamily) -> str:
    """The groups, or failing that the modules, that `targets` would have to have too; `blocks` where it is in the way."""
    missing = []
    for name in modules:
        groups = [group for group, pattern in network.lora_target_groups.items() if re.fullmatch(pattern, name)]
        missing.append(groups[0] if groups else name)
    wanted = [target.pattern for target in settings.targets or ()] or list(network.default_lora_targets)
    new = [name for name in dict.fromkeys(missing) if name not in wanted]
    advice = [f"add {some(new)} to targets"] if new else []
    within = _modules_within_blocks(settings, network, [])
    if not within.issuperset(modules):
        advice.append(f"widen blocks, which is {settings.blocks!r}")
    return " and ".join(advice)


def _rank_errors(modules: Iterable[str], file: LoraFile, plan: LoraTargets) -> list[str]:
    higher = [
        f"{name} ({file.shapes[name]['down'][0]}, here {plan.modules[name].rank})"
        for name in modules
        if file.shapes[name]["down"][0] > plan.modules[name].rank
    ]
    return [f"has a higher rank than is trained here: {some(higher)}; raise rank"] if higher else []


def _kronecker_errors(modules: Iterable[str], file: LoraFile, plan: LoraTargets) -> list[str]:
    different = [
        f"{name} ({_shown(file.shapes[name])}; here {_shown(plan.shapes(name))})"
        for name in modules
        if {part: tuple(shape) for part, shape in file.shapes[name].items()} != plan.shapes(name)
    ]
    return [f"has factors of other shapes than those trained here: {some(different)}"] if different else []


def _shown(shapes: Mapping[str, Shape]) -> str:
    return ", ".join(f"{part} {' x '.join(str(size) for size in shape)}" for part, shape in shapes.items())
