"""What the two ends of the pipeline are fed: the same samples on every rank and in every layout."""

from __future__ import annotations

import threading
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.utils.data.tables import table_of
from tests.utils.pipeline.feeding import (
    ALONE,
    IMAGES,
    SEED,
    SHAPE,
    Data,
    Posterior,
    assert_same,
    batches,
    draws,
    inputs_of,
    joined,
    joined_inputs,
    make_feed,
    make_objective,
    number_of,
    sigma_of,
)
from utils.data.buckets import Bucket
from utils.data.examples import Example
from utils.objective import rectified_flow
from utils.objective.loss import NO_TARGET
from utils.pipeline.feed import (
    MICRO_BATCHES_AHEAD,
    Layout,
    noise_of,
)


def test_inputs_and_target_are_those_of_the_rectified_flow() -> None:
    noisy, sigma, text, _, _, target = joined(batches(discrete_flow_shift=2.0))
    objective = make_objective(discrete_flow_shift=2.0)
    for row, draw in enumerate(draws()):
        latents = torch.full(SHAPE, float(number_of(draw.example)))
        noise = noise_of(draw, SHAPE, SEED)
        assert sigma[row] == torch.tensor(sigma_of(draw, objective))
        expected = rectified_flow.add_noise(latents[None], noise[None], sigma[row : row + 1])[0]
        assert torch.equal(noisy[row], expected)
        assert torch.equal(target[row], noise - latents)
        assert text[row] == float(number_of(draw.example)), "each image with its own caption"


def test_first_and_last_stage_draw_the_same_noise_and_time() -> None:
    first = batches(replace(ALONE, is_last_stage=False))
    last = batches(replace(ALONE, is_first_stage=False))
    both = batches()
    for of_first, of_last, of_both in zip(first, last, both, strict=True):
        assert of_first.target is NO_TARGET
        assert of_last.sample is None
        target = of_last.target[0]
        inputs = inputs_of(of_first)
        assert all(torch.equal(one, other) for one, other in zip(inputs, inputs_of(of_both), strict=True))
        assert torch.equal(target, of_both.target[0])
        noisy, sigma, *_ = inputs
        latents = noisy - sigma[:, None, None, None] * target  # x_t - sigma v
        torch.testing.assert_close(latents, latents[:, :1, :1, :1].round().expand_as(latents), rtol=0, atol=1e-4)


def test_a_stage_in_the_middle_is_fed_nothing() -> None:
    for micro_batch in batches(replace(ALONE, is_first_stage=False, is_last_stage=False)):
        assert micro_batch.sample is None
        assert all(part.numel() == 0 for part in micro_batch.target)


