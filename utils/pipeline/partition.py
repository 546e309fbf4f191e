"""Divides the layers of a network into pipeline stages by their costs. Pure."""

from __future__ import annotations

from collections.abc import Sequence


def balanced_bounds(costs: Sequence[float], num_stages: int) -> list[int]:
    """Divides consecutive layers into stages so that the cost of the most expensive stage is minimal.

    Returns num_stages + 1 positions: stage i has the layers bounds[i] to bounds[i + 1] - 1, at least one. Of several optimal
    divisions it returns the one with the earliest cuts. Raises ValueError when there are more stages than layers.
    """
    num_layers = len(costs)
    if not 1 <= num_stages <= num_layers:
        raise ValueError(f"{num_layers} layers cannot be divided into {num_stages} stages")
    # best[k][i]: cost of the most expensive stage when the first i layers make k stages; cut[k][i]: start of the last one.
    infinity = float("inf")
    best = [[infinity] * (num_layers + 1) for _ in range(num_stages + 1)]
    cut = [[0] * (num_layers + 1) for _ in range(num_stages + 1)]
    best[0][0] = 0.0
    for k in range(1, num_stages + 1):
        for stop in range(k, num_layers + 1):
            stage_cost = 0.0
            for start in range(stop - 1, k - 2, -1):
                stage_cost += costs[start]
                highest = max(best[k - 1][start], stage_cost)
                if highest < best[k][stop]:
                    best[k][stop], cut[k][stop] = highest, start
    bounds = [num_layers]
    for k in range(num_stages, 0, -1):
        bounds.append(cut[k][bounds[-1]])
    return bounds[::-1]
