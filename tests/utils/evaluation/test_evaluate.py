"""What evaluation measures, how it compares, and what it writes down; on a network that is one line."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from models.family import LatentSpec
from models.streams import Sample, SampleShape
from utils import randomness
from utils.config.schema.dataset import DatasetConfig
from utils.config.schema.evaluation import EvalConfig
from utils.data.examples import Example
from utils.data.scan import scan
from utils.data.sources.image_files import ImageFile
from utils.data.sources.listing import Lister
from utils.data.sources.readers import Readers
from utils.evaluation.comparison import (
    Difference,
    EvaluationResult,
    Group,
    Measured,
    compare,
    describe,
    keep_until,
    make_groups,
    read_evaluations,
    to_line,
    unchanged_since,
)
from utils.evaluation.evaluate import EVALUATIONS, Evaluation
from utils.evaluation.points import PanelEntry, fingerprint, make_panel, make_rounds, noise_of
from utils.evaluation.statistics import Interval

SEED = 5
NUM_BANDS = 4


@pytest.fixture(scope="module")
def examples(tiny_dataset: Path, readers: Readers) -> list[Example]:
    """Seven images of three shapes at two resolutions."""
    config = DatasetConfig.model_validate(
        {"resolutions": [32, 48], "num_ar_buckets": 3, "directory": [{"path": str(tiny_dataset)}]}
    )
    found = scan(config, 16, Lister(readers, None)).examples
    names = sorted({example.image for example in found})[:7]
    return [example for example in found if example.image in names]


def no_shift(num_pixels: int) -> float:
    return 1.0


def panel_of(examples: Sequence[Example], num_bands: int = NUM_BANDS, seed: int = SEED) -> list[PanelEntry]:
    return make_panel({"holdout": examples}, num_bands, seed, no_shift)


# --- the panel ---------------------------------------------------------------------------------------------------------


def test_every_image_is_in_every_band_at_a_time_inside_of_it(examples: list[Example]) -> None:
    panel = panel_of(examples)
    assert [(entry.example.key, entry.band) for entry in panel] == [
        (example.key, band) for example in examples for band in range(NUM_BANDS)
    ]
    assert all(entry.band < NUM_BANDS * entry.t < entry.band + 1 for entry in panel)
    assert len({entry.t for entry in panel}) == len(panel)


def test_times_fill_their_bands(tiny_dataset: Path, examples: list[Example]) -> None:
    many = [replace(examples[0], key=f"{number}@32") for number in range(2000)]
    places = torch.tensor([4 * entry.t - entry.band for entry in panel_of(many) if entry.band == 2]).sort().values
    assert (places - (torch.arange(2000) + 0.5) / 2000).abs().max() < 1.63 / 2000**0.5


def test_the_panel_is_a_function_of_its_arguments(examples: list[Example]) -> None:
    assert panel_of(examples) == panel_of(examples)
    other = panel_of(examples, seed=SEED + 1)
    assert not {entry.t for entry in panel_of(examples)} & {entry.t for entry in other}


def test_one_more_image_changes_nothing_for_the_others(examples: list[Example]) -> None:
    fewer, more = panel_of(examples[2:]), panel_of(examples)
    assert fewer == more[2 * NUM_BANDS :]
    assert panel_of(list(reversed(examples)))[-NUM_BANDS:] == more[:NUM_BANDS]
    sets = {"other": examples[:2], "holdout": examples[2:]}
    joined = make_panel(sets, NUM_BANDS, SEED, no_shift)
    assert joined[2 * NUM_BANDS :] == fewer
    assert {entry.set_name for entry in joined[: 2 * NUM_BANDS]} == {"other"}


def test_sigma_is_the_time_shifted_for_the_image_s_size(examples: list[Example]) -> None:
    panel = make_panel({"holdout": examples}, 2, SEED, lambda num_pixels: 3.0 if num_pixels > 1500 else 1.0)
    assert {entry.example.bucket.width * entry.example.bucket.height > 1500 for entry in panel} == {True, False}
    for entry in panel:
        large = entry.example.bucket.width * entry.example.bucket.height > 1500
        assert entry.sigma == pytest.approx(3 * entry.t / (1 + 2 * entry.t) if large else entry.t, rel=1e-15)


def test_repeats_are_more_draws_for_a_image(examples: list[Example]) -> None:
    panel = panel_of([replace(examples[0], repeats=3), examples[1]])
    assert [(entry.repeat, entry.band) for entry in panel[:-NUM_BANDS]] == [
        (repeat, band) for repeat in range(3) for band in range(NUM_BANDS)
    ]
    noises = [noise_of(entry, (2, 3), SEED) for entry in panel]
    assert len({tuple(noise.flatten().tolist()) for noise in noises}) == len(panel)
    assert len({entry.t for entry in panel}) == len(panel)
    assert panel[:NUM_BANDS] == panel_of([replace(examples[0], repeats=3)])[:NUM_BANDS]


def test_draws_have_purposes_of_their_own(examples: list[Example]) -> None:
    (entry, *_) = panel_of(examples[:1], num_bands=1)
    assert entry.t == randomness.uniform(SEED, "evaluation time", entry.example.key, 0, 0)
    expected = randomness.normal(SEED, "evaluation noise", entry.example.key, 0, 0, shape=(2, 2))
    assert torch.equal(noise_of(entry, (2, 2), SEED), expected)


def test_examples_that_share_a_key_are_a_mistake(examples: list[Example]) -> None:
    with pytest.raises(AssertionError, match="share keys"):
        make_panel({"one": examples[:1], "two": examples[:1]}, 1, SEED, no_shift)


def no_contents(_example: Example) -> list[str]:
    return []


def test_fingerprint_tells_what_is_measured(examples: list[Example]) -> None:
    first = examples[0]
    same = fingerprint(panel_of(examples), no_contents)
    moved = [replace(example, image=ImageFile(Path("/elsewhere") / example.image.path.name)) for example in examples]
    assert fingerprint(panel_of(moved), no_contents) == same
    others = [
        fingerprint(panel_of(examples[1:]), no_contents),
        fingerprint(panel_of([*examples[1:], first]), no_contents),
        fingerprint(panel_of([replace(first, captions=("another",)), *examples[1:]]), no_contents),
        fingerprint(panel_of([replace(first, box=examples[-1].box), *examples[1:]]), no_contents),
        fingerprint(panel_of([replace(first, mask=ImageFile(Path("mask.png"))), *examples[1:]]), no_contents),
        fingerprint(panel_of(examples), lambda example: [str(example.key == first.key)]),  # of one, the file has changed
        fingerprint(panel_of(examples, num_bands=3), no_contents),
        fingerprint(panel_of(examples, seed=SEED + 1), no_contents),
        fingerprint(make_panel({"holdout": examples}, NUM_BANDS, SEED, lambda _: 3.0), no_contents),
        fingerprint(make_panel({"other": examples}, NUM_BANDS, SEED, no_shift), no_contents),
    ]
    assert len({same, *others}) == len(others) + 1


# --- batches -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch_size", [1, 3, 5, 100])
@pytest.mark.parametrize("at_once", [1, 2, 8])
def test_every_entry_is_in_one_batch_of_one_shape(examples: list[Example], batch_size: int, at_once: int) -> None:
    panel = panel_of(examples)
    rounds = make_rounds(panel, batch_size, at_once)
    batches = [batch for batches in rounds for batch in batches]
    assert sorted(index for batch in batches for index in batch) == list(range(len(panel)))
    for together in rounds:
        assert 1 <= len(together) <= at_once
        assert len({(len(batch), panel[index].example.bucket) for batch in together for index in batch}) == 1
    assert sorted(batches) == sorted(batch for batches in make_rounds(panel, batch_size, 4) for batch in batches)
    assert max(len(batch) for batch in batches) <= batch_size


def test_the_last_batch_of_a_bucket_is_partial(examples: list[Example]) -> None:
    square = [example for example in examples if str(example.bucket) == "32x32"]
    rounds = make_rounds(panel_of(square, num_bands=3), 4, 2)
    assert [[len(batch) for batch in batches] for batches in rounds] == [[4, 4], [1]]


# --- comparing ---------------------------------------------------------------------------------------------------------


def losses(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


TWO_EACH = Group("all", tuple(range(12)), (0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5), with_best=True)
"""Six images, each measured twice."""
BASE = losses(*(1.0 + index / 16 for index in range(12)))


def measured(step: int, change: Sequence[float]) -> Measured:
    """The six images' losses changed by this much; within an image one entry far more, the other far less."""
    both = [value for part in change for value in (part + 0.5, part - 0.5)]
    return Measured(step, BASE + losses(*both))


