"""utils/config/prompt_flags.py: prompts with the flags of sd-scripts."""

from __future__ import annotations

import re
from typing import Any

import pytest

from utils.config.prompt_flags import FLAGS, parse_prompt
from utils.config.schema.sampling import PromptConfig

ALL_FLAGS = "--w (width), --h (height), --d (seed), --s (steps), --l (cfg), --n (negative_prompt)"


@pytest.mark.parametrize(
    ("line", "table"),
    [
        ("a red fox", {}),
        ("a red fox --w 1024", {"width": 1024}),
        ("a red fox --h 768 --w 1024", {"height": 768, "width": 1024}),
        ("a red fox --d 42 --s 28 --l 4.5", {"seed": 42, "steps": 28, "cfg": 4.5}),
        ("a red fox --l 7", {"cfg": 7.0}),
        ("a red fox --n low quality, bad anatomy --d 1", {"negative_prompt": "low quality, bad anatomy", "seed": 1}),
        ("a red fox --W 512 --D 3", {"width": 512, "seed": 3}),
        ("  a red fox   --w   512  ", {"width": 512}),
        ("a red fox\n--w 512", {"width": 512}),
        ("a red fox --d -5", {"seed": -5}),
    ],
)
def test_flags_are_read(line: str, table: dict[str, Any]) -> None:
    assert parse_prompt(line) == {"prompt": "a red fox", **table}


@pytest.mark.parametrize("line", ["a well-known fox", "a fox--w 512", "a fox - w 512"])
def test_dashes_within_words_are_not_flags(line: str) -> None:
    assert parse_prompt(line) == {"prompt": line.strip()}


def test_a_prompt_may_be_empty() -> None:
    assert parse_prompt("") == {"prompt": ""}
    assert parse_prompt("--w 512 --h 256") == {"prompt": "", "width": 512, "height": 256}


def test_flags_and_keys_of_a_prompt_correspond() -> None:
    assert {flag.key for flag in FLAGS.values()} | {"prompt"} == set(PromptConfig.model_fields)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("a fox --x 3", f"unknown flag --x; the flags are {ALL_FLAGS}"),
        ("a fox -- w 3", f"unknown flag --; the flags are {ALL_FLAGS}"),
        ("a fox --ss euler", "unknown flag --ss; the flags are --w"),
        ("a fox --width 512", "unknown flag --width; the flags are --w (width)"),
        ("a fox --w 512 --w 768", "--w is given twice"),
        ("a fox --w 512 --W 768", "--W is given twice"),
        ("a fox --w", "--w: must be a whole number, the width"),
        ("a fox --w 1024.5", "--w 1024.5: must be a whole number, the width"),
        ("a fox --w 1024 px", "--w 1024 px: must be a whole number"),
        ("a fox --h 1_024", "--h 1_024: must be a whole number, the height"),
        ("a fox --d ٣", "--d ٣: must be a whole number, the seed"),
        ("a fox --s twenty", "--s twenty: must be a whole number, the steps"),
        ("a fox --l abc", "--l abc: must be a number, the cfg"),
        ("a fox --l 4,5", "--l 4,5: must be a number"),
        ("a fox --l nan", "--l nan: must be a number"),
        ("a fox --l .", "--l .: must be a number"),
        ("a fox --n", "--n: must be a text, the negative_prompt"),
        ("a fox --w=512", "unknown flag --w=512; the flags are"),
    ],
)
def test_invalid_flag_or_value_is_an_error_that_lists_what_is_allowed(line: str, message: str) -> None:
    with pytest.raises(ValueError, match="^" + re.escape(message)):
        parse_prompt(line)
