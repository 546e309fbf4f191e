"""Draws the plots of docs/objective.md:  python -m docs.draw_plots [FOLDER]

Every curve is computed by the code in utils/objective/. A test compares the output of this script with the files in
docs/plots.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import get_args

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from utils.config.schema.objective_choices import LossType, TimestepSampling, WeightingScheme
from utils.objective.loss import penalty
from utils.objective.rectified_flow import shift_time
from utils.objective.timestep_sampling import Density, TimeSampler
from utils.objective.weighting import Weighting
from utils.report.plots import INK, SIGMA_COLOR, T_COLOR, as_svg, draw_density, new_figure, unit_axis

FOLDER = Path(__file__).resolve().parent / "plots"
SHIFT = 3.0
SHIFT_COLORS = {1.0: "#8a8a8a", 1.5: "#7aa5d8", 3.0: T_COLOR, 6.0: "#0b2b55"}
NUM_POINTS = 121
MAX_WEIGHT, MAX_DENSITY = 1.75, 6.3
"""Upper limits of the vertical axes, equal in all plots of a kind."""


def even_t() -> Tensor:
    return torch.linspace(0, 1, NUM_POINTS, dtype=torch.float64)


def density_axes(axes: Axes, sampler: TimeSampler, title: str) -> None:
    draw_density(axes, *sampler.density_nodes(NUM_POINTS), SHIFT)
    axes.set(ylim=(0, MAX_DENSITY), title=title)


def weight_axes(axes: Axes, weighting: Weighting) -> None:
    """Draws the weight over t; for sigma_sqrt, which depends on the shift, at two shifts."""
    t = even_t()
    axes.plot(t, weighting(t, shift_time(t, SHIFT)), color=INK, label=f"shift {SHIFT:g}")
    if weighting.scheme == "sigma_sqrt":
        axes.plot(t, weighting(t, t), color=INK, linestyle=(0, (1, 1)), label="shift 1")
        axes.legend(loc="lower right")
    unit_axis(axes, "t")
    axes.set(ylim=(0, MAX_WEIGHT), title=f'Weight w(t) of "{weighting.scheme}"')


def weighting_plot(scheme: WeightingScheme) -> Figure:
    weighting = Weighting(scheme)
    figure, (upper, lower) = new_figure([1.9, 2.1], "white")
    weight_axes(upper, weighting)
    sampler = TimeSampler(Density("sigma"), lambda t: weighting(t, shift_time(t, SHIFT)), 0.0, 1.0)
    density_axes(lower, sampler, 'Density drawn from, with weighting_by = "sampling"')
    return figure


def sampling_plot(sampling: TimestepSampling) -> Figure:
    figure, (axes,) = new_figure([2.1], "white")
    density_axes(axes, TimeSampler(Density(sampling), None, 0.0, 1.0), f'Density of "{sampling}"')
    return figure


def shift_plot() -> Figure:
    figure, (axes,) = new_figure([3.0], "white")
    t = even_t()
    for shift, color in SHIFT_COLORS.items():
        axes.plot(t, shift_time(t, shift), color=color, label=f"shift {shift:g}")
    unit_axis(axes, "t")
    axes.set(ylim=(0, 1), title="sigma, the fraction of noise")
    axes.legend(loc="lower right")
    return figure


def penalty_plot() -> Figure:
    figure, (axes,) = new_figure([2.1], "white")
    error = torch.linspace(-0.5, 0.5, NUM_POINTS, dtype=torch.float64)
    colors: dict[LossType, str] = {"l2": INK, "huber": T_COLOR, "smooth_l1": SIGMA_COLOR}
    for loss_type in get_args(LossType):
        axes.plot(error, penalty(error, loss_type, 0.1), color=colors[loss_type], label=loss_type)
    axes.set(xlim=(-0.5, 0.5), ylim=(0, 0.3), xlabel="error", title="Penalty of an error, huber_c = 0.1")
    axes.legend(loc="upper center")
    return figure


PLOTS: dict[str, Callable[[], Figure]] = {
    "shift": shift_plot,
    **{f"sampling_{name}": partial(sampling_plot, name) for name in get_args(TimestepSampling)},
    **{f"weighting_{name}": partial(weighting_plot, name) for name in get_args(WeightingScheme)},
    "penalty": penalty_plot,
}
"""File name without extension -> function that draws the plot."""


def main(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, draw in PLOTS.items():
        (folder / f"{name}.svg").write_text(as_svg(name, draw) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else FOLDER)