def compared(now: Measured, *earlier: Measured) -> EvaluationResult:
    return compare(now, earlier, [TWO_EACH], weights="last", panel="abc", seed=SEED)


def test_the_first_evaluation_has_only_a_mean() -> None:
    result = compared(Measured(0, BASE))
    (group,) = result.groups
    assert (result.loss, group.num_images) == (float(BASE.mean()), 6)
    assert group.to_start is None and group.to_best is None and result.to_previous is None
    assert result.is_best and result.unchanged_since is None
    assert result.losses == tuple(BASE.tolist())


def test_a_mean_gives_every_image_the_same_weight() -> None:
    group = Group("all", (0, 1, 2, 3), (0, 0, 0, 1), with_best=True)
    result = compare(Measured(0, losses(1, 2, 3, 6)), [], [group], weights="last", panel="", seed=SEED)
    assert result.loss == 4.0


def test_entries_of_a_image_are_no_independent_witnesses() -> None:
    """Each image's entries go far apart and its mean falls by about 1/8: significant, as images are compared."""
    falls = [-0.125, -0.1875, -0.0625, -0.125, -0.15625, -0.09375]
    result = compared(measured(4, falls), Measured(0, BASE))
    difference = result.groups[0].to_start
    assert difference is not None and difference.interval is not None
    assert (difference.to_step, difference.mean) == (0, -0.125)
    assert -0.2 < difference.interval.low < -0.125 < difference.interval.high < 0
    assert difference.is_significant and result.is_best and result.unchanged_since is None
    assert "significantly lower than at step 0" in describe(result)


