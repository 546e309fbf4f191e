"""docs/objective.md: completeness, agreement of its tables with the program, and plots that are up to date."""

from __future__ import annotations

import re
from pathlib import Path
from typing import get_args

import pytest
import torch

from docs.draw_plots import PLOTS
from utils.config.presets import PRESETS
from utils.config.schema.objective import ObjectiveConfig
from utils.config.schema.objective_choices import LossType, PredictionType, TimestepGrid, TimestepSampling, WeightingScheme
from utils.objective.rectified_flow import shift_time
from utils.objective.timestep_sampling import Density, TimeSampler
from utils.objective.weighting import Weighting
from utils.report.plots import as_svg

ROOT = Path(__file__).resolve().parent.parent
PAGE = (ROOT / "docs" / "objective.md").read_text(encoding="utf-8")
NUMBER = re.compile(r"-?\d+(?:\.\d+)?")
SECTIONS = [
    *(("timestep_sampling", name) for name in get_args(TimestepSampling)),
    *(("weighting_scheme", name) for name in get_args(WeightingScheme)),
]


@pytest.mark.parametrize(("key", "name"), SECTIONS)
def test_every_scheme_has_a_section_with_its_plot(key: str, name: str) -> None:
    _, found, rest = PAGE.partition(f'\n### `{key} = "{name}"`\n')
    assert found
    section = re.split(r"\n##+ ", rest)[0]
    plot = f"{key.partition('_')[0].replace('timestep', 'sampling')}_{name}"
    assert f"(plots/{plot}.svg)" in section
    assert re.search(r"^    [tw] = ", section, flags=re.MULTILINE), "the section has no formula"


def test_the_page_shows_exactly_the_plots_that_are_drawn() -> None:
    assert sorted(re.findall(r"\]\(plots/(\w+)\.svg\)", PAGE)) == sorted(PLOTS)
    assert sorted(path.name for path in (ROOT / "docs" / "plots").iterdir()) == sorted(f"{name}.svg" for name in PLOTS)


@pytest.mark.parametrize("name", PLOTS)
def test_plot_is_up_to_date(name: str) -> None:
    """Numbers may differ by a few hundredths of a point: other processors may round the last digit differently."""
    kept = (ROOT / "docs" / "plots" / f"{name}.svg").read_text(encoding="utf-8")
    drawn = as_svg(name, PLOTS[name]) + "\n"
    assert NUMBER.sub("#", drawn) == NUMBER.sub("#", kept), "outdated: run make docs"
    numbers = [[float(number) for number in NUMBER.findall(text)] for text in (drawn, kept)]
    assert numbers[0] == pytest.approx(numbers[1], abs=0.05), "outdated: run make docs"


@pytest.mark.parametrize("name", PLOTS)
def test_plot_is_small_and_has_no_external_references(name: str) -> None:
    text = (ROOT / "docs" / "plots" / f"{name}.svg").read_text(encoding="utf-8")
    assert len(text) < 32_000
    assert set(re.findall(r'href="(.)', text)) <= {"#"}


def test_every_key_of_the_table_is_explained() -> None:
    assert [key for key in ObjectiveConfig.model_fields if f"`{key}" not in PAGE and key != "preset"] == []


def test_every_value_is_explained() -> None:
    for values in (PredictionType, LossType):
        assert [value for value in get_args(values) if f"| `{value}` |" not in PAGE] == []
    assert [value for value in get_args(TimestepGrid) if f'* `"{value}"`' not in PAGE] == []


def test_the_table_of_presets_agrees_with_the_program() -> None:
    rows = PAGE.split("\n## Presets\n")[1].split("\n\nWhy each")[0].splitlines()
    table = [
        [cell.strip() for cell in row.strip("|").split("|")] for row in rows if row.startswith("| `") or "| key |" in row
    ]
    header = [cell.strip("`") for cell in table[0]]
    assert header == ["key", *PRESETS, "default"]
    default = ObjectiveConfig()
    for keys, *cells in table[1:]:
        names = re.findall(r"`(\w+)`", keys)
        shown = {preset: tuple(PRESETS[preset].get(name) for name in names) for preset in PRESETS}
        shown["default"] = tuple(getattr(default, name) for name in names)
        for preset, cell in zip(header[1:], cells, strict=True):
            assert cell == ", ".join(written(value) for value in shown[preset] if value is not None), (keys, preset)
    assert {name for row in table[1:] for name in re.findall(r"`(\w+)`", row[0])} == {
        key for preset in PRESETS.values() for key in preset
    }


def written(value: str | float) -> str:
    return f"`{value}`" if isinstance(value, str) else f"{value:g}"


def test_tests_mentioned_on_the_page_exist() -> None:
    for path in re.findall(r"`(tests/[\w/]+\.py)`", PAGE):
        assert (ROOT / path).is_file()


def test_the_table_of_draws_by_loss_is_correct() -> None:
    """The numbers are mean(w)^2 / mean(w^2) in percent."""
    t = (torch.arange(200_000, dtype=torch.float64) + 0.5) / 200_000
    weightings = [Weighting("none"), Weighting("sigma_sqrt")]
    weightings += [Weighting("logit_normal", logit_std=std) for std in (1.0, 0.5, 0.2)]
    weightings += [Weighting("mode", mode_s_n=width) for width in (0.2, 0.05)]
    weightings += [Weighting("cosmap")]
    weights = [weighting(t, shift_time(t, 3.0)) for weighting in weightings]
    worth = [round(100 * float(weight.mean() ** 2 / weight.square().mean())) for weight in weights]
    table = PAGE.split("| weight | by loss |\n|---|---|\n")[1].split("\n\n")[0]
    assert [int(number) for row in table.splitlines() for number in re.findall(r"\d+", row.split("|")[2])] == worth


@pytest.mark.parametrize("scheme", ["none", "cosmap"])
def test_the_median_sigma_of_the_page_is_correct(scheme: WeightingScheme) -> None:
    weighting = Weighting(scheme)
    sampler = TimeSampler(Density("sigma"), lambda t: weighting(t, shift_time(t, 3.0)), 0.0, 1.0)
    middle = float(shift_time(sampler.draw(torch.tensor([0.5], dtype=torch.float64)), 3.0))
    words = re.sub(r"\s+", " ", PAGE)
    assert f"half of all draws have sigma above {middle:.2f}" in words
