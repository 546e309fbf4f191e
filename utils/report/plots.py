"""Plots as SVG, of the reports on a run and on a dataset and of docs/objective.md. Importing this file imports matplotlib,
which takes a second.

Letters stay letters, so that files are small and sharp on a phone; panels stand one above the other for the same reason.
"""

from __future__ import annotations

import io
import math
import re
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from torch import Tensor

from utils.objective.rectified_flow import shift_time
from utils.objective.timestep_sampling import density_over_sigma

T_COLOR, SIGMA_COLOR, INK = "#2f6fbd", "#cc5a14", "#222222"
"""The first two are seen on white and on black."""
WIDTH_INCHES = 4.4
MAX_POINTS = 500
"""Of a curve over steps: about one for each pixel."""
MAX_BARS = 60
MAX_TIMES_LONGER = 4
"""Captions that are longer than this times what is read are drawn as if they were not: one of them flattens no others."""
MAX_NAMED_BARS = 10
_STYLE: Any = {
    "svg.fonttype": "none",
    "path.simplify": False,
    "font.sans-serif": ["DejaVu Sans", "Verdana", "Arial", "sans-serif"],
    "font.size": 9.5,
    "axes.titlesize": 9.5,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.facecolor": "none",
    "axes.grid": True,
    "grid.color": "#888888",
    "grid.alpha": 0.3,
    "grid.linewidth": 0.6,
    "lines.linewidth": 1.8,
    "legend.frameon": False,
    "legend.fontsize": 9,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": INK,
    "xtick.color": INK,
    "ytick.color": INK,
}


def new_figure(panel_inches: Sequence[float], background: str = "none") -> tuple[Figure, list[Axes]]:
    """Panels of these heights, the first above the others."""
    height = sum(panel_inches) + 0.1
    figure = Figure(figsize=(WIDTH_INCHES, height), layout="constrained", facecolor=background)
    axes = figure.subplots(len(panel_inches), 1, squeeze=False, height_ratios=panel_inches)
    return figure, list(axes[:, 0])


def unit_axis(axes: Axes, label: str) -> None:
    """t or sigma. Which end is which is said in words, because the literature is of two minds about it."""
    axes.set(xlim=(0, 1))
    axes.set_xticks([0, 0.25, 0.5, 0.75, 1], ["0\ndata", "0.25", "0.5", "0.75", "1\nnoise"])
    axes.set_xlabel(label, labelpad=-9)


def draw_density(axes: Axes, t: Tensor, density: Tensor, shift: float) -> None:
    """The density of t, (N,) twice, and the one of sigma that follows."""
    axes.fill_between(t, density, color=T_COLOR, alpha=0.15, linewidth=0)
    axes.plot(t, density, color=T_COLOR, label="of t")
    over_sigma = density_over_sigma(t, density, shift)
    name = f"of sigma, shift {shift:g}"
    axes.plot(shift_time(t, shift), over_sigma, color=SIGMA_COLOR, linestyle=(0, (5, 1.5)), label=name)
    unit_axis(axes, "t, sigma")
    _show_most(axes, density, over_sigma)
    axes.legend(loc="upper left")


def _show_most(axes: Axes, *curves: Tensor) -> None:
    """From 0 to above nearly all of each curve: it may be infinite at a point."""
    axes.set_ylim(0, 1.12 * max(float(curve.quantile(0.98)) for curve in curves))


def objective_figure(t: Tensor, density: Tensor, shift: float, weight: Tensor | None, title: str) -> Figure:
    """The density of the times that are drawn and, if given, the weight at each of them under its title; (N,) each."""
    figure, axes = new_figure([2.1] if weight is None else [2.1, 1.7])
    draw_density(axes[0], t, density, shift)
    axes[0].set_title("How often a noise level is drawn: density")
    if weight is not None:
        axes[1].plot(t, weight, color=INK)
        unit_axis(axes[1], "t")
        axes[1].set_title(title)
        _show_most(axes[1], weight)
    return figure


