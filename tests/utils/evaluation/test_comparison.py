"""utils/evaluation/comparison.py and result_table.py: differences, significance, groups and the printed table."""

from __future__ import annotations

import pytest
import torch

from tests.utils.evaluation.measurements import BASE, SEED, compared, losses, measured, no_shift, points_of
from utils.data.examples import Example
from utils.evaluation.comparison import Group, Measurement, compare, make_groups, unchanged_since
from utils.evaluation.points import make_points
from utils.evaluation.result_table import describe
from utils.evaluation.results import Difference
from utils.evaluation.statistics import Interval


def test_the_first_evaluation_has_only_a_mean() -> None:
    result = compared(Measurement(0, BASE))
    (group,) = result.groups
    assert (result.loss, group.num_images) == (float(BASE.mean()), 6)
    assert group.to_start is None and group.to_best is None and result.to_previous is None
    assert result.is_best and result.unchanged_since is None
    assert result.losses == tuple(BASE.tolist())


def test_a_mean_gives_every_image_the_same_weight() -> None:
    group = Group("all", (0, 1, 2, 3), (0, 0, 0, 1), with_best=True)
    result = compare(Measurement(0, losses(1, 2, 3, 6)), [], [group], weights="last", fingerprint="", seed=SEED)
    assert result.loss == 4.0


def test_points_of_one_image_are_not_independent_samples() -> None:
    """The points of each image change in opposite directions while its mean falls by about 1/8, which is significant."""
    falls = [-0.125, -0.1875, -0.0625, -0.125, -0.15625, -0.09375]
    result = compared(measured(4, falls), Measurement(0, BASE))
    difference = result.groups[0].to_start
    assert difference is not None and difference.interval is not None
    assert (difference.to_step, difference.mean) == (0, -0.125)
    assert -0.2 < difference.interval.low < -0.125 < difference.interval.high < 0
    assert difference.is_significant and result.is_best and result.unchanged_since is None
    assert "significantly lower than at step 0" in describe(result)


def test_differences_are_to_the_first_the_best_and_the_previous_evaluation() -> None:
    steady = [0.0, 0.03125, -0.03125, 0.015625, -0.015625, 0.0]
    start, best, previous = (
        measured(step, [down + x for x in steady]) for step, down in ((0, 0.0), (2, -0.25), (4, -0.125))
    )
    now = measured(6, [-0.1875 - x for x in steady])
    result = compared(now, start, best, previous)
    (group,) = result.groups
    assert group.to_start is not None and group.to_best is not None and result.to_previous is not None
    assert (group.to_start.to_step, group.to_start.mean) == (0, -0.1875)
    assert (group.to_best.to_step, group.to_best.mean) == (2, 0.0625)
    assert (result.to_previous.to_step, result.to_previous.mean) == (4, -0.0625)
    assert not result.is_best


def test_best_is_lower_than_all_earlier_evaluations_and_not_equal() -> None:
    start = Measurement(0, BASE)
    assert compared(Measurement(2, BASE - 0.25), start).is_best
    assert not compared(Measurement(2, BASE), start).is_best
    assert not compared(Measurement(4, BASE - 0.125), start, Measurement(2, BASE - 0.25)).is_best
    tied = compared(Measurement(6, BASE), Measurement(0, BASE), Measurement(2, BASE)).groups[0].to_best
    assert tied is not None and tied.to_step == 0


def test_no_significant_change_is_reported_since_the_earliest_possible_step() -> None:
    wave = [0.03125, -0.03125, 0.015625, -0.015625, 0.0078125, -0.0078125]
    start = measured(0, [0.5 + x for x in wave])
    second, third = measured(2, wave), measured(4, [-x for x in wave])
    result = compared(measured(6, [0.0] * 6), start, second, third)
    assert result.unchanged_since == 2
    assert "no significant change since step 2" in describe(result)
    assert compared(measured(2, wave), start).unchanged_since is None


WITH_ZERO, WITHOUT_ZERO = Interval(-1, 1), Interval(1, 2)


@pytest.mark.parametrize(
    ("intervals", "since"),
    [
        ([], None),
        ([WITH_ZERO], 0),
        ([WITHOUT_ZERO], None),
        ([WITH_ZERO, WITH_ZERO, WITH_ZERO], 0),
        ([WITHOUT_ZERO, WITH_ZERO, WITH_ZERO], 1),
        ([WITH_ZERO, WITHOUT_ZERO, WITH_ZERO], 2),
        ([WITH_ZERO, WITH_ZERO, WITHOUT_ZERO], None),
        ([None, None], None),
    ],
)
def test_unchanged_since_is_the_earliest_step_without_a_significant_difference(
    intervals: list[Interval | None], since: int | None
) -> None:
    assert unchanged_since([Difference(step, 0.0, interval) for step, interval in enumerate(intervals)]) == since