def test_differences_are_to_the_start_the_best_and_the_evaluation_before() -> None:
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


def test_best_is_lower_than_all_before_and_ties_are_not() -> None:
    start = Measured(0, BASE)
    assert compared(Measured(2, BASE - 0.25), start).is_best
    assert not compared(Measured(2, BASE), start).is_best
    assert not compared(Measured(4, BASE - 0.125), start, Measured(2, BASE - 0.25)).is_best
    tied = compared(Measured(6, BASE), Measured(0, BASE), Measured(2, BASE)).groups[0].to_best
    assert tied is not None and tied.to_step == 0


def test_no_change_is_told_from_the_earliest_step_it_holds_from() -> None:
    wave = [0.03125, -0.03125, 0.015625, -0.015625, 0.0078125, -0.0078125]
    start = measured(0, [0.5 + x for x in wave])
    second, third = measured(2, wave), measured(4, [-x for x in wave])
    result = compared(measured(6, [0.0] * 6), start, second, third)
    assert result.unchanged_since == 2
    assert "no significant change since step 2" in describe(result)
    assert compared(measured(2, wave), start).unchanged_since is None


UNSURE, SURE = Interval(-1, 1), Interval(1, 2)


@pytest.mark.parametrize(
    ("intervals", "since"),
    [
        ([], None),
        ([UNSURE], 0),
        ([SURE], None),
        ([UNSURE, UNSURE, UNSURE], 0),
        ([SURE, UNSURE, UNSURE], 1),
        ([UNSURE, SURE, UNSURE], 2),
        ([UNSURE, UNSURE, SURE], None),
        ([None, None], None),
    ],
)
def test_unchanged_since(intervals: list[Interval | None], since: int | None) -> None:
    assert unchanged_since([Difference(step, 0.0, interval) for step, interval in enumerate(intervals)]) == since


def test_few_images_have_differences_and_no_intervals() -> None:
    group = Group("all", (0, 1, 2), (0, 1, 2), with_best=True)
    start, now = Measured(0, losses(1, 2, 3)), Measured(2, losses(1, 2, 2))
    result = compare(now, [start], [group], weights="last", panel="", seed=SEED)
    difference = result.groups[0].to_start
    assert difference is not None
    assert difference.mean == pytest.approx(-1 / 3)
    assert difference.interval is None and not difference.is_significant
    assert result.unchanged_since is None
    assert "no intervals: it takes at least 5 images" in describe(result)


# --- groups ------------------------------------------------------------------------------------------------------------


