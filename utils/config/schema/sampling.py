"""The `[sampling]` table."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, field_serializer

from utils.config.schema.base import Float, Int, Table, TrainedWeights
from utils.previews.prompts import parse_prompt


class PromptConfig(Table):
    """One preview. In place of a table, a string: the prompt, with sd-scripts' flags `--w --h --d --s --l --n` if any.
    What is unset is as in `[sampling]`."""

    prompt: str = Field(description="What to draw.")
    negative_prompt: str | None = Field(None, description="What guidance leads away from. Flag `--n`.")
    width: Int | None = Field(None, ge=16, description="Pixels. Flag `--w`.")
    height: Int | None = Field(None, ge=16, description="Pixels. Flag `--h`.")
    seed: Int | None = Field(
        None, ge=0, description="Decides the noise. Flag `--d`. Default: that of `[sampling]` plus the place in the list."
    )
    steps: Int | None = Field(None, ge=1, description="Steps of the sampler. Flag `--s`.")
    cfg: Float | None = Field(None, ge=1, description="Strength of classifier-free guidance. Flag `--l`.")


def _as_prompt(entry: Any) -> Any:
    if isinstance(entry, str):
        return parse_prompt(entry)
    if not isinstance(entry, dict | PromptConfig):
        raise ValueError("must be a string, or a table such as { prompt = 'a fox', seed = 1 }")
    return entry


class SkipLayerConfig(Table):
    """Skip-layer guidance: lead away from what the network draws without some of its blocks. For SD3.5-medium."""

    layers: list[Annotated[Int, Field(ge=0)]] = Field(
        default=[7, 8, 9], min_length=1, description="Blocks left out, counted from 0."
    )
    scale: Float = Field(2.5, gt=0, description="Strength.")
    start: Float = Field(0.01, ge=0, le=1, description="Share of the steps after which it begins.")
    end: Float = Field(0.2, ge=0, le=1, description="Share of the steps at which it ends.")


class SamplingConfig(Table):
    """Preview images, drawn by the network in training at the start, now and then, and at the end."""

    prompts: list[Annotated[PromptConfig, BeforeValidator(_as_prompt)]] = Field(
        default_factory=list,
        description="One image each: a string, or a table with what it does not share with the others. None: no previews.",
    )
    prompts_file: Path | None = Field(
        None, description="A text file with more prompts, one a line, in the form of sd-scripts; `#` begins a comment line."
    )
    negative_prompt: str = Field("", description="What guidance leads away from.")
    every_n_steps: Int | None = Field(None, ge=1, description="Steps between previews. Unset: only the first and last step.")
    sampler: Literal["euler", "dpmpp_2m"] = Field(
        "euler", description="`euler`, or `dpmpp_2m` (DPM-Solver++ of second order: fewer steps for the same image)."
    )
    steps: Int = Field(28, ge=1, description="Steps of the sampler.")
    cfg: Float = Field(4.5, ge=1, description="Strength of classifier-free guidance; 1 is none.")
    shift: Float | None = Field(
        None, ge=0.01, le=100, description="Shift of the noise levels drawn through. Unset: as `[objective]` trains."
    )
    skip_layer_guidance: SkipLayerConfig | None = None
    width: Int = Field(1024, ge=16, description="Pixels.")
    height: Int = Field(1024, ge=16, description="Pixels.")
    seed: Int = Field(0, ge=0, description="Each prompt without a seed of its own has this plus its place in the list.")
    batch_size: Int = Field(4, ge=1, description="Images drawn at once.")
    decode_tile_pixels: Int = Field(
        1024,
        ge=64,
        description="Larger images are decoded in tiles of this side that overlap by a quarter, to save memory.",
    )
    weights: TrainedWeights = Field("last", description="`last`: as they are in training. `ema`: their average, of `[ema]`.")

    @field_serializer("prompts")
    def _as_written(self, prompts: list[PromptConfig]) -> list[dict[str, Any]]:
        return [prompt.model_dump(exclude_none=True) for prompt in prompts]
