"""The plots of the run page, the dataset page and docs/objective.md, as SVG. Importing this file imports matplotlib, which
takes a second.

Text stays text, so that files are small and sharp; subplots are stacked vertically, so that they fit a phone.
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
"""The first two are visible on white and on black."""
WIDTH_INCHES = 4.4
MAX_POINTS = 500
"""Points of a curve over steps: about one per pixel."""
MAX_BARS = 60
MAX_LENGTH_RATIO = 4
"""Captions longer than this multiple of the encoder's limit are counted in the last bar, so that the axis stays short."""
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


def new_figure(heights_inches: Sequence[float], background: str = "none") -> tuple[Figure, list[Axes]]:
    """A figure of stacked subplots of these heights, from top to bottom."""
    height = sum(heights_inches) + 0.1
    figure = Figure(figsize=(WIDTH_INCHES, height), layout="constrained", facecolor=background)
    axes = figure.subplots(len(heights_inches), 1, squeeze=False, height_ratios=heights_inches)
    return figure, list(axes[:, 0])


def unit_axis(axes: Axes, label: str) -> None:
    """Formats an axis of t or sigma. Both ends are labelled, because papers disagree about their direction."""
    axes.set(xlim=(0, 1))
    axes.set_xticks([0, 0.25, 0.5, 0.75, 1], ["0\ndata", "0.25", "0.5", "0.75", "1\nnoise"])
    axes.set_xlabel(label, labelpad=-9)


def draw_density(axes: Axes, t: Tensor, density: Tensor, shift: float) -> None:
    """Plots the density of t, given as (N,) nodes and values, and the resulting density of sigma."""
    axes.fill_between(t, density, color=T_COLOR, alpha=0.15, linewidth=0)
    axes.plot(t, density, color=T_COLOR, label="of t")
    over_sigma = density_over_sigma(t, density, shift)
    name = f"of sigma, shift {shift:g}"
    axes.plot(shift_time(t, shift), over_sigma, color=SIGMA_COLOR, linestyle=(0, (5, 1.5)), label=name)
    unit_axis(axes, "t, sigma")
    _show_most(axes, density, over_sigma)
    axes.legend(loc="upper left")


def _show_most(axes: Axes, *curves: Tensor) -> None:
    """Limits the y axis to 98% of each curve's values: a density may be infinite at a point."""
    axes.set_ylim(0, 1.12 * max(float(curve.quantile(0.98)) for curve in curves))


def objective_figure(t: Tensor, density: Tensor, shift: float, weight: Tensor | None, title: str) -> Figure:
    """The density of t and, if given, the loss weight over t with its title; (N,) each."""
    figure, axes = new_figure([2.1] if weight is None else [2.1, 1.7])
    draw_density(axes[0], t, density, shift)
    axes[0].set_title("Density of the trained noise levels")
    if weight is not None:
        axes[1].plot(t, weight, color=INK)
        unit_axis(axes[1], "t")
        axes[1].set_title(title)
        _show_most(axes[1], weight)
    return figure


def loss_figure(steps: Sequence[int], losses: Sequence[float], smoothed: Sequence[float]) -> Figure:
    """The training loss. In long runs each point is the mean of several steps."""
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
    _limit_to_percentiles(axes, means)
    axes.legend(loc="upper right")
    return figure


