"""The run page, report.html in the run folder: objective, loss, evaluations and previews of a run.

The page is rebuilt from the files of the run folder each time. Plots are embedded; preview images are linked. Sections
without content are omitted.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

from utils.evaluation.result_table import format_difference
from utils.evaluation.results import EVALUATIONS, EvaluationResult, read_evaluations
from utils.files.atomic import write_text
from utils.objective.objective import Objective
from utils.previews.image_files import IMAGE_LIST
from utils.report.html import Rows, header_row, html_of, page, plot_figure, table_of, table_row

if TYPE_CHECKING:
    from matplotlib.figure import Figure

REPORT = "report.html"
# The names used by tracking and by the run folder, which are not imported here; a test compares them.
METRICS, SAMPLES = "metrics.jsonl", "samples"
NUM_POINTS = 161

_CSS = """
.previews { display: grid; gap: 1.5rem; grid-template-columns: repeat(auto-fill, minmax(min(100%, 30rem), 1fr)); }
.pair { display: flex; gap: .3rem; }
.pair a { flex: 1; max-width: 32rem; color: var(--soft); font-size: .85rem; text-decoration: none; }
.pair img { width: 100%; height: auto; display: block; }
"""


def write_report(folder: Path, summary: Rows, objective_rows: Rows, objective: Objective) -> None:
    """Writes the page from the files of the run folder and these rows. Rank 0 only."""
    write_text(folder / REPORT, render(folder, summary, objective_rows, objective))


def render(folder: Path, summary: Rows, objective_rows: Rows, objective: Objective) -> str:
    """The HTML of the page."""
    sections = [
        ("Run", table_of(summary)),
        ("Objective", _objective_section(objective_rows, objective)),
        ("Loss", _loss_section(folder / METRICS)),
        ("Evaluation", _evaluation_section(read_evaluations(folder / EVALUATIONS))),
        ("Previews", _previews_section(folder)),
    ]
    return page(folder.resolve().name, sections, _CSS)


# --- objective ---------------------------------------------------------------------------------------------------------


def _objective_section(rows: Rows, objective: Objective) -> str:
    return f'<div class="side">{table_of(rows)}{_objective_plot(objective)}</div>'


@lru_cache(maxsize=1)  # a run writes its page several times, and its objective does not change
def _objective_plot(objective: Objective) -> str:
    def draw() -> Figure:
        from utils.report import plots

        config = objective.config
        t, density = objective.sampler(config.discrete_flow_shift).density_nodes(NUM_POINTS)
        weight = None if config.weighting_scheme == "none" else objective.weight_at(t, config.discrete_flow_shift)
        title = f"Loss weight: {config.weighting_scheme}"
        return plots.objective_figure(t, density, config.discrete_flow_shift, weight, title)

    return plot_figure("objective", _objective_caption(objective), draw)


def _objective_caption(objective: Objective) -> str:
    """The facts that the plots do not show."""
    config = objective.config
    sentences = []
    if config.weighting_scheme == "none":
        sentences.append("All values of t have equal weight.")
    elif config.weighting_by == "loss":
        sentences.append("The loss is multiplied by the weight at its t.")
    else:
        mean = objective.sampler(config.discrete_flow_shift).mean_weight
        sentences.append(f"The density includes the weight; the loss is multiplied by the mean weight, {mean:.4g}.")
    if config.model_prediction_type == "sigma_scaled":
        sentences.append("The loss is computed on the clean latents, whose error is sigma times that of the velocity.")
    if config.shift_resolution is not None:
        sentences.append(
            f"Shown for {config.shift_resolution}x{config.shift_resolution} pixels; other sizes have other shifts."
        )
    return " ".join(sentences)


# --- loss --------------------------------------------------------------------------------------------------------------


def _read_metrics(path: Path) -> Iterator[dict[str, Any]]:
    """The entries of metrics.jsonl, up to a line that is still being written."""
    if not path.is_file():
        return
    with path.open(encoding="utf-8", errors="replace") as file:
        for line in file:
            try:
                yield json.loads(line)
            except ValueError:
                return


def _loss_section(path: Path) -> str:
    entries = [(entry["step"], entry["loss"], entry["loss_smoothed"]) for entry in _read_metrics(path)]
    if not entries:
        return ""

    def draw() -> Figure:
        from utils.report import plots

        return plots.loss_figure(*zip(*entries, strict=True))

    step, _, smoothed = entries[-1]
    return plot_figure("loss", f"Smoothed loss after step {step}: {smoothed:.5f}.", draw)


# --- evaluation --------------------------------------------------------------------------------------------------------


def _evaluation_section(results: Sequence[EvaluationResult]) -> str:
    """A plot of the evaluations that are comparable with the last one, and the table of the last one."""
    if not results:
        return ""
    last = results[-1]
    comparable = [result for result in results if result.can_be_compared(last.fingerprint, last.weights)]
    plot = _evaluation_plot(comparable) if len(comparable) > 1 else ""
    return f'<div class="side">{plot}<div class="numbers">{_evaluation_table(last)}</div></div>'


def _evaluation_plot(results: Sequence[EvaluationResult]) -> str:
    from utils.report import plots

    losses = [(result.step, result.loss) for result in results]
    changes = [
        plots.Change(result.step, change.mean, change.interval.low, change.interval.high)
        for result in results
        if (change := result.groups[0].to_start) is not None and change.interval is not None
    ]
    best = min(losses, key=lambda entry: entry[1])
    caption = f"Lowest at step {best[0]}: {best[1]:.5f}."
    return plot_figure("evaluation", caption, lambda: plots.evaluation_figure(losses, changes))


def _evaluation_table(result: EvaluationResult) -> str:
    weights = " of the averaged weights" if result.weights == "ema" else ""
    header = ["", "images", "loss"]
    start = result.groups[0].to_start
    if start is not None:
        header.append(f"change since step {start.to_step} (95%)")
    best = result.groups[0].to_best
    if start is not None and best is not None and best.to_step != start.to_step:
        header.append(f"since step {best.to_step}, the best (95%)")
    rows = [
        [
            group.name,
            str(group.num_images),
            f"{group.loss:.5f}",
            format_difference(group.to_start),
            format_difference(group.to_best),
        ][: len(header)]
        for group in result.groups
    ]
    caption = f"<caption>Step {result.step}: loss{weights}</caption>"
    return f"<table>{caption}{header_row(header)}{''.join(map(table_row, rows))}</table>"


# --- previews ----------------------------------------------------------------------------------------------------------


def _read_listings(parent: Path) -> dict[int, list[dict[str, Any]]]:
    """Step -> entries of its prompts.json whose images exist, in order of steps."""
    listings: dict[int, list[dict[str, Any]]] = {}
    for path in sorted(parent.glob(f"step_*/{IMAGE_LIST}")):
        try:
            step, entries = int(path.parent.name.removeprefix("step_")), json.loads(path.read_text(encoding="utf-8"))
            present = [entry for entry in entries if (path.parent / entry["file"]).is_file()]
        except (OSError, ValueError):  # files were deleted by hand
            continue
        if present:
            listings[step] = present
    return dict(sorted(listings.items()))


def _previews_section(folder: Path) -> str:
    """The newest image of each prompt, beside that of step 0 with the same settings."""
    listings = _read_listings(folder / SAMPLES)
    if not listings:
        return ""
    newest = max(listings)
    at_start = listings.get(0, []) if newest > 0 else []
    figures = []
    for entry in listings[newest]:
        first = [(0, earlier) for earlier in at_start if {**earlier, "file": ""} == {**entry, "file": ""}]
        figures.append(_preview([*first[:1], (newest, entry)]))
    return f'<div class="previews">{"".join(figures)}</div>'


def _preview(images: Sequence[tuple[int, dict[str, Any]]]) -> str:
    """The images of one prompt, as (step, entry), the newest last."""
    entry = images[-1][1]
    links = "".join(_image(step, listed) for step, listed in images)
    settings = [
        f"{key.replace('_', ' ')} {value}" for key, value in entry.items() if key not in ("prompt", "file") and value != ""
    ]
    caption = f"{html_of(str(entry['prompt']))}<br>{html_of(', '.join(settings))}"
    return f'<figure><div class="pair">{links}</div><figcaption>{caption}</figcaption></figure>'


def _image(step: int, entry: dict[str, Any]) -> str:
    path = quote(f"{SAMPLES}/step_{step:06d}/{entry['file']}")
    size = "".join(f' {key}="{int(entry[key])}"' for key in ("width", "height") if key in entry)
    return f'<a href="{path}"><img src="{path}" alt="preview at step {step}"{size} loading="lazy">step {step}</a>'
