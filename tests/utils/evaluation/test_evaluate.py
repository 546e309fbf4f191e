"""utils/evaluation/evaluate.py: losses of a small network on one process, and what is stored, skipped and compared."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from models.family import LatentSpec
from models.streams import Sample, SampleShape
from tests.utils.evaluation.measurements import NUM_BINS, SEED, points_of
from tests.utils.objective.sd3_objective import sd3_objective
from utils import randomness
from utils.config.schema.evaluation import EvalConfig
from utils.data.examples import Example
from utils.evaluation.evaluate import Evaluation
from utils.evaluation.points import EvaluationPoint, noise_of
from utils.evaluation.results import EVALUATIONS, read_evaluations

CHANNELS = 4


class SmallFamily:
    """The family of a network of (noisy latents, sigma, text) whose output (B, C, H W) is flat, like a transformer's."""

    latent = LatentSpec(channels=CHANNELS, downscale=8, patch=2, max_side_pixels=512)

    def sample_shape(self, batch: int, height: int, width: int) -> SampleShape:
        return SampleShape(batch, height, width, num_text_tokens=0)

    def sample(self, noisy_latents: Tensor, sigma: Tensor, text: Mapping[str, Tensor]) -> Sample:
        tensors = {"noisy": noisy_latents, "sigma": sigma, "context": text["encoder.context"]}
        batch, _, height, width = noisy_latents.shape
        return Sample(tensors, self.sample_shape(batch, height, width))

    def velocity(self, output: Tensor, shape: SampleShape) -> Tensor:
        return output.unflatten(-1, (shape.height, shape.width))


class RandomData:
    """Latents, masks and text that are random functions of the names."""

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
    """Returns (B, C, H W), which depends on every input."""
    return (weight * noisy + sigma[:, None, None, None] + context.mean(1)[:, None, None, None]).flatten(2)


class OneProcess:
    """The methods of `Pipeline` that evaluation uses, on one process."""

    stage, num_stages, replica = 0, 1, 0

    def __init__(self) -> None:
        self.weight, self.average = 0.5, 0.25
        self.shapes: list[list[tuple[int, ...]]] = []

    def predict(self, shapes: Sequence[SampleShape], samples: Sequence[Sample]) -> list[Tensor]:
        assert [sample.shape for sample in samples] == list(shapes)
        self.shapes.append([tuple(sample.tensors["noisy"].shape) for sample in samples])
        return [network(self.weight, **sample.tensors) for sample in samples]

    @contextlib.contextmanager
    def evaluated_weights(self, *, ema: bool) -> Iterator[None]:
        before, self.weight = self.weight, self.average if ema else self.weight
        yield
        self.weight = before


