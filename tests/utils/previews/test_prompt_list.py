"""utils/previews/prompt_list.py: prompts from the experiment file and from their own file, and their errors."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from models.family import LatentSpec
from utils.config.schema.sampling import SamplingConfig
from utils.previews.prompt_list import Prompt, prompt_errors, read_prompts

LATENT = LatentSpec(channels=16, downscale=8, patch=2, max_side_pixels=256)
NUM_BLOCKS = 24
DEFAULTS: dict[str, Any] = {"width": 64, "height": 32, "steps": 20, "cfg": 3.0, "seed": 100, "negative_prompt": "ugly"}


def sampling(**changes: Any) -> SamplingConfig:
    return SamplingConfig.model_validate({**DEFAULTS, **changes})


def prompts_of(config: SamplingConfig) -> list[Prompt]:
    prompts, errors = read_prompts(config)
    assert errors == []
    return prompts


def values(prompt: Prompt) -> tuple[Any, ...]:
    return (prompt.text, prompt.negative, prompt.width, prompt.height, prompt.seed, prompt.steps, prompt.cfg)


def errors_of(**changes: Any) -> list[tuple[str, str]]:
    config = sampling(**changes)
    return prompt_errors(prompts_of(config), config, LATENT, NUM_BLOCKS)


# --- reading -----------------------------------------------------------------------------------------------------------


def test_no_prompts_are_valid() -> None:
    assert read_prompts(SamplingConfig()) == ([], [])


def test_keys_that_a_prompt_lacks_have_the_values_of_the_table() -> None:
    (prompt,) = prompts_of(sampling(prompts=["a fox"]))
    assert values(prompt) == ("a fox", "ugly", 64, 32, 100, 20, 3.0)


def test_keys_that_a_prompt_has_take_precedence() -> None:
    written = {"prompt": "a fox", "negative_prompt": "", "width": 48, "height": 16, "seed": 0, "steps": 1, "cfg": 1.0}
    line = "a fox --n grey --w 48 --h 16 --d 0 --s 1 --l 1"
    table, flags = prompts_of(sampling(prompts=[written, line]))
    assert values(table) == ("a fox", "", 48, 16, 0, 1, 1.0)
    assert values(flags) == ("a fox", "grey", 48, 16, 0, 1, 1.0)


def test_default_seeds_count_prompts_of_table_and_file(tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("three\nfour --d 7\nfive\n")
    prompts = prompts_of(sampling(prompts=["one", "two --d 3"], prompts_file=tmp_path / "prompts.txt"))
    assert [(prompt.text, prompt.seed) for prompt in prompts] == [
        ("one", 100),
        ("two", 3),
        ("three", 102),
        ("four", 7),
        ("five", 104),
    ]


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"])
@pytest.mark.parametrize("newline", ["\n", "\r\n"])
def test_a_file_has_a_prompt_on_each_line(tmp_path: Path, encoding: str, newline: str) -> None:
    lines = ["a Füchsin --w 48", "", "# a comment", "   ", "  # another", "a hare\u2028on one line #1", "--h 16"]
    (tmp_path / "prompts.txt").write_bytes(newline.join(lines).encode(encoding))
    first, second, third = prompts_of(sampling(prompts_file=tmp_path / "prompts.txt"))
    assert (first.text, first.width) == ("a Füchsin", 48)
    assert second.text == "a hare\u2028on one line #1"
    assert (third.text, third.height) == ("", 16)
    assert [prompt.place for prompt in (first, second, third)] == [
        f"{tmp_path / 'prompts.txt'}: line {number}" for number in (1, 6, 7)
    ]


def test_every_invalid_line_has_an_error_with_its_number_and_what_is_allowed(tmp_path: Path) -> None:
    path = tmp_path / "prompts.txt"
    path.write_text("a fox --q 3\n\na hare --w 8 --s 0\na good one\n# --q\na dog --w wide\na cat --d -1 --l 0.5\n")
    prompts, errors = read_prompts(sampling(prompts=["first"], prompts_file=path))
    assert [prompt.text for prompt in prompts] == ["first", "a good one"]
    flags = "--w (width), --h (height), --d (seed), --s (steps), --l (cfg), --n (negative_prompt)"
    assert errors == [
        (path, "line 1", f"unknown flag --q; the flags are {flags}"),
        (path, "line 3", "--w = 8: must be greater than or equal to 16"),
        (path, "line 3", "--s = 0: must be greater than or equal to 1"),
        (path, "line 6", "--w wide: must be a whole number, the width"),
        (path, "line 7", "--d = -1: must be greater than or equal to 0"),
        (path, "line 7", "--l = 0.5: must be greater than or equal to 1"),
    ]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("missing.txt", None, "does not exist"),
        ("empty.txt", b"", "contains no prompt"),
        ("comments.txt", b"# nothing\n\n", "contains no prompt"),
        ("latin.txt", "a Füchsin".encode("latin-1"), "is not UTF-8 text"),
        (
            "prompts.toml",
            b"[prompt]",
            "must be a text file with one prompt per line; write tables into [[sampling.prompts]]",
        ),
        ("prompts.json", b"[]", "must be a text file with one prompt per line; write tables into [[sampling.prompts]]"),
    ],
)
def test_a_file_without_prompts_is_an_error(tmp_path: Path, name: str, content: bytes | None, message: str) -> None:
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content)
    prompts, errors = read_prompts(sampling(prompts_file=path))
    assert prompts == []
    assert errors == [(None, "sampling.prompts_file", f"= {str(path)!r}: {message}")]


def test_a_folder_as_file_of_prompts_is_an_error(tmp_path: Path) -> None:
    _, errors = read_prompts(sampling(prompts_file=tmp_path))
    assert errors == [(None, "sampling.prompts_file", f"= {str(tmp_path)!r}: cannot be read: Is a directory")]


# --- checking ----------------------------------------------------------------------------------------------------------


def test_valid_prompts_have_no_errors() -> None:
    assert errors_of(prompts=["a", "b --w 256 --h 16"], skip_layer_guidance={}, decode_tile_pixels=96) == []


def test_without_prompts_nothing_is_checked() -> None:
    assert errors_of(width=40, decode_tile_pixels=65, skip_layer_guidance={"layers": [99]}) == []


def test_an_invalid_default_size_has_one_error_and_only_where_it_is_used() -> None:
    errors = [
        ("sampling.width", "= 40: must be a multiple of 16"),
        ("sampling.height", "= 272: the network supports at most 256 pixels"),
    ]
    assert errors_of(prompts=["a", "b", "c --w 32"], width=40, height=272) == errors
    assert errors_of(prompts=["a --w 32 --h 32"], width=40, height=272) == []


def test_the_error_of_a_prompt_s_own_size_has_its_place(tmp_path: Path) -> None:
    path = tmp_path / "prompts.txt"
    path.write_text("# sizes\nc --h 24\nd\ne --w 512\n")
    assert errors_of(prompts=["a", {"prompt": "b", "width": 40}], prompts_file=path) == [
        ("sampling.prompts[1].width", "= 40: must be a multiple of 16"),
        ("sampling.prompts_file", f"{path}: line 2: --h = 24: must be a multiple of 16"),
        ("sampling.prompts_file", f"{path}: line 4: --w = 512: the network supports at most 256 pixels"),
    ]


@pytest.mark.parametrize(
    ("skip", "key", "message"),
    [
        ({"layers": [7, 24]}, "layers[1]", "= 24: must be at most 22; the network has blocks 0 to 23"),
        ({"layers": [23]}, "layers[0]", "= 23: must be at most 22; the last block cannot be skipped"),
        ({"start": 0.5}, "start", "= 0.5: must be below end, 0.2"),
        ({"start": 0.2}, "start", "= 0.2: must be below end, 0.2"),
        (
            {"end": 0.05},
            "end",
            "= 0.05: none of 20 steps lies between the fractions 0.01 and 0.05; raise end, or use more steps",
        ),
    ],
)
def test_invalid_skip_layer_guidance_is_an_error(skip: dict[str, Any], key: str, message: str) -> None:
    assert errors_of(prompts=["a"], skip_layer_guidance=skip) == [(f"sampling.skip_layer_guidance.{key}", message)]


def test_skip_layer_guidance_must_apply_to_at_least_one_prompt() -> None:
    assert errors_of(prompts=["a --s 3", "b --s 20"], skip_layer_guidance={}) == []
    assert len(errors_of(prompts=["a --s 3", "b --s 4"], skip_layer_guidance={})) == 1


@pytest.mark.parametrize(("pixels", "is_fine"), [(64, True), (1024, True), (80, False), (100, False)])
def test_tiles_overlap_by_whole_latent_pixels(pixels: int, is_fine: bool) -> None:
    errors = [] if is_fine else [("sampling.decode_tile_pixels", f"= {pixels}: must be a multiple of 32")]
    assert errors_of(prompts=["a"], decode_tile_pixels=pixels) == errors
