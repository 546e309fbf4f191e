"""The run page: its sections from the files of a run folder, complete and incomplete ones."""

from __future__ import annotations

import re
from pathlib import Path
from urllib.parse import unquote

import pytest
import torch
from PIL import Image

from tests.utils.objective.sd3_objective import sd3_objective
from tests.utils.report.html_elements import Page
from utils.config.schema.objective_choices import MAX_MODE_SCALE, MIN_MODE_SCALE
from utils.evaluation.comparison import Group, Measurement, compare
from utils.evaluation.results import EVALUATIONS, to_line
from utils.objective.objective import Objective
from utils.previews.image_files import write_images
from utils.report import run_page as report
from utils.report.plots import MAX_POINTS
from utils.report.run_page import render, write_report
from utils.tracking.metrics import RunLog, StepMetrics

NASTY = """<script>alert("1")</script> & 'quoted' """
SUMMARY = [("model", "a tiny one"), ("cache", "/a/b")]
OBJECTIVE_ROWS = [("shift", "3")]
DEFAULT = sd3_objective()


class ReportPage(Page):
    """The run page as elements and text."""

    void = Page.void | {"br"}

    @property
    def headings(self) -> list[str]:
        return re.findall(r"^(?:Run|Objective|Loss|Evaluation|Previews)$", self.text, flags=re.MULTILINE)


def page_of(folder: Path, objective: Objective = DEFAULT) -> ReportPage:
    return ReportPage(render(folder, SUMMARY, OBJECTIVE_ROWS, objective))


def add_losses(folder: Path, losses: list[float]) -> None:
    with RunLog(folder, start_step=0, num_steps=len(losses), global_batch=4, tensorboard=False, is_main=True) as log:
        for index, loss in enumerate(losses):
            log.write(StepMetrics(step=index + 1, epoch=0, loss=loss, learning_rate=1e-4, grad_norm=0.5), 0.5)


def add_evaluations(folder: Path, steps: list[int], num_images: int = 8, fingerprint: str = "one") -> None:
    groups = [Group("all", tuple(range(num_images)), tuple(range(num_images)), True), Group("set <x>", (0,), (0,), True)]
    earlier: list[Measurement] = []
    generator = torch.Generator().manual_seed(0)
    with (folder / EVALUATIONS).open("a") as file:
        for step in steps:
            noise = 0.01 * torch.rand(num_images, dtype=torch.float64, generator=generator)
            now = Measurement(step, 0.5 - step / 1e4 + noise)
            file.write(
                to_line(compare(now, earlier, groups, weights="ema" if step else "last", fingerprint=fingerprint, seed=0))
            )
            earlier.append(now)


def add_previews(folder: Path, step: int, prompts: list[str], **changes: object) -> None:
    images = [Image.new("RGB", (32, 16), (index, step % 256, 0)) for index in range(len(prompts))]
    entries = [
        {"prompt": prompt, "negative_prompt": "", "width": 32, "height": 16, "seed": 7, "steps": 4, "cfg": 4.5, **changes}
        for prompt in prompts
    ]
    write_images(folder / report.SAMPLES, step, images, entries)


def fill(folder: Path) -> None:
    add_losses(folder, [1 / step for step in range(1, 31)])
    add_evaluations(folder, [0, 10, 20, 30])
    for step in (0, 20, 30):
        add_previews(folder, step, ["a fox", NASTY])


def test_full_run_has_every_section(tmp_path: Path) -> None:
    fill(tmp_path)
    page = page_of(tmp_path)
    assert page.headings == ["Run", "Objective", "Loss", "Evaluation", "Previews"]
    assert [svg["aria-label"] for svg in page.all("svg")] == ["objective", "loss", "evaluation"]
    assert "a tiny one" in page.text


def test_sections_without_content_are_omitted(tmp_path: Path) -> None:
    assert page_of(tmp_path).headings == ["Run", "Objective"]
    add_losses(tmp_path, [0.5])
    assert page_of(tmp_path).headings == ["Run", "Objective", "Loss"]
    add_previews(tmp_path, 0, ["a fox"])
    assert page_of(tmp_path).headings == ["Run", "Objective", "Loss", "Previews"]
    assert "Run" not in ReportPage(render(tmp_path, [], OBJECTIVE_ROWS, DEFAULT)).headings


