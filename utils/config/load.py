"""Reads the TOML files of an experiment and checks them; reports all errors of all files at once."""

from __future__ import annotations

import difflib
import json
import re
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import toml
from pydantic import BaseModel, ValidationError

import models
from utils.config.lines import line_of
from utils.config.schema.base import inner_tables
from utils.config.schema.dataset import DatasetConfig
from utils.config.schema.experiment import ExperimentConfig
from utils.config.schema.model import experiment_class

TableT = TypeVar("TableT", bound=BaseModel)
TRAINING = ""
"""Key of the training set beside the names of the evaluation sets."""


@dataclass(frozen=True)
class ErrorDetail:
    """One error of the configuration: file, key, and what to change."""

    file: Path
    key: str
    message: str
    line: int | None = None

    def __str__(self) -> str:
        place = str(self.file) if self.line is None else f"{self.file}, line {self.line}"
        return f"{place}: {self.key}: {self.message}" if self.key else f"{place}: {self.message}"


def located(errors: Sequence[ErrorDetail], overrides: Sequence[str]) -> list[ErrorDetail]:
    """The errors with the line numbers of their keys, except keys that `--set` has written or written below."""
    set_keys = [text.partition("=")[0].strip() + "." for text in overrides]

    def is_set(key: str) -> bool:
        return any(f"{key}.".startswith(other) or other.startswith(f"{key}.") for other in set_keys)

    return [
        replace(error, line=line_of(error.file, error.key))
        if error.line is None and error.key and error.file.suffix == ".toml" and not is_set(error.key)
        else error
        for error in errors
    ]


class ConfigError(Exception):
    """All errors of a configuration; the text has one line for each."""

    def __init__(self, errors: Sequence[ErrorDetail]) -> None:
        super().__init__("\n".join(str(error) for error in errors))
        self.errors = list(errors)


@dataclass(frozen=True)
class Config:
    """The checked files of an experiment."""

    path: Path
    experiment: ExperimentConfig
    dataset: DatasetConfig
    eval_sets: dict[str, DatasetConfig]
    """Name -> the dataset file of an evaluation set."""

    @property
    def dataset_path(self) -> Path:
        return self.experiment.dataset

    def dataset_of(self, name: str) -> tuple[Path, DatasetConfig]:
        """Path and content of the dataset file of a set; held-out images belong to the file of the training set."""
        if name not in self.eval_sets:
            return self.dataset_path, self.dataset
        assert self.experiment.eval is not None
        path = next(entry.dataset for entry in self.experiment.eval.sets if entry.name == name)
        return path, self.eval_sets[name]

    def dataset_files(self) -> dict[Path, DatasetConfig]:
        """All dataset files: path -> table."""
        return dict(self.dataset_of(name) for name in (TRAINING, *self.eval_sets))


# --- reading and overriding --------------------------------------------------------------------------------------------


def read_toml(path: Path, errors: list[ErrorDetail]) -> dict[str, Any] | None:
    """The content of a file; None, and an error is added, if it cannot be read."""
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        errors.append(ErrorDetail(path, "", "does not exist"))
    except (OSError, UnicodeDecodeError) as error:
        errors.append(ErrorDetail(path, "", f"cannot be read: {error}"))
    except tomllib.TOMLDecodeError as error:
        errors.append(ErrorDetail(path, "", f"is not valid TOML: {error}"))
    return None


def parse_override(text: str) -> tuple[list[str], Any]:
    """`a.b=VALUE` -> (["a", "b"], value). VALUE is parsed as TOML, or else taken as a string.

    Raises ValueError without an equals sign.
    """
    key, separator, value = text.partition("=")
    if not separator or not key.strip():
        raise ValueError(f"--set {text}: must be KEY=VALUE, such as optimizer.learning_rate=1e-4")
    try:
        parsed = tomllib.loads(f"value = {value}")["value"]
    except tomllib.TOMLDecodeError:
        parsed = value
    return [part.strip() for part in key.split(".")], parsed


def apply_overrides(raw: dict[str, Any], overrides: Sequence[str], path: Path, errors: list[ErrorDetail]) -> None:
    """Writes the values of `--set` into the content of the file."""
    for text in overrides:
        try:
            keys, value = parse_override(text)
        except ValueError as error:
            errors.append(ErrorDetail(path, "", str(error)))
            continue
        table = raw
        for key in keys[:-1]:
            table = table.setdefault(key, {})
            if not isinstance(table, dict):
                errors.append(
                    ErrorDetail(path, ".".join(keys), f"{key} is not a table, so it cannot have the key {keys[-1]}")
                )
                break
        else:
            table[keys[-1]] = value


# --- checking ----------------------------------------------------------------------------------------------------------