def test_few_images_have_differences_but_no_intervals() -> None:
    group = Group("all", (0, 1, 2), (0, 1, 2), with_best=True)
    start, now = Measurement(0, losses(1, 2, 3)), Measurement(2, losses(1, 2, 2))
    result = compare(now, [start], [group], weights="last", fingerprint="", seed=SEED)
    difference = result.groups[0].to_start
    assert difference is not None
    assert difference.mean == pytest.approx(-1 / 3)
    assert difference.interval is None and not difference.is_significant
    assert result.unchanged_since is None
    assert "no confidence intervals: they need at least 5 images" in describe(result)


# --- groups ------------------------------------------------------------------------------------------------------------


def test_groups_are_sets_timestep_bins_and_resolutions(examples: list[Example]) -> None:
    points = make_points({"holdout": examples[:6], "other": examples[6:]}, 2, SEED, no_shift)
    groups = {group.name: group for group in make_groups(points)}
    assert list(groups) == [
        "all",
        "set holdout",
        "set other",
        "t 0.00-0.50",
        "t 0.50-1.00",
        "resolution 32",
        "resolution 48",
    ]
    assert [name for name, group in groups.items() if group.with_best] == ["all", "set holdout", "set other"]
    assert groups["all"].points == tuple(range(len(points)))
    assert set(groups["all"].images) == set(range(7)), "an image at two resolutions counts as one image"
    for name, kind in (("t", 2), ("set", 2), ("resolution", 2)):
        parts = [group.points for group in groups.values() if group.name.startswith(f"{name} ")]
        assert len(parts) == kind
        assert sorted(index for part in parts for index in part) == list(range(len(points)))
    assert {points[index].t_bin for index in groups["t 0.50-1.00"].points} == {1}
    assert all(str(points[index].example.key).endswith("@48") for index in groups["resolution 48"].points)
    for group in groups.values():
        everywhere = [groups["all"].images[index] for index in group.points]
        assert list(group.images) == everywhere


def test_a_group_equal_to_all_is_omitted(examples: list[Example]) -> None:
    small = [example for example in examples if example.key.endswith("@32")]
    assert [group.name for group in make_groups(points_of(small, num_bins=1))] == ["all"]


def test_many_bins_have_different_names(examples: list[Example]) -> None:
    names = [group.name for group in make_groups(points_of(examples[:1], num_bins=200))]
    assert len(set(names)) == 201
    assert "t 0.495-0.500" in names


def test_the_table_is_aligned_and_names_the_compared_steps(examples: list[Example]) -> None:
    points = points_of(examples, num_bins=2)
    groups, start = make_groups(points), Measurement(0, torch.arange(len(points)).double() / 8)
    first = describe(compare(start, [], groups, weights="last", fingerprint="", seed=SEED)).splitlines()
    assert first[0].split() == "evaluation at step 0 images loss".split()
    assert first[1].split() == ["all", "7", "1.68750"]
    assert len(first) == 6
    better, now = Measurement(20, start.losses * 0.5), Measurement(40, start.losses * 0.75)
    lines = describe(compare(better, [start], groups, weights="last", fingerprint="", seed=SEED)).splitlines()
    assert lines[0].endswith("change since step 0 (95%)"), "the first evaluation is also the best so far"
    assert lines[-2:] == ["  significantly lower than at step 0", "  the lowest loss so far"]
    lines = describe(compare(now, [start, better], groups, weights="ema", fingerprint="", seed=SEED)).splitlines()
    assert lines[0].startswith("evaluation at step 40 (averaged weights)  images")
    assert lines[0].endswith("since step 20, the best (95%)")
    for header, rows in (("change since step 0", lines[1:6]), ("since step 20", lines[1:2])):
        column = lines[0].index(header)
        assert all(line[column] in "+-" and line[column - 1] == " " for line in rows)
    assert lines[1].count("(") == 2 and lines[2].count("(") == 1
    assert lines[-1] == "  significantly higher than at step 20"


def test_curves_have_names_without_spaces(examples: list[Example]) -> None:
    points = points_of(examples, num_bins=2)
    groups, start = make_groups(points), Measurement(0, torch.ones(len(points)).double())
    first = compare(start, [], groups, weights="last", fingerprint="", seed=SEED).scalars()
    assert list(first) == [
        "eval/loss",
        "eval/loss_t_0.00-0.50",
        "eval/loss_t_0.50-1.00",
        "eval/loss_resolution_32",
        "eval/loss_resolution_48",
    ]
    later = compare(Measurement(2, start.losses / 2), [start], groups, weights="last", fingerprint="", seed=SEED).scalars()
    ends = {name: value for name, value in later.items() if name not in first}
    assert ends == {
        "eval/difference_to_start": -0.5,
        "eval/difference_to_start_low": -0.5,
        "eval/difference_to_start_high": -0.5,
    }