def test_page_loads_nothing_from_elsewhere(tmp_path: Path) -> None:
    fill(tmp_path)
    page, text = page_of(tmp_path), render(tmp_path, SUMMARY, OBJECTIVE_ROWS, DEFAULT)
    assert not {"script", "link", "iframe", "object", "base"} & {tag for tag, _ in page.elements}
    addresses = [
        value
        for _, attributes in page.elements
        for name, value in attributes.items()
        if name in ("src", "href", "xlink:href")
    ]
    assert len(addresses) > 10
    for address in addresses:
        assert address.startswith("#") or (tmp_path / unquote(address)).is_file()
    assert set(re.findall(r"url\(\s*['\"]?(.)", text)) <= {"#"}
    assert "@import" not in text


def test_every_reference_has_exactly_one_target(tmp_path: Path) -> None:
    fill(tmp_path)
    ids = [attributes["id"] for _, attributes in page_of(tmp_path).elements if "id" in attributes]
    assert len(ids) == len(set(ids))
    referred = set(re.findall(r"(?:url\(|href=\")#(\w+)", render(tmp_path, SUMMARY, OBJECTIVE_ROWS, DEFAULT)))
    assert referred == set(ids)


def test_every_text_is_escaped(tmp_path: Path) -> None:
    folder = tmp_path / "<i>run"
    folder.mkdir()
    add_previews(folder, 0, [NASTY], negative_prompt=NASTY)
    add_evaluations(folder, [0])
    page = ReportPage(render(folder, [(NASTY, NASTY)], [(NASTY, NASTY)], DEFAULT))
    assert not page.all("script") and not page.all("i")
    assert page.text.count(NASTY.strip()) == 6
    assert "set <x>" in page.text


def test_plots_use_the_text_colour_of_the_page(tmp_path: Path) -> None:
    fill(tmp_path)
    text = render(tmp_path, SUMMARY, OBJECTIVE_ROWS, DEFAULT)
    body = text[text.index("<body>") :]
    assert "#222222" not in body and "#000000" not in body
    assert "currentColor" in body


def test_the_same_files_give_the_same_page(tmp_path: Path) -> None:
    fill(tmp_path)
    write_report(tmp_path, SUMMARY, OBJECTIVE_ROWS, DEFAULT)
    first = (tmp_path / "report.html").read_bytes()
    write_report(tmp_path, SUMMARY, OBJECTIVE_ROWS, DEFAULT)
    assert (tmp_path / "report.html").read_bytes() == first
    assert first.startswith(b"<!doctype html>")


def test_file_names_are_those_of_the_writers(tmp_path: Path) -> None:
    add_losses(tmp_path, [1.0])
    assert (tmp_path / report.METRICS).is_file()


# --- objective ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({}, "the loss is multiplied by the mean weight, 1."),
        ({"weighting_scheme": "mode"}, "the loss is multiplied by the mean weight, 0.4479."),
        ({"weighting_by": "loss"}, "The loss is multiplied by the weight at its t."),
        ({"weighting_scheme": "none"}, "All values of t have equal weight."),
        ({"model_prediction_type": "sigma_scaled"}, "The loss is computed on the clean latents"),
        ({"shift_resolution": 512}, "Shown for 512x512 pixels; other sizes have other shifts."),
    ],
)
def test_caption_describes_the_objective(tmp_path: Path, settings: dict[str, object], sentence: str) -> None:
    assert sentence in page_of(tmp_path, sd3_objective(**settings)).text


@pytest.mark.parametrize(
    "settings",
    [
        {"timestep_sampling": "mode", "mode_scale": MIN_MODE_SCALE},
        {"timestep_sampling": "mode", "mode_scale": MAX_MODE_SCALE},
        {"timestep_sampling": "mode", "mode_scale": MIN_MODE_SCALE, "weighting_scheme": "logit_normal"},
        {"timestep_sampling": "cosmap", "min_t": 0.2, "max_t": 0.3},
        {"logit_std": 0.01},
        {"logit_std": 10.0, "weighting_by": "loss"},
    ],
)
def test_plots_of_extreme_objectives_are_finite(tmp_path: Path, settings: dict[str, object]) -> None:
    text = render(tmp_path, SUMMARY, OBJECTIVE_ROWS, sd3_objective(**settings))
    ReportPage(text)
    paths = re.findall(r'<path d="([^"]*)"', text)
    assert len(paths) > 5
    assert not re.search("nan|inf", " ".join(paths), flags=re.IGNORECASE)


# --- loss --------------------------------------------------------------------------------------------------------------


