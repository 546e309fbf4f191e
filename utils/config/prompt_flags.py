"""Prompts with the flags of sd-scripts: `a red fox --w 1024 --h 768 --d 42 --s 28 --l 4.5 --n blurry`."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Flag:
    """A flag of a prompt, written as two dashes and a letter."""

    key: str
    """The key of the prompt's table that it sets."""
    pattern: re.Pattern[str]
    read: Callable[[str], Any]
    allowed: str
    """Description of what the pattern matches, for error messages."""


_WHOLE = (re.compile(r"[+-]?[0-9]+"), int, "a whole number")
_NUMBER = (re.compile(r"[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)"), float, "a number")
_TEXT = (re.compile(r".+", re.DOTALL), str, "a text")
FLAGS = {
    "w": Flag("width", *_WHOLE),
    "h": Flag("height", *_WHOLE),
    "d": Flag("seed", *_WHOLE),
    "s": Flag("steps", *_WHOLE),
    "l": Flag("cfg", *_NUMBER),
    "n": Flag("negative_prompt", *_TEXT),
}
_BEFORE_FLAG = re.compile(r"(?:^|\s)--")


def parse_prompt(line: str) -> dict[str, Any]:
    """Returns the table of a prompt with flags, in any order and in upper or lower case; the prompt may be empty.

    Ranges are not checked here. Raises ValueError with the invalid flag and what is allowed.
    """
    prompt, *parts = _BEFORE_FLAG.split(line)
    table: dict[str, Any] = {"prompt": prompt.strip()}
    for part in parts:
        name, value = (text.strip() for text in re.split(r"\s|$", part, maxsplit=1))
        flag = FLAGS.get(name.lower())
        if flag is None:
            raise ValueError(f"unknown flag --{name}; the flags are {_known_flags()}")
        if flag.key in table:
            raise ValueError(f"--{name} is given twice")
        if not flag.pattern.fullmatch(value):
            raise ValueError(f"{f'--{name} {value}'.strip()}: must be {flag.allowed}, the {flag.key}")
        table[flag.key] = flag.read(value)
    return table


def _known_flags() -> str:
    return ", ".join(f"--{name} ({flag.key})" for name, flag in FLAGS.items())
