"""Prompts as sd-scripts' users write them: `a red fox --w 1024 --h 768 --d 42 --s 28 --l 4.5 --n blurry`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

FLAGS: dict[str, tuple[str, Callable[[str], Any]]] = {
    "w": ("width", int),
    "h": ("height", int),
    "d": ("seed", int),
    "s": ("steps", int),
    "l": ("cfg", float),
    "n": ("negative_prompt", str),
}
"""Flag -> key of a prompt's table, and its type."""


def parse_prompt(line: str) -> dict[str, Any]:
    """A prompt with its flags as a prompt's table. Raises ValueError saying which flag is wrong and which there are."""
    prompt, *parts = line.split(" --")
    table: dict[str, Any] = {"prompt": prompt.strip()}
    for part in parts:
        flag, _, value = part.strip().partition(" ")
        if flag not in FLAGS:
            raise ValueError(f"unknown flag --{flag}; there are {', '.join(f'--{name}' for name in FLAGS)}")
        key, kind = FLAGS[flag]
        if key in table:
            raise ValueError(f"--{flag} is given twice")
        try:
            table[key] = kind(value.strip())
        except ValueError:
            what = "a whole number" if kind is int else "a number"
            raise ValueError(f"--{flag} {value.strip()}: must be {what}, the {key}") from None
    return table
