"""The printed table of an evaluation."""

from __future__ import annotations

from collections.abc import Sequence

from utils.evaluation import statistics
from utils.evaluation.results import Difference, EvaluationResult


def describe(result: EvaluationResult) -> str:
    """Returns the evaluation as a table with a line for each group, and sentences about significance."""
    everything = result.groups[0]
    title = f"evaluation at step {result.step}" + (" (averaged weights)" if result.weights == "ema" else "")
    header = [title, "images", "loss"]
    start, best = everything.to_start, everything.to_best
    if start is not None and best is not None:
        header.append(f"change since step {start.to_step} (95%)")
        if best.to_step != start.to_step:
            header.append(f"since step {best.to_step}, the best (95%)")
    rows = [header]
    for group in result.groups:
        changes = [format_difference(difference) for difference in (group.to_start, group.to_best)]
        rows.append([f"  {group.name}", str(group.num_images), f"{group.loss:.5f}", *changes][: len(header)])
    widths = [max(len(row[column]) for row in rows) for column in range(len(header))]
    lines = [_aligned(row, widths) for row in rows]
    return "\n".join([*lines, *(f"  {sentence}" for sentence in _significance(result))])


def format_difference(difference: Difference | None) -> str:
    """Returns a difference with its interval as text; "" for None."""
    if difference is None:
        return ""
    interval = difference.interval
    return f"{difference.mean:+.5f}" + ("" if interval is None else f" ({interval.low:+.5f} to {interval.high:+.5f})")


def _aligned(row: Sequence[str], widths: Sequence[int]) -> str:
    cells = [
        cell.rjust(width) if column in (1, 2) else cell.ljust(width) for column, (cell, width) in enumerate(zip(row, widths))
    ]
    return "  ".join(cells).rstrip()


def _significance(result: EvaluationResult) -> list[str]:
    previous = result.to_previous
    if previous is None:
        return []
    sentences = []
    if result.groups[0].num_images < statistics.MIN_SAMPLES:
        sentences.append(f"no confidence intervals: they need at least {statistics.MIN_SAMPLES} images")
    elif result.unchanged_since is not None:
        sentences.append(f"no significant change since step {result.unchanged_since}")
    elif previous.is_significant:
        sentences.append(f"significantly {'lower' if previous.mean < 0 else 'higher'} than at step {previous.to_step}")
    if result.is_best:
        sentences.append("the lowest loss so far")
    return sentences
