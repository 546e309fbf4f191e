"""The run's report: report.html in the run folder, one page that needs no network, no script and no other program.

Plots stand in the page itself; preview pictures are linked where they lie beside it. The page is made anew from the run
folder's files each time. What there is nothing of is left out, heading and all.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

from utils.atomic import write_text
from utils.evaluation.comparison import EvaluationResult, read_evaluations, told
from utils.objective import Objective

if TYPE_CHECKING:
    from matplotlib.figure import Figure

REPORT = "report.html"
# As log.py, evaluate.py and sampling.py name them; those import DeepSpeed. A test compares.
METRICS, EVALUATIONS, SAMPLES, LISTING = "metrics.jsonl", "evaluations.jsonl", "samples", "prompts.json"
NUM_POINTS = 161
Rows = Sequence[tuple[str, str]]

_CSS = """
:root { color-scheme: light dark; --ink: #222; --soft: #667; --line: #ccd; --paper: #fff; }
@media (prefers-color-scheme: dark) { :root { --ink: #ddd; --soft: #99a; --line: #445; --paper: #16181c; } }
body { margin: 0; background: var(--paper); color: var(--ink); font: 15px/1.45 system-ui, sans-serif; }
main { max-width: 70rem; margin: 0 auto; padding: 1rem; }
h1 { font-size: 1.4rem; margin: 0 0 1rem; overflow-wrap: anywhere; }
h2 { font-size: 1.1rem; margin: 2rem 0 .5rem; }
table { border-collapse: collapse; }
th, td { text-align: left; vertical-align: top; padding: .2rem .9rem .2rem 0; border-bottom: 1px solid var(--line); }
th { font-weight: 600; white-space: nowrap; }
caption { text-align: left; padding-bottom: .3rem; }
.rows td { overflow-wrap: anywhere; }
.numbers { overflow-x: auto; }
.numbers td { font-variant-numeric: tabular-nums; white-space: nowrap; }
.side { display: flex; flex-wrap: wrap; gap: 1rem 2.5rem; align-items: flex-start; }
figure { margin: 0; }
figcaption { color: var(--soft); font-size: .9rem; max-width: 40rem; overflow-wrap: anywhere; }
svg { max-width: 100%; height: auto; color: var(--ink); display: block; }
.previews { display: grid; gap: 1.5rem; grid-template-columns: repeat(auto-fill, minmax(min(100%, 30rem), 1fr)); }
.pair { display: flex; gap: .3rem; }
.pair a { flex: 1; max-width: 32rem; color: var(--soft); font-size: .85rem; text-decoration: none; }
.pair img { width: 100%; height: auto; display: block; }
"""


def write_report(folder: Path, summary: Rows, objective_rows: Rows, objective: Objective) -> None:
    """Write the page anew from the run folder's files and these rows. Rank 0 only."""
    write_text(folder / REPORT, render(folder, summary, objective_rows, objective))


def render(folder: Path, summary: Rows, objective_rows: Rows, objective: Objective) -> str:
    """The page."""
    sections = [
        ("Run", _table_of(summary)),
        ("Objective", _objective_section(objective_rows, objective)),
        ("Loss", _loss_section(folder / METRICS)),
        ("Evaluation", _evaluation_section(read_evaluations(folder / EVALUATIONS))),
        ("Previews", _previews_section(folder)),
    ]
    body = "".join(f"<section><h2>{name}</h2>{content}</section>\n" for name, content in sections if content)
    title = escape(folder.resolve().name)
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{title}</title><style>{_CSS}</style></head>\n<body><main><h1>{title}</h1>\n{body}</main></body></html>\n"
    )


def _table_of(rows: Rows) -> str:
    if not rows:
        return ""
    return '<table class="rows">' + "".join(_row([name, text]) for name, text in rows) + "</table>"


def _row(cells: Sequence[str]) -> str:
    """A row of a table, its first cell the name of the others."""
    return f"<tr><th>{escape(cells[0])}</th>" + "".join(f"<td>{escape(cell)}</td>" for cell in cells[1:]) + "</tr>"


def _plot(name: str, caption: str, draw: Callable[[], Figure]) -> str:
    from utils import plots  # here: matplotlib takes a second to import

    # The colour of the page's own letters, so that a dark page has light ones.
    svg = plots.as_svg(name, draw).replace(plots.INK, "currentColor")
    below = f"<figcaption>{escape(caption)}</figcaption>" if caption else ""
    named = svg.replace("<svg ", f'<svg role="img" aria-label="{escape(name)}" ', 1)
    return f"<figure>{named}{below}</figure>"


# --- objective ---------------------------------------------------------------------------------------------------------


def _objective_section(rows: Rows, objective: Objective) -> str:
    def draw() -> Figure:
        from utils import plots

        config = objective.config
        t, density = objective.sampler(config.discrete_flow_shift).density_nodes(NUM_POINTS)
        weight = None if config.weighting_scheme == "none" else objective.weight_at(t, config.discrete_flow_shift)
        title = f"How much it counts: weight {config.weighting_scheme}"
        return plots.objective_figure(t, density, config.discrete_flow_shift, weight, title)

    plot = _plot("objective", _objective_caption(objective), draw)
    return f'<div class="side">{_table_of(rows)}{plot}</div>'


def _objective_caption(objective: Objective) -> str:
    """What the plots do not say."""
    config = objective.config
    sentences = []
    if config.weighting_scheme == "none":
        sentences.append("Every time that is drawn counts alike.")
    elif config.weighting_by == "loss":
        sentences.append("The loss is multiplied by the weight at its t.")
    else:
        mean = objective.sampler(config.discrete_flow_shift).mean_weight
        sentences.append(f"The weight is in the density already; the loss is multiplied by the weight's mean, {mean:.4g}.")
    if config.model_prediction_type == "sigma_scaled":
        sentences.append("Errors are those of the clean latents: sigma times those of the velocity.")
    if config.shift_resolution is not None:
        sentences.append(f"At {config.shift_resolution}x{config.shift_resolution}; other sizes have another shift.")
    return " ".join(sentences)


# --- loss --------------------------------------------------------------------------------------------------------------


def _read_metrics(path: Path) -> Iterator[dict[str, Any]]:
    """Lines of metrics.jsonl, up to one that is being written."""
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
        from utils import plots

        return plots.loss_figure(*zip(*entries, strict=True))

    step, _, smoothed = entries[-1]
    return _plot("loss", f"After step {step}: {smoothed:.5f}, smoothed.", draw)


# --- evaluation --------------------------------------------------------------------------------------------------------


def _evaluation_section(results: Sequence[EvaluationResult]) -> str:
    """The course of those that can be compared with the last, and the last one's table."""
    if not results:
        return ""
    last = results[-1]
    comparable = [result for result in results if result.can_be_compared(last.panel, last.weights)]
    plot = _evaluation_plot(comparable) if len(comparable) > 1 else ""
    return f'<div class="side">{plot}<div class="numbers">{_evaluation_table(last)}</div></div>'


def _evaluation_plot(results: Sequence[EvaluationResult]) -> str:
    from utils import plots

    losses = [(result.step, result.loss) for result in results]
    changes = [
        plots.Change(result.step, change.mean, change.interval.low, change.interval.high)
        for result in results
        if (change := result.groups[0].to_start) is not None and change.interval is not None
    ]
    best = min(losses, key=lambda entry: entry[1])
    caption = f"Lowest at step {best[0]}: {best[1]:.5f}."
    return _plot("evaluation", caption, lambda: plots.evaluation_figure(losses, changes))


def _evaluation_table(result: EvaluationResult) -> str:
    weights = " of the averaged weights" if result.weights == "ema" else ""
    header = ["", "pictures", "loss"]
    start = result.groups[0].to_start
    if start is not None:
        header.append(f"change since step {start.to_step} (95%)")
    best = result.groups[0].to_best
    if start is not None and best is not None and best.to_step != start.to_step:
        header.append(f"since step {best.to_step}, the best (95%)")
    rows = [
        [group.name, str(group.num_pictures), f"{group.loss:.5f}", told(group.to_start), told(group.to_best)][: len(header)]
        for group in result.groups
    ]
    head = "".join(f"<th>{escape(cell)}</th>" for cell in header)
    caption = f"<caption>Step {result.step}: loss{weights}</caption>"
    return f"<table>{caption}<tr>{head}</tr>{''.join(map(_row, rows))}</table>"


# --- previews ----------------------------------------------------------------------------------------------------------


def _read_listings(parent: Path) -> dict[int, list[dict[str, Any]]]:
    """Step -> entries of its prompts.json, of the pictures that are there, in order of steps."""
    listings: dict[int, list[dict[str, Any]]] = {}
    for path in sorted(parent.glob(f"step_*/{LISTING}")):
        try:
            step, entries = int(path.parent.name.removeprefix("step_")), json.loads(path.read_text(encoding="utf-8"))
            there = [entry for entry in entries if (path.parent / entry["file"]).is_file()]
        except (OSError, ValueError):  # someone has tidied up
            continue
        if there:
            listings[step] = there
    return dict(sorted(listings.items()))


def _previews_section(folder: Path) -> str:
    """Each prompt's newest picture, beside that of step 0 with the same settings."""
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


def _preview(pictures: Sequence[tuple[int, dict[str, Any]]]) -> str:
    """One prompt: (step, entry) of each picture, the newest last."""
    entry = pictures[-1][1]
    links = "".join(_picture(step, shown) for step, shown in pictures)
    settings = [
        f"{key.replace('_', ' ')} {value}" for key, value in entry.items() if key not in ("prompt", "file") and value != ""
    ]
    caption = f"{escape(str(entry['prompt']))}<br>{escape(', '.join(settings))}"
    return f'<figure><div class="pair">{links}</div><figcaption>{caption}</figcaption></figure>'


def _picture(step: int, entry: dict[str, Any]) -> str:
    path = quote(f"{SAMPLES}/step_{step:06d}/{entry['file']}")
    size = "".join(f' {key}="{int(entry[key])}"' for key in ("width", "height") if key in entry)
    return f'<a href="{path}"><img src="{path}" alt="preview at step {step}"{size} loading="lazy">step {step}</a>'
