"""The prompts of a run: those of `[sampling]`, then those of its `prompts_file`, with defaults from `[sampling]`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from models.family import LatentSpec
from utils.config.load import ErrorDetail, check_table
from utils.config.prompt_flags import FLAGS, parse_prompt
from utils.config.schema.sampling import PromptConfig, SamplingConfig, SkipLayerConfig
from utils.previews.samplers import skips_layers

FileError = tuple[Path | None, str, str]
"""(file, or None for the experiment file; place in it; message)."""
_FLAG_OF = {flag.key: f"--{name}" for name, flag in FLAGS.items()}
_OVERLAP_PARTS = 4
"""Tiles overlap by a quarter, which must be a whole number of latent pixels."""


@dataclass(frozen=True)
class Prompt:
    """One preview image."""

    text: str
    negative: str
    width: int
    """Pixels."""
    height: int
    """Pixels."""
    seed: int
    steps: int
    cfg: float
    place: str
    """Where the prompt is written: `sampling.prompts[2]`, or file and line."""
    own_keys: frozenset[str] = frozenset()
    """Keys that the prompt sets itself; the others have the values of `[sampling]`."""


# --- reading -----------------------------------------------------------------------------------------------------------


def read_prompts(config: SamplingConfig) -> tuple[list[Prompt], list[FileError]]:
    """Returns all prompts in order, and the errors of the file of prompts, one for each invalid line."""
    tables = [(f"sampling.prompts[{index}]", table) for index, table in enumerate(config.prompts)]
    errors: list[FileError] = []
    if config.prompts_file is not None:
        from_file, errors = _read_file(config.prompts_file)
        tables += from_file
    return [_fill_in(table, place, config, index) for index, (place, table) in enumerate(tables)], errors


def _fill_in(table: PromptConfig, place: str, config: SamplingConfig, index: int) -> Prompt:
    """Fills in the values of [sampling]; the default seed is that of [sampling] plus the index of the prompt."""
    return Prompt(
        text=table.prompt,
        negative=config.negative_prompt if table.negative_prompt is None else table.negative_prompt,
        width=config.width if table.width is None else table.width,
        height=config.height if table.height is None else table.height,
        seed=config.seed + index if table.seed is None else table.seed,
        steps=config.steps if table.steps is None else table.steps,
        cfg=config.cfg if table.cfg is None else table.cfg,
        place=place,
        own_keys=frozenset(table.model_dump(exclude_none=True)),
    )


def _read_file(path: Path) -> tuple[list[tuple[str, PromptConfig]], list[FileError]]:
    """Returns (place, table) of each valid line, and the errors of the others."""
    text, reason = _read_text(path)
    if reason is not None:
        return [], [(None, "sampling.prompts_file", f"= {str(path)!r}: {reason}")]
    prompts: list[tuple[str, PromptConfig]] = []
    errors: list[FileError] = []
    for number, line in _prompt_lines(text):
        table, texts = _read_line(line)
        errors += [(path, f"line {number}", text) for text in texts]
        if table is not None:
            prompts.append((f"{path}: line {number}", table))
    if not prompts and not errors:
        return [], [(None, "sampling.prompts_file", f"= {str(path)!r}: contains no prompt")]
    return prompts, errors


def _read_text(path: Path) -> tuple[str, str | None]:
    """Returns the text of a file and None, or "" and the reason why it cannot be read."""
    if path.suffix.lower() in (".toml", ".json"):
        return "", "must be a text file with one prompt per line; write tables into [[sampling.prompts]]"
    try:
        return path.read_text(encoding="utf-8-sig"), None
    except FileNotFoundError:
        return "", "does not exist"
    except UnicodeDecodeError:
        return "", "is not UTF-8 text"
    except OSError as error:
        return "", f"cannot be read: {error.strerror}"


def _prompt_lines(text: str) -> Iterator[tuple[int, str]]:
    """Yields (number, line) of all lines except blank lines and comments."""
    for number, line in enumerate(text.split("\n"), start=1):
        stripped = line.strip()
        if stripped and not stripped.startswith("#"):
            yield number, stripped


def _read_line(line: str) -> tuple[PromptConfig | None, list[str]]:
    """Returns the table of a line, or None and its errors."""
    try:
        written = parse_prompt(line)
    except ValueError as error:
        return None, [str(error)]
    errors: list[ErrorDetail] = []
    table = check_table(PromptConfig, written, Path(), errors, {})
    return table, [f"{_FLAG_OF.get(error.key, error.key)} {error.message}" for error in errors]


# --- checking ----------------------------------------------------------------------------------------------------------


def prompt_errors(
    prompts: Sequence[Prompt], config: SamplingConfig, latent: LatentSpec, num_blocks: int
) -> list[tuple[str, str]]:
    """Returns, as (key, message), what this network cannot generate; each error once, and none without prompts."""
    if not prompts:
        return []
    errors = [error for prompt in prompts for error in _size_errors(prompt, config, latent)]
    if config.skip_layer_guidance is not None:
        errors += _skip_errors(config.skip_layer_guidance, prompts, num_blocks)
    tile_multiple = _OVERLAP_PARTS * latent.downscale
    if config.decode_tile_pixels % tile_multiple:
        message = f"= {config.decode_tile_pixels}: must be a multiple of {tile_multiple}"
        errors.append(("sampling.decode_tile_pixels", message))
    return list(dict.fromkeys(errors))


def _size_errors(prompt: Prompt, config: SamplingConfig, latent: LatentSpec) -> Iterator[tuple[str, str]]:
    for key, side in (("width", prompt.width), ("height", prompt.height)):
        if side % latent.pixel_multiple:
            message = f"= {side}: must be a multiple of {latent.pixel_multiple}"
        elif side > latent.max_side_pixels:
            message = f"= {side}: the network supports at most {latent.max_side_pixels} pixels"
        else:
            continue
        if key not in prompt.own_keys:
            yield f"sampling.{key}", message
        elif prompt.place.startswith("sampling."):
            yield f"{prompt.place}.{key}", message
        else:
            yield "sampling.prompts_file", f"{prompt.place}: {_FLAG_OF[key]} {message}"


def _skip_errors(config: SkipLayerConfig, prompts: Sequence[Prompt], num_blocks: int) -> Iterator[tuple[str, str]]:
    key, last = "sampling.skip_layer_guidance", num_blocks - 1
    for index, block in enumerate(config.layers):
        if block >= last:
            why = "the last block cannot be skipped" if block == last else f"the network has blocks 0 to {last}"
            yield f"{key}.layers[{index}]", f"= {block}: must be at most {last - 1}; {why}"
    if config.start >= config.end:
        yield f"{key}.start", f"= {config.start}: must be below end, {config.end}"
        return
    steps = {prompt.steps for prompt in prompts}
    if not any(skips_layers(step, count, config.start, config.end) for count in steps for step in range(count)):
        yield (
            f"{key}.end",
            f"= {config.end}: none of {max(steps)} steps lies between the fractions {config.start} and {config.end}; "
            "raise end, or use more steps",
        )