def loss_figure(steps: Sequence[int], losses: Sequence[float], smoothed: Sequence[float]) -> Figure:
    """The training loss. Long runs are thinned: each point is then the mean of some steps."""
    figure, (axes,) = new_figure([2.4])
    size = -(-len(steps) // MAX_POINTS)
    starts = range(0, len(steps), size)
    ends = [min(start + size, len(steps)) - 1 for start in starts]
    means = [sum(losses[start : end + 1]) / (end + 1 - start) for start, end in zip(starts, ends, strict=True)]
    at = [steps[end] for end in ends]
    marker = "o" if len(at) == 1 else ""
    name = "each step" if size == 1 else f"mean of {size} steps"
    axes.plot(at, means, marker=marker, color=T_COLOR, alpha=0.4, linewidth=1, label=name)
    axes.plot(at, [smoothed[end] for end in ends], marker=marker, color=T_COLOR, label="smoothed")
    axes.set_xlabel("step")
    axes.set_title("Training loss")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    _leave_out_peaks(axes, means)
    axes.legend(loc="upper right")
    return figure


def _leave_out_peaks(axes: Axes, values: Sequence[float]) -> None:
    """An axis for nearly all values: one step gone wrong does not flatten the rest."""
    ordered = sorted(values)
    low, high = ordered[len(ordered) // 100], ordered[-1 - len(ordered) // 100]
    margin = 0.05 * (high - low) or 0.05 * abs(high) or 0.05
    axes.set_ylim(low - margin, high + 2 * margin)


class Change(NamedTuple):
    """Mean loss less that at the first evaluation, with its 95% interval."""

    step: int
    mean: float
    low: float
    high: float


def evaluation_figure(losses: Sequence[tuple[int, float]], changes: Sequence[Change]) -> Figure:
    """Mean loss over steps, (step, loss) each, and below it what has changed since the first, where that can be told."""
    figure, axes = new_figure([1.9, 1.9] if changes else [1.9])
    axes[0].plot(*zip(*losses, strict=True), "o-", color=T_COLOR, markersize=3.5)
    axes[0].set_title("Loss on held-out images")
    if changes:
        steps, means, low, high = (list(column) for column in zip(*changes, strict=True))
        axes[1].axhline(0, color=INK, linewidth=0.8)
        axes[1].vlines(steps, low, high, color=SIGMA_COLOR, linewidth=1.4)
        axes[1].plot(steps, means, "o-", color=SIGMA_COLOR, markersize=3.5)
        axes[1].set_title(f"Change since step {losses[0][0]}, with its 95% interval")
        axes[1].set_xlim(axes[0].get_xlim())
    for panel in axes:
        panel.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes[-1].set_xlabel("step")
    return figure


class Bars(NamedTuple):
    """A histogram's bars, all of one width, the first from `start` to `start + width`."""

    start: float
    width: float
    heights: list[int]


def token_bars(histogram: Sequence[tuple[int, int]], max_tokens: int) -> Bars:
    """Captions by their number of tokens, (tokens, captions) each. Bars end, never straddle, where reading ends."""
    limit = MAX_TIMES_LONGER * max_tokens
    lengths = [(min(tokens, limit), count) for tokens, count in histogram]
    longest = max(max_tokens, *(tokens for tokens, _ in lengths))
    size = math.ceil(longest / MAX_BARS)
    # A bar is of `size` lengths; the last of them in bar 0 is max_tokens.
    first, last = (math.ceil((tokens - max_tokens) / size) for tokens in (0, longest))
    heights = [0] * (last + 1 - first)
    for tokens, count in lengths:
        heights[math.ceil((tokens - max_tokens) / size) - first] += count
    return Bars(max_tokens + (first - 1) * size + 0.5, size, heights)


def token_figure(histogram: Sequence[tuple[int, int]], max_tokens: int) -> Figure:
    """How long captions are, with a line where the encoder stops reading; (tokens, captions) each, in any order."""
    bars = token_bars(histogram, max_tokens)
    figure, (axes,) = new_figure([2.1])
    lefts = [bars.start + index * bars.width for index in range(len(bars.heights))]
    colors = [T_COLOR if left < max_tokens else SIGMA_COLOR for left in lefts]
    axes.bar(lefts, bars.heights, width=bars.width, align="edge", color=colors)
    axes.axvline(max_tokens + 0.5, color=INK, linewidth=1.2, linestyle=(0, (4, 2)))
    axes.set_xlim(max(0, bars.start), max(lefts[-1] + bars.width, 1.02 * max_tokens))
    is_over = any(tokens > MAX_TIMES_LONGER * max_tokens for tokens, _ in histogram)
    last_bar = f"; the last bar has all longer than {lefts[-1] - 0.5:,.0f}" if is_over else ""
    _count_axis(axes, f"Captions by their number of tokens; {max_tokens} are read", f"tokens{last_bar}")
    return figure


def exposure_figure(exposure: Sequence[tuple[float, int]]) -> Figure:
    """How often images are shown in an epoch, (showings, images) each: a bar for each number if they are few."""
    figure, (axes,) = new_figure([1.9])
    if len(exposure) <= MAX_NAMED_BARS:
        names = [f"{round(showings, 2):g}" for showings, _ in exposure]
        bars = axes.bar(range(len(names)), [count for _, count in exposure], width=0.7, color=T_COLOR)
        axes.bar_label(bars, fmt="{:,.0f}")
        axes.margins(y=0.18)
        axes.set_xticks(range(len(names)), names)
        axes.set_xlim(-0.7, len(names) - 0.3)
    else:
        showings, counts = zip(*exposure, strict=True)
        axes.hist(showings, bins=MAX_BARS, weights=counts, color=T_COLOR)
    _count_axis(axes, "Images by their showings in an epoch", "showings")
    return figure


def _count_axis(axes: Axes, title: str, label: str) -> None:
    """Whole numbers upwards, with thousands apart."""
    axes.set(title=title, xlabel=label)
    axes.grid(False, axis="x")
    axes.set_axisbelow(True)
    axes.yaxis.set_major_locator(MaxNLocator(nbins=5, integer=True))
    axes.yaxis.set_major_formatter("{x:,.0f}")


def as_svg(name: str, draw: Callable[[], Figure]) -> str:
    """The figure as an <svg> element. It holds no date and no chance: the same figure gives the same text.

    `name` makes identifiers its own, so that several can stand in one page.
    """
    with matplotlib.rc_context({**_STYLE, "svg.hashsalt": name}):
        buffer = io.StringIO()
        draw().savefig(buffer, format="svg", metadata=dict.fromkeys(["Date", "Creator", "Format", "Type"]))
    text = buffer.getvalue()
    text = text[text.index("<svg") :].rstrip()
    # A hundredth of a point is finer than any screen, and the same on every machine.
    text = re.sub(r"\d+\.\d{3,}", lambda number: f"{float(number[0]):.2f}", text)
    referred = set(re.findall(r"#(\w+)", text))
    return re.sub(r' id="([^"]*)"', lambda found: found[0] if found[1] in referred else "", text)