def test_groups_are_sets_bands_and_resolutions(examples: list[Example]) -> None:
    panel = make_panel({"holdout": examples[:6], "other": examples[6:]}, 2, SEED, no_shift)
    groups = {group.name: group for group in make_groups(panel)}
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
    assert groups["all"].entries == tuple(range(len(panel)))
    assert set(groups["all"].images) == set(range(7)), "at two resolutions an image is one image"
    for name, kind in (("t", 2), ("set", 2), ("resolution", 2)):
        parts = [group.entries for group in groups.values() if group.name.startswith(f"{name} ")]
        assert len(parts) == kind
        assert sorted(entry for part in parts for entry in part) == list(range(len(panel)))
    assert {panel[entry].band for entry in groups["t 0.50-1.00"].entries} == {1}
    assert all(str(panel[entry].example.key).endswith("@48") for entry in groups["resolution 48"].entries)
    for group in groups.values():
        everywhere = [groups["all"].images[entry] for entry in group.entries]
        assert list(group.images) == everywhere


def test_a_group_that_is_all_is_not_told_twice(examples: list[Example]) -> None:
    small = [example for example in examples if example.key.endswith("@32")]
    assert [group.name for group in make_groups(panel_of(small, num_bands=1))] == ["all"]


def test_many_bands_have_names_of_their_own(examples: list[Example]) -> None:
    names = [group.name for group in make_groups(panel_of(examples[:1], num_bands=200))]
    assert len(set(names)) == 201
    assert "t 0.495-0.500" in names


def test_the_table_is_aligned_and_says_what_it_compares(examples: list[Example]) -> None:
    panel = panel_of(examples, num_bands=2)
    groups, start = make_groups(panel), Measured(0, torch.arange(len(panel)).double() / 8)
    first = describe(compare(start, [], groups, weights="last", panel="", seed=SEED)).splitlines()
    assert first[0].split() == "evaluation at step 0 images loss".split()
    assert first[1].split() == ["all", "7", "1.68750"]
    assert len(first) == 6
    better, now = Measured(20, start.losses * 0.5), Measured(40, start.losses * 0.75)
    lines = describe(compare(better, [start], groups, weights="last", panel="", seed=SEED)).splitlines()
    assert lines[0].endswith("change since step 0 (95%)"), "so far the start is the best"
    assert lines[-2:] == ["  significantly lower than at step 0", "  the lowest loss so far"]
    lines = describe(compare(now, [start, better], groups, weights="ema", panel="", seed=SEED)).splitlines()
    assert lines[0].startswith("evaluation at step 40 (averaged weights)  images")
    assert lines[0].endswith("since step 20, the best (95%)")
    for header, rows in (("change since step 0", lines[1:6]), ("since step 20", lines[1:2])):
        column = lines[0].index(header)
        assert all(line[column] in "+-" and line[column - 1] == " " for line in rows)
    assert lines[1].count("(") == 2 and lines[2].count("(") == 1
    assert lines[-1] == "  significantly higher than at step 20"


def test_curves_have_names_without_spaces(examples: list[Example]) -> None:
    panel = panel_of(examples, num_bands=2)
    groups, start = make_groups(panel), Measured(0, torch.ones(len(panel)).double())
    first = compare(start, [], groups, weights="last", panel="", seed=SEED).scalars()
    assert list(first) == [
        "eval/loss",
        "eval/loss_t_0.00-0.50",
        "eval/loss_t_0.50-1.00",
        "eval/loss_resolution_32",
        "eval/loss_resolution_48",
    ]
    later = compare(Measured(2, start.losses / 2), [start], groups, weights="last", panel="", seed=SEED).scalars()
    ends = {name: value for name, value in later.items() if name not in first}
    assert ends == {
        "eval/difference_to_start": -0.5,
        "eval/difference_to_start_low": -0.5,
        "eval/difference_to_start_high": -0.5,
    }


# --- the file ----------------------------------------------------------------------------------------------------------


def results() -> list[EvaluationResult]:
    """Three evaluations of a run, with numbers that have no short decimals."""
    made = [measured(2 * index, [x / 3 - index / 7 for x in range(6)]) for index in range(3)]
    return [compared(now, *made[:index]) for index, now in enumerate(made)]