def test_partial_last_line_is_ignored(tmp_path: Path) -> None:
    add_losses(tmp_path, [3.0, 1.0])
    with (tmp_path / report.METRICS).open("a") as file:
        file.write('{"step": 3, "lo')
    assert "Smoothed loss after step 2: 1.98990." in page_of(tmp_path).text


def test_long_run_has_no_larger_page(tmp_path: Path) -> None:
    add_losses(tmp_path, [1.0 + step % 7 for step in range(MAX_POINTS)])
    short = len(render(tmp_path, SUMMARY, OBJECTIVE_ROWS, DEFAULT))
    add_losses(tmp_path, [1.0 + step % 7 for step in range(20 * MAX_POINTS)])
    text = render(tmp_path, SUMMARY, OBJECTIVE_ROWS, DEFAULT)
    assert len(text) < 1.1 * short
    assert "mean of 20 steps" in text and f"after step {20 * MAX_POINTS}" in text


# --- evaluation --------------------------------------------------------------------------------------------------------


def test_single_evaluation_has_a_table_and_no_plot(tmp_path: Path) -> None:
    add_evaluations(tmp_path, [0])
    page = page_of(tmp_path)
    assert [svg["aria-label"] for svg in page.all("svg")] == ["objective"]
    assert "Step 0: loss" in page.text and "change since" not in page.text


def test_last_evaluation_is_shown_with_its_change(tmp_path: Path) -> None:
    add_evaluations(tmp_path, [0, 1000])
    text = page_of(tmp_path).text
    assert "Step 1000: loss of the averaged weights" in text
    assert "change since step 0 (95%)" in text
    assert re.search(r"-0\.1\d+ \(-0\.\d+ to -0\.\d+\)", text)


def test_few_images_have_a_change_without_interval(tmp_path: Path) -> None:
    add_evaluations(tmp_path, [0, 1000], num_images=3)
    page = page_of(tmp_path)
    assert "Change since step 0" not in page.text
    assert re.search(r"^-0\.\d+$", page.text, flags=re.MULTILINE)


def test_evaluations_of_other_images_are_not_in_the_plot(tmp_path: Path) -> None:
    add_evaluations(tmp_path, [0, 100], fingerprint="one")
    add_evaluations(tmp_path, [200], fingerprint="another")
    assert "Lowest at" not in page_of(tmp_path).text
    add_evaluations(tmp_path, [300, 400], fingerprint="another")
    assert "Lowest at step 400" in page_of(tmp_path).text


# --- previews ----------------------------------------------------------------------------------------------------------


def test_newest_image_is_beside_that_of_step_0(tmp_path: Path) -> None:
    for step in (0, 500, 1500):
        add_previews(tmp_path, step, ["a fox", "a hen"])
    images = [image["src"] for image in page_of(tmp_path).all("img")]
    assert images == [
        "samples/step_000000/000.png",
        "samples/step_001500/000.png",
        "samples/step_000000/001.png",
        "samples/step_001500/001.png",
    ]


def test_prompt_added_later_is_shown_alone(tmp_path: Path) -> None:
    add_previews(tmp_path, 0, ["a hen", "a fox"])
    add_previews(tmp_path, 500, ["a fox", "a cat"])
    images = [image["src"] for image in page_of(tmp_path).all("img")]
    assert images == ["samples/step_000000/001.png", "samples/step_000500/000.png", "samples/step_000500/001.png"]


def test_prompt_with_other_settings_is_not_compared(tmp_path: Path) -> None:
    add_previews(tmp_path, 0, ["a fox"])
    add_previews(tmp_path, 500, ["a fox"], seed=8)
    assert [image["src"] for image in page_of(tmp_path).all("img")] == ["samples/step_000500/000.png"]


def test_deleted_images_are_omitted(tmp_path: Path) -> None:
    add_previews(tmp_path, 0, ["a fox"])
    add_previews(tmp_path, 500, ["a fox", "a hen"])
    add_previews(tmp_path, 600, ["a fox"])
    (tmp_path / "samples/step_000000/000.png").unlink()
    (tmp_path / "samples/step_000500/001.png").unlink()
    (tmp_path / "samples/step_000600/prompts.json").write_text("{")
    assert [image["src"] for image in page_of(tmp_path).all("img")] == ["samples/step_000500/000.png"]


def test_images_have_their_size_so_that_the_layout_is_stable(tmp_path: Path) -> None:
    add_previews(tmp_path, 0, ["a fox"])
    (image,) = page_of(tmp_path).all("img")
    assert (image["width"], image["height"], image["loading"]) == ("32", "16", "lazy")