@pytest.fixture(autouse=True)
def one_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Replaces the process group by one process."""
    monkeypatch.setattr("utils.evaluation.evaluate.group.broadcast", lambda value: value)
    monkeypatch.setattr("utils.evaluation.evaluate.group.gather", lambda value: [value])


def evaluation(
    folder: Path, pipeline: OneProcess, points: Sequence[EvaluationPoint], data: RandomData | None = None, **changes: Any
) -> Evaluation:
    keywords = {"dtype": torch.float32, "seed": SEED, "num_replicas": 1, "start_step": 0}
    config = EvalConfig.model_validate({"holdout_images": 7, "batch_size": 3, **changes.pop("config", {})})
    random_data: Any = data or RandomData()
    family: Any = SmallFamily()
    stage: Any = pipeline
    objective = sd3_objective(**changes.pop("objective", {}))
    return Evaluation(family, random_data, stage, objective, config, points, folder=folder, **{**keywords, **changes})


def direct_losses(points: Sequence[EvaluationPoint], weight: float, data: RandomData, additive: bool = False) -> list[float]:
    """Returns the loss of each point, computed alone and in float64."""
    found = []
    for point in points:
        latents = data.latents(point.example).double()
        noise = noise_of(point, tuple(latents.shape), SEED).double()
        noisy = (1 - point.sigma) * latents + point.sigma * noise
        context = data.text(point.example.caption())["encoder.context"].double().mean()
        velocity = weight * noisy + point.sigma + context + (noisy if additive else 0)
        squares = (velocity - (noise - latents)).square()
        mask = data.mask(point.example)
        found.append(float((squares if mask is None else squares * mask).mean()))
    return found


@pytest.mark.parametrize("batch_size", [1, 3, 100])
def test_losses_do_not_depend_on_the_batches(tmp_path: Path, examples: list[Example], batch_size: int) -> None:
    points, data = points_of(examples), RandomData(masked=[examples[0].key, examples[5].key])
    result = evaluation(tmp_path, OneProcess(), points, data, config={"batch_size": batch_size}).run(0)
    assert len(points) == 7 * 2 * NUM_BINS
    assert result.losses == pytest.approx(direct_losses(points, 0.5, data), rel=2e-6)
    assert result.losses != direct_losses(points, 0.5, RandomData()), "masks are applied"
    assert result.loss == pytest.approx(sum(result.losses) / len(points), rel=1e-14)


def test_an_additive_output_is_converted_to_a_velocity(tmp_path: Path, examples: list[Example]) -> None:
    points = points_of(examples)
    result = evaluation(tmp_path, OneProcess(), points, objective={"model_prediction_type": "additive"}).run(0)
    assert result.losses == pytest.approx(direct_losses(points, 0.5, RandomData(), additive=True), rel=2e-6)


def test_network_inputs_have_the_training_dtype(tmp_path: Path, examples: list[Example]) -> None:
    points = points_of(examples)
    result = evaluation(tmp_path, OneProcess(), points, dtype=torch.bfloat16).run(0)
    expected = direct_losses(points, 0.5, RandomData())
    assert result.losses == pytest.approx(expected, rel=0.02)
    assert result.losses != pytest.approx(expected, rel=1e-5)


def test_a_forward_pass_has_several_batches_of_one_shape(tmp_path: Path, examples: list[Example]) -> None:
    pipeline = OneProcess()
    points = points_of(examples)
    evaluation(tmp_path, pipeline, points).run(0)
    assert sum(shape[0] for shapes in pipeline.shapes for shape in shapes) == len(points)
    assert all(len(set(shapes)) == 1 and len(shapes) <= 4 for shapes in pipeline.shapes)
    assert any(len(shapes) > 1 for shapes in pipeline.shapes)


def test_replicas_make_the_same_passes_and_divide_the_points(tmp_path: Path, examples: list[Example]) -> None:
    """The two replicas run one after the other; together they measure each point once."""
    points = points_of(examples)
    pipelines, parts = [OneProcess(), OneProcess()], []
    for replica, pipeline in enumerate(pipelines):
        pipeline.replica = replica
        measuring = evaluation(tmp_path, pipeline, points, num_replicas=2)
        parts.append({k: v for batches in measuring._rounds for k, v in measuring._measure_round(batches).items()})
    assert pipelines[0].shapes == pipelines[1].shapes
    assert not parts[0].keys() & parts[1].keys()
    single = evaluation(tmp_path, OneProcess(), points).run(0)
    both = {**parts[0], **parts[1]}
    assert tuple(both[index] for index in range(len(points))) == single.losses, "bitwise"


def test_averaged_weights_are_evaluated_if_configured_but_not_at_step_0(tmp_path: Path, examples: list[Example]) -> None:
    pipeline, points = OneProcess(), points_of(examples)
    averaged = evaluation(tmp_path, pipeline, points, config={"weights": "ema"})
    first, later = averaged.run(0), averaged.run(2)
    assert first.losses == pytest.approx(direct_losses(points, 0.5, RandomData()), rel=2e-6)
    assert later.losses == pytest.approx(direct_losses(points, 0.25, RandomData()), rel=2e-6)
    assert pipeline.weight == 0.5
    assert later.weights == "ema"


def test_a_non_finite_loss_stops_the_evaluation_and_names_the_images(tmp_path: Path, examples: list[Example]) -> None:
    pipeline = OneProcess()
    measuring = evaluation(tmp_path, pipeline, points_of(examples[:2]))
    pipeline.weight = float("inf")
    with pytest.raises(
        FloatingPointError, match=f"NaN or infinite at {examples[0].key}, {examples[1].key}; the evaluation was not"
    ):
        measuring.run(0)
    assert read_evaluations(tmp_path / EVALUATIONS) == []


def test_a_resumed_run_compares_as_an_uninterrupted_one(
    tmp_path: Path, examples: list[Example], capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "straight").mkdir()
    (tmp_path / "resumed").mkdir()
    weights, points = {0: 0.5, 2: 0.375, 4: 0.3125, 6: 0.34375}, points_of(examples)

    def run(folder: Path, start_step: int, steps: Sequence[int]) -> None:
        pipeline = OneProcess()
        measuring = evaluation(folder, pipeline, points, start_step=start_step)
        assert measuring.has_results == (start_step > 0), "the first evaluation is due in any case"
        for step in steps:
            pipeline.weight = weights[step]
            measuring.run(step)
            assert measuring.has_results

    run(tmp_path / "straight", 0, [0, 2, 4, 6])
    printed = capsys.readouterr().out
    run(tmp_path / "resumed", 0, [0, 2, 4])
    run(tmp_path / "resumed", 3, [4, 6])
    straight, resumed = ((tmp_path / name / EVALUATIONS).read_text() for name in ("straight", "resumed"))
    assert straight == resumed
    assert len(straight.splitlines()) == 4
    assert printed.split("evaluation at step 6")[1] == capsys.readouterr().out.split("evaluation at step 6")[1]


def test_evaluations_of_other_images_are_not_compared(
    tmp_path: Path, examples: list[Example], capsys: pytest.CaptureFixture[str]
) -> None:
    before = evaluation(tmp_path, OneProcess(), points_of(examples))
    first = before.run(0)
    before.run(2)
    other = evaluation(tmp_path, OneProcess(), points_of(examples[:6]), start_step=2)
    assert "2 evaluations in " in capsys.readouterr().out
    assert not other.has_results
    baseline = other.run(3)
    assert other.has_results
    later = other.run(4)
    assert baseline.groups[0].to_start is None and baseline.is_best
    assert later.groups[0].to_start is not None and later.groups[0].to_start.to_step == 3
    kept = read_evaluations(tmp_path / EVALUATIONS)
    assert [result.step for result in kept] == [0, 2, 3, 4]
    assert kept[0] == first
    assert len({result.fingerprint for result in kept}) == 2