def test_results_come_back_exactly(tmp_path: Path) -> None:
    (tmp_path / EVALUATIONS).write_text("".join(map(to_line, results())))
    assert read_evaluations(tmp_path / EVALUATIONS) == results()
    assert read_evaluations(tmp_path / "nothing.jsonl") == []


def test_a_line_names_step_weights_panel_losses_and_summary() -> None:
    line = json.loads(to_line(results()[1]))
    assert list(line) == ["step", "weights", "panel", "losses", "summary"]
    assert set(line["summary"]) == {"groups", "to_previous", "is_best", "unchanged_since"}


@pytest.mark.parametrize("rest", ['{"step": 6, "losses": [0.', "\x00\x00\x00"])
def test_a_line_that_was_being_written_is_dropped(tmp_path: Path, rest: str) -> None:
    path = tmp_path / EVALUATIONS
    path.write_text("".join(map(to_line, results())) + rest)
    assert read_evaluations(path) == results()
    keep_until(path, 100)
    assert path.read_text() == "".join(map(to_line, results()))


def test_going_on_drops_what_comes_after_and_beginning_anew_everything(tmp_path: Path) -> None:
    path = tmp_path / EVALUATIONS
    path.write_text("".join(map(to_line, results())))
    assert keep_until(path, 3) == results()[:2]
    assert keep_until(path, 2) == results()[:2]
    assert path.read_text() == "".join(map(to_line, results()[:2]))
    assert keep_until(path, 0) == []
    assert path.read_text() == ""
    assert keep_until(tmp_path / "nothing.jsonl", 3) == []


# --- measuring ---------------------------------------------------------------------------------------------------------

CHANNELS = 4


class OneLineAdapter:
    """Of a network that takes (noisy latents, sigma, text) and whose output is in rows, as a transformer's."""

    latent = LatentSpec(channels=CHANNELS, downscale=8, patch=2, max_side_pixels=512)

    def sample_shape(self, batch: int, height: int, width: int) -> SampleShape:
        return SampleShape(batch, height, width, num_text_tokens=0)

    def sample(self, noisy_latents: Tensor, sigma: Tensor, text: Mapping[str, Tensor]) -> Sample:
        tensors = {"noisy": noisy_latents, "sigma": sigma, "context": text["encoder.context"]}
        batch, _, height, width = noisy_latents.shape
        return Sample(tensors, self.sample_shape(batch, height, width))

    def velocity(self, output: Tensor, shape: SampleShape) -> Tensor:
        return output.unflatten(-1, (shape.height, shape.width))