def check_table(
    table: type[TableT], raw: Mapping[str, Any], path: Path, errors: list[ErrorDetail], elsewhere: Mapping[str, list[str]]
) -> TableT | None:
    """The checked table; None, and errors are added, if it is invalid. `elsewhere`: key -> its places in other files."""
    try:
        return table.model_validate(raw)
    except ValidationError as invalid:
        for item in invalid.errors():
            key = _key_path(item["loc"])
            if item["type"] == "extra_forbidden":
                message = _unknown_key_message(str(item["loc"][-1]), item["loc"][:-1], table, elsewhere)
            elif item["type"] == "missing":
                message = "is missing"
            elif item["type"] == "value_error" and _is_table_or_list_of_tables(item["input"]):  # too long to quote
                message = _plain(item["msg"])
            else:
                message = f"= {item['input']!r}: {_plain(item['msg'])}"
            error = ErrorDetail(path, key, message)
            if errors and (joined := _alternative(errors[-1], error)) is not None:
                errors[-1] = joined
            elif error not in errors:
                errors.append(error)
        return None


def _alternative(one: ErrorDetail, other: ErrorDetail) -> ErrorDetail | None:
    """One error of two about the same value, which may be of either of two kinds; None if they are not."""
    start, found, text = other.message.partition(": must be ")
    is_same = bool(found) and (one.file, one.key) == (other.file, other.key) and one.message.startswith(start + found)
    return ErrorDetail(one.file, one.key, f"{one.message}, or {text}") if is_same and text not in one.message else None


def _is_table_or_list_of_tables(value: Any) -> bool:
    return isinstance(value, dict) or (isinstance(value, list) and any(isinstance(entry, dict) for entry in value))


def _plain(message: str) -> str:
    plain = message.removeprefix("Value error, ").replace("Input should be", "must be")
    plain = plain.replace("Input is not a valid path for <class 'pathlib.Path'>", "must be a path")
    plain = re.sub(r"a valid dictionary or (instance|object) .*", "a table", plain)
    plain = plain.replace("String should match pattern", "must match")
    return re.sub(r"List should have at least 1 item after validation, not 0", "must not be empty", plain)


def _key_path(location: Sequence[str | int]) -> str:
    """("directory", 1, "path") -> "directory[1].path". Parts that name the branch of a union are omitted."""
    text = ""
    for part in location:
        if isinstance(part, int):
            text += f"[{part}]"
        elif "[" not in part and not part.startswith(("function-", "constrained-", "literal")):
            text += f".{part}" if text else part
    for branch in (".int", ".float", ".str"):
        text = text.removesuffix(branch)
    return text


def _tables(table: type[BaseModel], path: str = "") -> Iterator[tuple[str, str]]:
    """All keys below a table, as (table path, key)."""
    for name, field in table.model_fields.items():
        yield path, name
        for inner in inner_tables(field.annotation):
            yield from _tables(inner, f"{path}.{name}" if path else name)


def known_keys(table: type[BaseModel]) -> dict[str, list[str]]:
    """Key -> the tables that have it ("" is the top level)."""
    known: dict[str, list[str]] = {}
    for path, name in _tables(table):
        known.setdefault(name, []).append(path)
    return known


def _unknown_key_message(
    key: str, location: Sequence[str | int], table: type[BaseModel], elsewhere: Mapping[str, list[str]]
) -> str:
    here = ".".join(str(part) for part in location if not isinstance(part, int))
    known = known_keys(table)
    if key in known:
        return f"unknown key here; it belongs {_place(known[key][0])}"
    if key in elsewhere:
        return f"unknown key here; it belongs {elsewhere[key][0]}"
    own = [name for name, places in known.items() if here in places]
    close = difflib.get_close_matches(key, own, n=1) or difflib.get_close_matches(key, list(known), n=1)
    if close:
        places = known[close[0]]
        where = "" if here in places else f", {_place(places[0])}"
        return f"unknown key; did you mean `{close[0]}`{where}?"
    other = difflib.get_close_matches(key, list(elsewhere), n=1)
    if other:
        return f"unknown key; did you mean `{other[0]}`, {elsewhere[other[0]][0]}?"
    return f"unknown key; this table has {', '.join(own)}"


def _place(table_path: str) -> str:
    return f"in [{table_path}]" if table_path else "at the top level, above the first [table]"


# --- the whole ---------------------------------------------------------------------------------------------------------


def load_config(path: Path, overrides: Sequence[str] = ()) -> Config:
    """Reads and checks all files. Raises ConfigError with all of their errors."""
    errors: list[ErrorDetail] = []
    raw = read_toml(path, errors)
    if raw is None:
        raise ConfigError(errors)
    apply_overrides(raw, overrides, path, errors)
    experiment = _check_experiment(raw, path, errors)
    dataset_path = raw.get("dataset")
    dataset = None
    if isinstance(dataset_path, str):
        dataset = _check_dataset(Path(dataset_path), errors)
    eval_sets = {name: _check_eval_set(set_path, errors) for name, set_path in _eval_paths(raw).items()}
    if experiment is None or dataset is None or errors:
        raise ConfigError(located(errors, overrides))
    return Config(path, experiment, dataset, {name: table for name, table in eval_sets.items() if table is not None})