class Sized(Data):
    """Latents of the size of the bucket, computed from the example's number."""

    def latents(self, example: Example, *, flipped: bool = False) -> Tensor:
        size = (SHAPE[0], example.bucket.height // 8, example.bucket.width // 8)
        return torch.full(size, float(number_of(example)))


TWO_SIZES = [replace(one, bucket=(Bucket(32, 32), Bucket(64, 32))[index % 2]) for index, one in enumerate(IMAGES)]


@pytest.mark.parametrize("is_first_stage", [True, False])
@pytest.mark.parametrize("bucket_group", [2, 4, 8])
def test_every_stage_knows_the_shapes_of_the_samples(is_first_stage: bool, bucket_group: int) -> None:
    settings: dict[str, Any] = {"examples": table_of(TWO_SIZES), "data": Sized(), "bucket_group": bucket_group}
    other = make_feed(replace(ALONE, is_first_stage=is_first_stage, is_last_stage=False), **settings)
    seen = set()
    for step in range(6):
        samples = [micro_batch.sample for micro_batch in batches(step=step, **settings)]
        assert other.shapes(step) == [sample.shape for sample in samples if sample is not None]
        seen.update(other.shapes(step))
    assert len(seen) == 2


def test_shapes_can_be_read_while_another_thread_prepares_micro_batches_of_the_next_epoch() -> None:
    feed, expected = make_feed(), [make_feed().shapes(step) for step in range(20)]
    with feed.steps(range(20)) as everything:
        for step, micro_batches in enumerate(everything):
            assert feed.shapes(step) == expected[step]
            assert_same(list(micro_batches), batches(step=step))


@pytest.mark.parametrize("num_replicas", [1, 2, 4])
@pytest.mark.parametrize("micro_batch_size", [1, 2])
def test_every_layout_covers_the_same_global_batch(num_replicas: int, micro_batch_size: int) -> None:
    expected = joined(batches())
    layout = Layout(
        micro_batch_size=micro_batch_size,
        num_micro_batches=8 // (micro_batch_size * num_replicas),
        num_replicas=num_replicas,
        replica=0,
        is_first_stage=True,
        is_last_stage=True,
    )
    assert layout.global_batch == 8
    replicas = [batches(replace(layout, replica=replica)) for replica in range(num_replicas)]
    rows = [part for micro_batch in zip(*replicas, strict=True) for part in micro_batch]
    assert all(torch.equal(one, other) for one, other in zip(joined(rows), expected, strict=True))


@pytest.mark.parametrize(
    ("num_replicas", "size", "bucket_group"),
    [(1, 1, 4), (1, 4, 4), (2, 1, 4), (2, 2, 4), (4, 1, 4), (1, 2, 8), (2, 4, 8), (4, 2, 8)],
)
def test_layouts_with_equal_groups_have_the_same_steps(num_replicas: int, size: int, bucket_group: int) -> None:
    """Images of two sizes in a step, the larger first; the micro-batches of all replicas have the same shape."""
    settings: dict[str, Any] = {"examples": table_of(TWO_SIZES), "data": Sized(), "bucket_group": bucket_group}
    layout = Layout(size, 16 // (size * num_replicas), num_replicas, 0, is_first_stage=True, is_last_stage=True)
    places = [replace(layout, replica=replica) for replica in range(num_replicas)]
    feeds = [make_feed(place, **settings) for place in places]
    alone = make_feed(replace(layout, micro_batch_size=1, num_micro_batches=16, num_replicas=1), **settings)
    mixed = 0
    for step in range(4):
        parts = [part for row in zip(*(feed.micro_batches(step) for feed in feeds), strict=True) for part in row]
        rows = [row for part in parts for row in zip(*inputs_of(part), part.target[0], strict=True)]
        expected = [(*inputs_of(part), part.target[0]) for part in alone.micro_batches(step)]
        assert len(rows) == len(expected) == 16
        for one, other in zip(rows, expected, strict=True):
            assert all(torch.equal(value, alike[0]) for value, alike in zip(one, other, strict=True))
        shapes = [feed.shapes(step) for feed in feeds]
        assert all(of_replica == shapes[0] for of_replica in shapes)
        areas = [shape.height * shape.width for shape in shapes[0]]
        assert areas == sorted(areas, reverse=True)
        mixed += len(set(areas)) > 1
    assert mixed, "a step has both sizes"


@pytest.mark.parametrize(("num_replicas", "num_micro_batches", "size"), [(1, 4, 2), (2, 3, 2), (4, 2, 1), (3, 1, 5)])
def test_positions_of_all_ranks_are_every_position_once(num_replicas: int, num_micro_batches: int, size: int) -> None:
    layouts = [Layout(size, num_micro_batches, num_replicas, replica, True, True) for replica in range(num_replicas)]
    positions = [place for layout in layouts for index in range(num_micro_batches) for place in layout.positions(index)]
    assert sorted(positions) == list(range(layouts[0].global_batch))


def test_steps_can_be_fed_repeatedly_and_in_any_order() -> None:
    feed = make_feed()
    first = joined(list(feed.micro_batches(5)))
    list(feed.micro_batches(0))
    assert all(torch.equal(a, b) for a, b in zip(joined(list(feed.micro_batches(5))), first, strict=True))


def test_noise_is_added_in_float32_before_rounding() -> None:
    rounded, exact = batches(dtype=torch.bfloat16), batches()
    for one, other in zip(rounded, exact, strict=True):
        (noisy, sigma, *_), (exact_noisy, exact_sigma, *_) = inputs_of(one), inputs_of(other)
        assert noisy.dtype == torch.bfloat16
        assert torch.equal(noisy, exact_noisy.to(torch.bfloat16))
        assert torch.equal(sigma, exact_sigma)
        assert one.target[0].dtype == torch.float32
        assert torch.equal(one.target[0], other.target[0])


# --- ahead of the network ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("is_first_stage", [True, False])
@pytest.mark.parametrize("is_last_stage", [True, False])
def test_steps_yields_the_micro_batches_of_each_step(is_first_stage: bool, is_last_stage: bool) -> None:
    layout = replace(ALONE, is_first_stage=is_first_stage, is_last_stage=is_last_stage)
    steps = range(3, 9)  # across the end of an epoch
    with make_feed(layout, data=Posterior()).steps(steps) as everything:
        for step, micro_batches in zip(steps, everything, strict=True):
            assert_same(list(micro_batches), batches(layout, step, data=Posterior()))


@pytest.mark.parametrize("num_used", [0, 1, 3])
def test_unused_micro_batches_of_a_step_are_not_fed_in_the_next(num_used: int) -> None:
    with make_feed().steps(range(5)) as everything:
        for step, micro_batches in enumerate(everything):
            used = [next(micro_batches) for _ in range(num_used)]
            assert_same(used, batches(step=step)[:num_used])


def test_a_step_yields_its_own_micro_batches_only() -> None:
    with make_feed().steps(range(2)) as everything:
        assert [len(list(micro_batches)) for micro_batches in everything] == [ALONE.num_micro_batches] * 2


def test_micro_batches_are_prepared_a_few_ahead_in_another_thread() -> None:
    makers: list[threading.Thread] = []
    enough = threading.Event()

    class Watched(Data):
        def text(self, caption: str) -> dict[str, Tensor]:
            makers.append(threading.current_thread())
            if len(makers) >= ALONE.micro_batch_size * (MICRO_BATCHES_AHEAD + 1):
                enough.set()
            return super().text(caption)

    with make_feed(data=Watched()).steps(range(50)) as everything:
        next(next(everything))
        assert enough.wait(10.0)
        assert len(makers) <= ALONE.micro_batch_size * (MICRO_BATCHES_AHEAD + 2)
    assert threading.current_thread() not in makers
    makers[0].join(10.0)
    assert not makers[0].is_alive(), "leaving ends the thread, although steps remain"


def test_an_error_while_preparing_a_step_is_raised_in_that_step() -> None:
    caption = f"caption {int(joined_inputs(batches(step=2)[1:2])[2][0])}"

    class Broken(Data):
        num_read = 0

        def text(self, wanted: str) -> dict[str, Tensor]:
            self.num_read += 1
            if self.num_read > 8 * 2 + ALONE.micro_batch_size:  # the second micro-batch of step 2
                raise KeyError(wanted)
            return super().text(wanted)

    with make_feed(data=Broken()).steps(range(5)) as everything:
        for _ in range(2):
            assert len(list(next(everything))) == ALONE.num_micro_batches
        last = next(everything)
        next(last)
        with pytest.raises(KeyError, match=caption):
            next(last)
