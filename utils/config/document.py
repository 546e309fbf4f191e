"""Writes docs/configuration.md from the schema:  python -m utils.config.document > docs/configuration.md"""

from __future__ import annotations

import re
import types
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

import models
from utils.config.schema.base import inner_tables
from utils.config.schema.dataset import DatasetConfig
from utils.config.schema.experiment import ExperimentConfig
from utils.config.schema.model import experiment_class

_INTRODUCTION = """# Every key

This page is generated from the schema by `make docs`; a test fails when the two differ. Keys that are not listed here are
errors. Paths are relative to the working directory. `--set table.key=VALUE` overrides any key of the experiment file.
"""


def document() -> str:
    """The page as Markdown."""
    parts = [_INTRODUCTION, "## The experiment file (`--config`)\n"]
    for family in models.family_names():
        parts += _table(experiment_class(family), "", f' (`type = "{family}"`)')
    parts.append("## The dataset file (`dataset`)\n")
    parts += _table(DatasetConfig, "", "")
    return "\n".join(parts)


def _table(table: type[BaseModel], path: str, family: str, is_list: bool = False) -> Iterator[str]:
    """The keys of a table, then the tables inside it."""
    inner = [(name, field, found) for name, field in table.model_fields.items() for found in inner_tables(field.annotation)]
    only_tables = [name for name, field in table.model_fields.items() if _is_table(field.annotation)]
    name = f"[[{path}]]" if is_list else f"[{path}]"
    heading = f"### `{name}`{family if path == 'model' else ''}" if path else "### Top level"
    yield f"{heading}\n\n{_first_paragraph(table, path)}\n"
    yield "| key | type | default | meaning |\n|---|---|---|---|"
    for name, field in table.model_fields.items():
        if name not in only_tables:
            yield f"| `{name}` | {_type(field)} | {_default(field)} | {field.description} |"
    yield ""
    for name, field, found in inner:
        yield from _table(found, f"{path}.{name}" if path else name, family, _is_in_list(field.annotation))


def _first_paragraph(table: type[BaseModel], path: str) -> str:
    if not path and issubclass(table, ExperimentConfig):
        return "The settings of one run."
    return " ".join((table.__doc__ or "").split("\n\n")[0].split())


def _is_table(annotation: Any) -> bool:
    """Whether the value must be a table or a list of tables."""
    return any(isinstance(part, type) and issubclass(part, BaseModel) for part in (annotation, *get_args(annotation)))


def _is_in_list(annotation: Any) -> bool:
    """Whether there may be several tables, written as `[[name]]`."""
    return get_origin(annotation) in (list, tuple) or any(_is_in_list(part) for part in get_args(annotation))


def _type(field: FieldInfo) -> str:
    limits = [_limit(item) for item in field.metadata if _limit(item)]
    return ", ".join([_type_name(field.annotation), *limits])


def _limit(item: Any) -> str:
    for attribute, sign in (("gt", ">"), ("ge", ">="), ("lt", "<"), ("le", "<=")):
        value = vars(item).get(attribute) if hasattr(item, "__dict__") else getattr(item, attribute, None)
        if value is not None:
            return f"{sign} {'2^63' if value == 2**63 else value}"
    return ""


def _type_name(annotation: Any) -> str:
    origin = get_origin(annotation)
    if origin is Annotated:
        return _type_name(get_args(annotation)[0])
    if origin is Literal:
        return " or ".join(f"`{str(value).lower()}`" if value is False else f'`"{value}"`' for value in get_args(annotation))
    if origin in (Union, types.UnionType):
        return " or ".join(_type_name(part) for part in get_args(annotation) if part is not type(None))
    if origin is list:
        return f"list of {_type_name(get_args(annotation)[0])}"
    if list(inner_tables(annotation)):
        return "table"
    names = {int: "integer", float: "number", str: "string", bool: "true or false", Path: "path"}
    return names.get(annotation, "table" if typing.get_origin(annotation) is dict else str(annotation))


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return "**required**"
    value = field.default if field.default is not PydanticUndefined else None
    if value is None:
        return "none"
    text = f'"{value}"' if isinstance(value, str) else str(value).lower() if isinstance(value, bool) else str(value)
    return f"`{re.sub('^$', '[]', text)}`"


if __name__ == "__main__":
    print(document(), end="")