def _limit_to_percentiles(axes: Axes, values: Sequence[float]) -> None:
    """Limits the y axis to the 1st and 99th percentile, so that one outlier does not flatten the curve."""
    ordered = sorted(values)
    low, high = ordered[len(ordered) // 100], ordered[-1 - len(ordered) // 100]
    margin = 0.05 * (high - low) or 0.05 * abs(high) or 0.05
    axes.set_ylim(low - margin, high + 2 * margin)


class Change(NamedTuple):
    """Mean loss minus that of the first evaluation, with its 95% interval."""

    step: int
    mean: float
    low: float
    high: float


def evaluation_figure(losses: Sequence[tuple[int, float]], changes: Sequence[Change]) -> Figure:
    """Mean loss over steps, as (step, loss), and its change since the first evaluation where there are intervals."""
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
    for subplot in axes:
        subplot.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes[-1].set_xlabel("step")
    return figure


class Bars(NamedTuple):
    """Bars of equal width; the first extends from `start` to `start + width`."""

    start: float
    width: float
    heights: list[int]


def token_bars(histogram: Sequence[tuple[int, int]], max_tokens: int) -> Bars:
    """A histogram of caption lengths, given as (tokens, captions). No bar straddles the encoder's limit."""
    limit = MAX_LENGTH_RATIO * max_tokens
    lengths = [(min(tokens, limit), count) for tokens, count in histogram]
    longest = max(max_tokens, *(tokens for tokens, _ in lengths))
    size = math.ceil(longest / MAX_BARS)
    # Each bar covers `size` lengths; bar 0 ends at max_tokens.
    first, last = (math.ceil((tokens - max_tokens) / size) for tokens in (0, longest))
    heights = [0] * (last + 1 - first)
    for tokens, count in lengths:
        heights[math.ceil((tokens - max_tokens) / size) - first] += count
    return Bars(max_tokens + (first - 1) * size + 0.5, size, heights)


def token_figure(histogram: Sequence[tuple[int, int]], max_tokens: int) -> Figure:
    """Caption lengths with a line at the encoder's limit; (tokens, captions), in any order."""
    bars = token_bars(histogram, max_tokens)
    figure, (axes,) = new_figure([2.1])
    lefts = [bars.start + index * bars.width for index in range(len(bars.heights))]
    colors = [T_COLOR if left < max_tokens else SIGMA_COLOR for left in lefts]
    axes.bar(lefts, bars.heights, width=bars.width, align="edge", color=colors)
    axes.axvline(max_tokens + 0.5, color=INK, linewidth=1.2, linestyle=(0, (4, 2)))
    axes.set_xlim(max(0, bars.start), max(lefts[-1] + bars.width, 1.02 * max_tokens))
    is_over = any(tokens > MAX_LENGTH_RATIO * max_tokens for tokens, _ in histogram)
    last_bar = f"; the last bar counts all above {lefts[-1] - 0.5:,.0f}" if is_over else ""
    _count_axis(axes, f"Captions by number of tokens; at most {max_tokens} are used", f"tokens{last_bar}")
    return figure


def exposure_figure(exposure: Sequence[tuple[float, int]]) -> Figure:
    """How often images are used per epoch, given as (uses, images); one bar per value if there are few."""
    figure, (axes,) = new_figure([1.9])
    if len(exposure) <= MAX_NAMED_BARS:
        names = [f"{round(uses, 2):g}" for uses, _ in exposure]
        bars = axes.bar(range(len(names)), [count for _, count in exposure], width=0.7, color=T_COLOR)
        axes.bar_label(bars, fmt="{:,.0f}")
        axes.margins(y=0.18)
        axes.set_xticks(range(len(names)), names)
        axes.set_xlim(-0.7, len(names) - 0.3)
    else:
        uses, counts = zip(*exposure, strict=True)
        axes.hist(uses, bins=MAX_BARS, weights=counts, color=T_COLOR)
    _count_axis(axes, "Images by uses per epoch", "uses per epoch")
    return figure


def _count_axis(axes: Axes, title: str, label: str) -> None:
    """Formats a y axis of counts: integers with thousands separators."""
    axes.set(title=title, xlabel=label)
    axes.grid(False, axis="x")
    axes.set_axisbelow(True)
    axes.yaxis.set_major_locator(MaxNLocator(nbins=5, integer=True))
    axes.yaxis.set_major_formatter("{x:,.0f}")


def as_svg(name: str, draw: Callable[[], Figure]) -> str:
    """The figure as an <svg> element; the same figure always gives the same text.

    `name` makes its element identifiers unique, so that a page can hold several figures.
    """
    with matplotlib.rc_context({**_STYLE, "svg.hashsalt": name}):
        buffer = io.StringIO()
        draw().savefig(buffer, format="svg", metadata=dict.fromkeys(["Date", "Creator", "Format", "Type"]))
    text = buffer.getvalue()
    text = text[text.index("<svg") :].rstrip()
    # A hundredth of a point is below any screen's resolution, and equal on every machine.
    text = re.sub(r"\d+\.\d{3,}", lambda number: f"{float(number[0]):.2f}", text)
    referred = set(re.findall(r"#(\w+)", text))
    return re.sub(r' id="([^"]*)"', lambda found: found[0] if found[1] in referred else "", text)