def _check_experiment(raw: Mapping[str, Any], path: Path, errors: list[ErrorDetail]) -> ExperimentConfig | None:
    model = raw.get("model")
    family = model.get("type") if isinstance(model, dict) else None
    table: type[ExperimentConfig] = ExperimentConfig
    if isinstance(family, str) and family in models.family_names():
        table = experiment_class(family)
    elif "model" in raw and not isinstance(model, dict):
        errors.append(ErrorDetail(path, "model", f"= {model!r}: must be a table, [model]"))
    elif isinstance(model, dict):
        known = ", ".join(repr(name) for name in models.family_names())
        given = "is missing" if family is None else f"= {family!r}: unknown model type"
        errors.append(ErrorDetail(path, "model.type", f"{given}; known: {known}"))
    dataset_keys = {key: ["in the dataset file"] for key in known_keys(DatasetConfig)}
    experiment = check_table(table, raw, path, errors, dataset_keys)
    if experiment is not None and experiment.epochs is None and experiment.max_steps is None:
        errors.append(ErrorDetail(path, "max_steps", "is missing; set `max_steps`, `epochs` or both"))
    return experiment


def _check_dataset(path: Path, errors: list[ErrorDetail]) -> DatasetConfig | None:
    raw = read_toml(path, errors)
    if raw is None:
        return None
    experiment_keys = {
        key: [f"in the experiment file, {_place(places[0])}"]
        for family in models.family_names()
        for key, places in known_keys(experiment_class(family)).items()
    }
    dataset = check_table(DatasetConfig, raw, path, errors, experiment_keys)
    if dataset is not None:
        _check_limits(dataset, path, errors)
    return dataset


def _check_limits(dataset: DatasetConfig, path: Path, errors: list[ErrorDetail]) -> None:
    """Checks that minima do not exceed maxima, at the top level and in each directory."""
    pairs = (("min_ar", "max_ar"), ("min_pixels", "max_pixels"))
    top = dataset.model_dump()
    for index, directory in enumerate(dataset.directory):
        values = directory.model_dump()
        for low, high in pairs:
            if values[high] is not None and values[low] > values[high]:
                is_own = (values[low], values[high]) != (top[low], top[high])
                place = f"directory[{index}].{low}" if is_own else low
                error = ErrorDetail(path, place, f"= {values[low]}: must not exceed {high}, which is {values[high]}")
                if error not in errors:
                    errors.append(error)


def _eval_paths(raw: Mapping[str, Any]) -> dict[str, Path]:
    """Name -> dataset file of the evaluation sets that are written correctly."""
    table = raw.get("eval")
    sets = table.get("sets") if isinstance(table, dict) else None
    entries = [entry for entry in sets if isinstance(entry, dict)] if isinstance(sets, list) else []
    return {str(entry.get("name")): Path(entry["dataset"]) for entry in entries if isinstance(entry.get("dataset"), str)}


def _check_eval_set(path: Path, errors: list[ErrorDetail]) -> DatasetConfig | None:
    """Checks the dataset file of an evaluation set, which must not have keys that apply to training only."""
    dataset = _check_dataset(path, errors)
    for index, directory in enumerate(dataset.directory if dataset is not None else []):
        values = directory.model_dump()
        for key in ("horizontal_flip", "loss_weight", "cache_shuffle_num"):
            if values[key] != type(directory).model_fields[key].default:
                place = f"directory[{index}].{key}"
                errors.append(
                    ErrorDetail(path, place, "cannot be used in an evaluation set, where all images have equal weight")
                )
        if values["num_repeats"] % 1:
            place = f"directory[{index}].num_repeats"
            errors.append(
                ErrorDetail(path, place, f"= {values['num_repeats']}: must be a whole number in an evaluation set")
            )
    return dataset


def dump_toml(table: BaseModel) -> str:
    """The values of a table, defaults included, as TOML that loads to an equal table. Unset keys are omitted."""
    return toml.dumps(table.model_dump(mode="json", exclude_none=True), _Encoder())


class _Encoder(toml.TomlEncoder):
    """toml 0.10.2 mangles backslashes and control characters in strings; JSON's escapes are TOML's too."""

    def __init__(self) -> None:
        super().__init__()
        self.dump_funcs[str] = lambda text: json.dumps(text, ensure_ascii=False).replace("\x7f", "\\u007f")
