"""Plots as SVG, of a run's report and of docs/objective.md. Importing this file imports matplotlib, which takes a second.

Letters stay letters, so that files are small and sharp on a phone; panels stand one above the other for the same reason.
"""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Sequence

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from utils.rectified_flow import shift_time
from utils.timesteps import density_over_sigma

T_COLOR, SIGMA_COLOR, INK = "#2f6fbd", "#cc5a14", "#222222"
"""The first two are seen on white and on black."""
WIDTH_INCHES = 4.4
_STYLE = {
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
    axes.set_ylim(bottom=0)
    axes.legend(loc="upper left")


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