class MadeUpData:
    """Latents, masks and text from names."""

    def __init__(self, masked: Sequence[str] = ()) -> None:
        self._masked = masked

    def latents(self, example: Example) -> Tensor:
        size = (example.bucket.height // 8, example.bucket.width // 8)
        return randomness.normal(0, "latents", example.key, shape=(CHANNELS, *size))

    def content_keys(self, example: Example) -> list[str]:
        return [example.key]

    def mask(self, example: Example) -> Tensor | None:
        if example.key not in self._masked:
            return None
        return (self.latents(example)[:1] > 0).float() / 2

    def text(self, caption: str) -> dict[str, Tensor]:
        return {"encoder.context": randomness.normal(0, "text", caption, shape=(3,))}


def network(weight: float, noisy: Tensor, sigma: Tensor, context: Tensor) -> Tensor:
    """(B, C, H W): depends on every input."""
    return (weight * noisy + sigma[:, None, None, None] + context.mean(1)[:, None, None, None]).flatten(2)


class OneProcess:
    """The pipeline's side that evaluation uses, on one process."""

    stage, num_stages, replica = 0, 1, 0

    def __init__(self) -> None:
        self.weight, self.average = 0.5, 0.25
        self.shapes: list[list[tuple[int, ...]]] = []

    def predict(self, shapes: Sequence[SampleShape], samples: Sequence[Sample]) -> list[Tensor]:
        assert [sample.shape for sample in samples] == list(shapes)
        self.shapes.append([tuple(sample.tensors["noisy"].shape) for sample in samples])
        return [network(self.weight, **sample.tensors) for sample in samples]

    @contextlib.contextmanager
    def averaged_weights(self) -> Iterator[None]:
        before, self.weight = self.weight, self.average
        yield
        self.weight = before


@pytest.fixture(autouse=True)
def alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """One process without a group."""
    monkeypatch.setattr("utils.evaluation.evaluate.group.broadcast", lambda value: value)
    monkeypatch.setattr("utils.evaluation.evaluate.group.gather", lambda value: [value])


def evaluation(
    folder: Path, pipeline: OneProcess, panel: Sequence[PanelEntry], data: MadeUpData | None = None, **changes: Any
) -> Evaluation:
    keywords = {"prediction_type": "raw", "dtype": torch.float32, "seed": SEED, "num_replicas": 1, "start_step": 0}
    config = EvalConfig.model_validate({"holdout_images": 7, "batch_size": 3, **changes.pop("config", {})})
    made_up: Any = data or MadeUpData()
    adapter: Any = OneLineAdapter()
    stage: Any = pipeline
    return Evaluation(adapter, made_up, stage, config, panel, folder=folder, **{**keywords, **changes})


def direct_losses(panel: Sequence[PanelEntry], weight: float, data: MadeUpData, additive: bool = False) -> list[float]:
    """Each entry alone, in float64."""
    found = []
    for entry in panel:
        latents = data.latents(entry.example).double()
        noise = noise_of(entry, tuple(latents.shape), SEED).double()
        noisy = (1 - entry.sigma) * latents + entry.sigma * noise
        context = data.text(entry.example.caption())["encoder.context"].double().mean()
        answer = weight * noisy + entry.sigma + context + (noisy if additive else 0)
        squares = (answer - (noise - latents)).square()
        mask = data.mask(entry.example)
        found.append(float((squares if mask is None else squares * mask).mean()))
    return found


@pytest.mark.parametrize("batch_size", [1, 3, 100])
def test_every_entry_is_measured_as_if_alone(tmp_path: Path, examples: list[Example], batch_size: int) -> None:
    panel, data = panel_of(examples), MadeUpData(masked=[examples[0].key, examples[5].key])
    result = evaluation(tmp_path, OneProcess(), panel, data, config={"batch_size": batch_size}).run(0)
    assert len(panel) == 7 * 2 * NUM_BANDS
    assert result.losses == pytest.approx(direct_losses(panel, 0.5, data), rel=2e-6)
    assert result.losses != direct_losses(panel, 0.5, MadeUpData()), "masks count"
    assert result.loss == pytest.approx(sum(result.losses) / len(panel), rel=1e-14)


def test_an_additive_output_is_measured_as_the_velocity_it_stands_for(tmp_path: Path, examples: list[Example]) -> None:
    panel = panel_of(examples)
    result = evaluation(tmp_path, OneProcess(), panel, prediction_type="additive").run(0)
    assert result.losses == pytest.approx(direct_losses(panel, 0.5, MadeUpData(), additive=True), rel=2e-6)


def test_what_is_fed_has_the_training_dtype(tmp_path: Path, examples: list[Example]) -> None:
    panel = panel_of(examples)
    result = evaluation(tmp_path, OneProcess(), panel, dtype=torch.bfloat16).run(0)
    expected = direct_losses(panel, 0.5, MadeUpData())
    assert result.losses == pytest.approx(expected, rel=0.02)
    assert result.losses != pytest.approx(expected, rel=1e-5)


def test_a_pass_has_several_batches_of_one_shape(tmp_path: Path, examples: list[Example]) -> None:
    pipeline = OneProcess()
    panel = panel_of(examples)
    evaluation(tmp_path, pipeline, panel).run(0)
    assert sum(shape[0] for shapes in pipeline.shapes for shape in shapes) == len(panel)
    assert all(len(set(shapes)) == 1 and len(shapes) <= 4 for shapes in pipeline.shapes)
    assert any(len(shapes) > 1 for shapes in pipeline.shapes)


def test_replicas_make_the_same_passes_and_share_the_entries(tmp_path: Path, examples: list[Example]) -> None:
    """Two replicas one after the other: together they have measured all, each entry once."""
    panel = panel_of(examples)
    pipelines, shares = [OneProcess(), OneProcess()], []
    for replica, pipeline in enumerate(pipelines):
        pipeline.replica = replica
        measuring = evaluation(tmp_path, pipeline, panel, num_replicas=2)
        shares.append({k: v for batches in measuring._rounds for k, v in measuring._measure_round(batches).items()})
    assert pipelines[0].shapes == pipelines[1].shapes
    assert not shares[0].keys() & shares[1].keys()
    alone = evaluation(tmp_path, OneProcess(), panel).run(0)
    both = {**shares[0], **shares[1]}
    assert tuple(both[index] for index in range(len(panel))) == alone.losses, "bitwise"


def test_the_average_is_measured_when_asked_but_not_before_there_is_one(tmp_path: Path, examples: list[Example]) -> None:
    pipeline, panel = OneProcess(), panel_of(examples)
    averaged = evaluation(tmp_path, pipeline, panel, config={"weights": "ema"})
    first, later = averaged.run(0), averaged.run(2)
    assert first.losses == pytest.approx(direct_losses(panel, 0.5, MadeUpData()), rel=2e-6)
    assert later.losses == pytest.approx(direct_losses(panel, 0.25, MadeUpData()), rel=2e-6)
    assert pipeline.weight == 0.5
    assert later.weights == "ema"


def test_an_error_that_is_no_number_stops_and_names_the_images(tmp_path: Path, examples: list[Example]) -> None:
    pipeline = OneProcess()
    measuring = evaluation(tmp_path, pipeline, panel_of(examples[:2]))
    pipeline.weight = float("inf")
    with pytest.raises(FloatingPointError, match=f"no number at {examples[0].key}, {examples[1].key}; nothing"):
        measuring.run(0)
    assert read_evaluations(tmp_path / EVALUATIONS) == []


@pytest.mark.parametrize(("every", "steps"), [(None, [0, 10]), (4, [0, 4, 8, 10])])
def test_due_at_the_start_now_and_then_and_at_the_end(
    tmp_path: Path, examples: list[Example], every: int | None, steps: list[int]
) -> None:
    measuring = evaluation(tmp_path, OneProcess(), panel_of(examples), config={"every_n_steps": every})
    assert measuring.due(0, 10)
    measuring.run(0)
    assert [step for step in range(11) if measuring.due(step, 10)] == steps


def test_a_run_that_goes_on_compares_as_if_it_had_never_stopped(
    tmp_path: Path, examples: list[Example], capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "straight").mkdir()
    (tmp_path / "resumed").mkdir()
    weights, panel = {0: 0.5, 2: 0.375, 4: 0.3125, 6: 0.34375}, panel_of(examples)

    def go(folder: Path, start_step: int, steps: Sequence[int]) -> None:
        pipeline = OneProcess()
        measuring = evaluation(folder, pipeline, panel, start_step=start_step)
        assert measuring.due(start_step + 1, 10) == (start_step == 0), "what comes first is measured"
        for step in steps:
            pipeline.weight = weights[step]
            measuring.run(step)
            assert not measuring.due(step + 1, 10)

    go(tmp_path / "straight", 0, [0, 2, 4, 6])
    told = capsys.readouterr().out
    go(tmp_path / "resumed", 0, [0, 2, 4])
    go(tmp_path / "resumed", 3, [4, 6])
    straight, resumed = ((tmp_path / name / EVALUATIONS).read_text() for name in ("straight", "resumed"))
    assert straight == resumed
    assert len(straight.splitlines()) == 4
    assert told.split("evaluation at step 6")[1] == capsys.readouterr().out.split("evaluation at step 6")[1]


def test_other_images_are_not_compared_with(
    tmp_path: Path, examples: list[Example], capsys: pytest.CaptureFixture[str]
) -> None:
    before = evaluation(tmp_path, OneProcess(), panel_of(examples))
    first = before.run(0)
    before.run(2)
    other = evaluation(tmp_path, OneProcess(), panel_of(examples[:6]), start_step=2)
    assert "2 evaluations in " in capsys.readouterr().out
    assert other.due(3, 10)
    baseline = other.run(3)
    assert not other.due(4, 10)
    later = other.run(4)
    assert baseline.groups[0].to_start is None and baseline.is_best
    assert later.groups[0].to_start is not None and later.groups[0].to_start.to_step == 3
    kept = read_evaluations(tmp_path / EVALUATIONS)
    assert [result.step for result in kept] == [0, 2, 3, 4]
    assert kept[0] == first
    assert len({result.panel for result in kept}) == 2
