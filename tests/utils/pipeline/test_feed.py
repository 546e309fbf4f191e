"""What the ends of the pipeline are fed: the same samples, whoever asks and however the batch is shared out."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from utils import rectified_flow
from utils.config.schema import ObjectiveConfig
from utils.data.batches import BatchOrder, Visit
from utils.data.buckets import Bucket, crop_box
from utils.data.dataset import Example
from utils.objective import NO_TARGET, LossTarget, Objective
from utils.pipeline.feed import EMPTY_CAPTION, Feed, Layout, MicroBatch, caption_of, is_flipped, noise_level, noise_of

SEED = 11
SHAPE = (16, 4, 4)
ALONE = Layout(micro_batch_size=2, num_micro_batches=4, num_replicas=1, replica=0, is_first_stage=True, is_last_stage=True)
EXAMPLES = [
    Example(f"0/{index}.png@32", Path(f"{index}.png"), f"caption {index}", crop_box(32, 32, Bucket(32, 32)), 1)
    for index in range(11)
]


class Data:
    """Latents and text made of the example's number."""

    def latents(self, example: Example, *, flipped: bool = False) -> Tensor:
        return torch.full(SHAPE, float(example.image.stem) * (-1 if flipped else 1))

    def mask(self, example: Example, *, flipped: bool = False) -> Tensor | None:
        if example.mask is None:
            return None
        mask = torch.linspace(0, 1, SHAPE[-1]).expand(1, *SHAPE[1:])
        return mask.flip(-1) if flipped else mask

    def text(self, caption: str) -> dict[str, Tensor]:
        number = torch.tensor([float(caption.removeprefix("caption ") or -1)])
        return {"clip_l.sequence": number, "clip_l.pooled": number, "t5xxl.sequence": number}


class Adapter:
    """Gives back what it is given."""

    def network_inputs(self, noisy: Tensor, sigma: Tensor, text: Mapping[str, Tensor]) -> tuple[Tensor, ...]:
        return noisy, sigma, *text.values()


def make_feed(layout: Layout = ALONE, *, seed: int = SEED, dtype: torch.dtype = torch.float32, **objective: Any) -> Feed:
    examples = objective.pop("examples", EXAMPLES)
    order = BatchOrder(examples, 8, seed)
    return Feed(Adapter(), Data(), order, make_objective(**objective), seed=seed, layout=layout, dtype=dtype)


def make_objective(**settings: Any) -> Objective:
    return Objective(ObjectiveConfig(**settings))


def sigma_of(visit: Visit, objective: Objective) -> float:
    return noise_level(visit, objective, SEED).sigma


def batches(layout: Layout = ALONE, step: int = 1, **changes: Any) -> list[MicroBatch]:
    return list(make_feed(layout, **changes).micro_batches(step))


def visits(step: int = 1) -> list[Visit]:
    return BatchOrder(EXAMPLES, 8, SEED).global_batch(step)


def joined(parts: list[MicroBatch]) -> list[Tensor]:
    """Inputs and the output to aim for of several micro-batches as one."""
    inputs = [torch.cat(tensors) for tensors in zip(*(inputs for inputs, _ in parts), strict=True)]
    return [*inputs, joined_target(parts).output]


def joined_target(parts: list[MicroBatch]) -> LossTarget:
    """The targets of several micro-batches as one, each with a whole mask."""
    targets = [LossTarget(*target) for _, target in parts]
    whole = [target._replace(mask=target.mask.expand(-1, -1, *SHAPE[1:])) for target in targets]
    return LossTarget(*(torch.cat(tensors) for tensors in zip(*whole, strict=True)))


def test_inputs_and_target_are_the_path_s() -> None:
    noisy, sigma, text, _, _, target = joined(batches(discrete_flow_shift=2.0))
    objective = make_objective(discrete_flow_shift=2.0)
    for row, visit in enumerate(visits()):
        latents = torch.full(SHAPE, float(visit.example.image.stem))
        noise = noise_of(visit, SHAPE, SEED)
        assert sigma[row] == torch.tensor(sigma_of(visit, objective))
        expected = rectified_flow.add_noise(latents[None], noise[None], sigma[row : row + 1])[0]
        assert torch.equal(noisy[row], expected)
        assert torch.equal(target[row], noise - latents)
        assert text[row] == float(visit.example.image.stem), "each picture with its own caption"


def test_first_and_last_stage_draw_the_same_noise_and_time() -> None:
    first = batches(replace(ALONE, is_last_stage=False))
    last = batches(replace(ALONE, is_first_stage=False))
    both = batches()
    for (inputs, nothing), (empty, aims), (all_inputs, all_aims) in zip(first, last, both, strict=True):
        assert nothing is NO_TARGET
        assert empty == ()
        target, all_target = aims[0], all_aims[0]
        assert all(torch.equal(one, other) for one, other in zip(inputs, all_inputs, strict=True))
        assert torch.equal(target, all_target)
        noisy, sigma, *_ = inputs
        shares = sigma[:, None, None, None]
        torch.testing.assert_close(noisy + (1 - shares) * target, noisy + (1 - shares) * (all_target))
        latents = noisy - shares * target  # x_t - sigma v
        torch.testing.assert_close(latents, latents[:, :1, :1, :1].round().expand_as(latents), rtol=0, atol=1e-4)


def test_a_stage_in_the_middle_is_fed_nothing() -> None:
    for inputs, target in batches(replace(ALONE, is_first_stage=False, is_last_stage=False)):
        assert inputs == ()
        assert all(part.numel() == 0 for part in target)


@pytest.mark.parametrize("num_replicas", [1, 2, 4])
@pytest.mark.parametrize("micro_batch_size", [1, 2])
def test_every_way_to_share_out_covers_the_same_global_batch(num_replicas: int, micro_batch_size: int) -> None:
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
    assert all(torch.equal(ours, wanted) for ours, wanted in zip(joined(rows), expected, strict=True))


@pytest.mark.parametrize(("num_replicas", "num_micro_batches", "size"), [(1, 4, 2), (2, 3, 2), (4, 2, 1), (3, 1, 5)])
def test_positions_of_all_ranks_are_every_position_once(num_replicas: int, num_micro_batches: int, size: int) -> None:
    layouts = [Layout(size, num_micro_batches, num_replicas, replica, True, True) for replica in range(num_replicas)]
    positions = [place for layout in layouts for index in range(num_micro_batches) for place in layout.positions(index)]
    assert sorted(positions) == list(range(layouts[0].global_batch))


def test_a_step_can_be_fed_again_in_any_order() -> None:
    feed = make_feed()
    first = joined(list(feed.micro_batches(5)))
    list(feed.micro_batches(0))
    assert all(torch.equal(a, b) for a, b in zip(joined(list(feed.micro_batches(5))), first, strict=True))


def test_a_new_epoch_and_a_repeat_draw_new_noise_and_time() -> None:
    visit, objective = Visit(EXAMPLES[0], 0, 0), make_objective()
    others = [replace(visit, epoch=1), replace(visit, occurrence=1), Visit(EXAMPLES[1], 0, 0)]
    for other in others:
        assert not torch.equal(noise_of(visit, SHAPE, SEED), noise_of(other, SHAPE, SEED))
        assert sigma_of(visit, objective) != sigma_of(other, objective)
    assert not torch.equal(noise_of(visit, SHAPE, SEED), noise_of(visit, SHAPE, SEED + 1))


def test_noise_tells_nothing_about_time() -> None:
    """Two draws of one visit come from two seeds."""
    objective = make_objective(weighting_scheme="none", discrete_flow_shift=1.0)
    drawn = [Visit(EXAMPLES[0], epoch, 0) for epoch in range(2000)]
    times = torch.tensor([sigma_of(visit, objective) for visit in drawn])
    firsts = torch.stack([noise_of(visit, (1,), SEED)[0] for visit in drawn])
    assert abs(float(torch.corrcoef(torch.stack([times, firsts]))[0, 1])) < 0.07


@pytest.mark.parametrize("sampling", ["sigma", "logit_normal"])
def test_time_follows_the_objective(sampling: str) -> None:
    objective = make_objective(timestep_sampling=sampling, weighting_scheme="none", discrete_flow_shift=3.0)
    drawn = torch.tensor([sigma_of(Visit(EXAMPLES[0], epoch, 0), objective) for epoch in range(3000)])
    assert ((drawn > 0) & (drawn < 1)).all()
    assert float(drawn.median()) == pytest.approx(0.75, abs=0.03)  # the shift of the middle
    assert float((drawn < 0.5).float().mean()) == pytest.approx({"sigma": 0.25, "logit_normal": 0.136}[sampling], abs=0.03)


def test_noise_is_mixed_in_float32_and_only_then_rounded() -> None:
    rounded, exact = batches(dtype=torch.bfloat16), batches()
    for (inputs, target), (wanted, exact_target) in zip(rounded, exact, strict=True):
        assert inputs[0].dtype == torch.bfloat16
        assert torch.equal(inputs[0], wanted[0].to(torch.bfloat16))
        assert torch.equal(inputs[1], wanted[1])
        assert target[0].dtype == torch.float32
        assert torch.equal(target[0], exact_target[0])


@pytest.mark.parametrize("rate", [0.0, 0.1, 1.0])
def test_captions_are_dropped_at_their_rate_and_per_visit(rate: float) -> None:
    objective = make_objective(caption_dropout_rate=rate)
    captions = Counter(caption_of(Visit(EXAMPLES[3], epoch, 0), objective, SEED) for epoch in range(3000))
    assert captions[EMPTY_CAPTION] / 3000 == pytest.approx(rate, abs=0.02)
    assert captions["caption 3"] == 3000 - captions[EMPTY_CAPTION]


def test_a_dropped_caption_is_fed_as_the_empty_one() -> None:
    dropped, kept = joined(batches(caption_dropout_rate=1.0)), joined(batches())
    assert (dropped[2] == -1).all()
    assert torch.equal(dropped[0], kept[0]), "noise and time stay what they are"
    assert torch.equal(dropped[1], kept[1])


def test_encoders_are_dropped_each_for_itself_sequence_and_pooled_together() -> None:
    rates = {"clip_l": 0.5, "t5xxl": 0.25}
    examples = EXAMPLES[1:]  # the first one's text is zero by itself
    fed = [joined(batches(step=step, encoder_dropout_rate=rates, examples=examples)) for step in range(200)]
    clip, pooled, t5 = (torch.cat([parts[index] for parts in fed]).flatten() == 0 for index in (2, 3, 4))
    assert torch.equal(clip, pooled)
    assert float(clip.float().mean()) == pytest.approx(0.5, abs=0.05)
    assert float(t5.float().mean()) == pytest.approx(0.25, abs=0.05)
    assert float((clip & t5).float().mean()) == pytest.approx(0.125, abs=0.04), "independently of each other"


def test_one_rate_is_for_every_encoder_and_none_of_it_changes_noise_or_time() -> None:
    dropped, kept = joined(batches(encoder_dropout_rate=1.0)), joined(batches())
    assert not any(part.any() for part in dropped[2:5])
    assert all(part.any() for part in kept[2:5])
    assert all(torch.equal(dropped[index], kept[index]) for index in (0, 1, 5))


def test_a_directory_s_weight_and_the_time_s_multiply() -> None:
    examples = [replace(example, loss_weight=1.0 + int(example.image.stem)) for example in EXAMPLES]
    settings: dict[str, Any] = {"weighting_scheme": "cosmap", "weighting_by": "loss"}
    weight = joined_target(batches(examples=examples, **settings)).weight
    plain = joined_target(batches(**settings)).weight
    factors = torch.tensor([1.0 + int(visit.example.image.stem) for visit in visits()])
    torch.testing.assert_close(weight, plain * factors)
    assert len(set(plain.tolist())) == len(plain)


def test_masks_ride_with_their_pictures_and_the_rest_counts_whole() -> None:
    examples = [replace(ex, mask=ex.image) if int(ex.image.stem) % 2 else ex for ex in EXAMPLES]
    masks = joined_target(batches(examples=examples)).mask
    for mask, visit in zip(masks, visits(), strict=True):
        wanted = Data().mask(replace(visit.example, mask=visit.example.image if int(visit.example.image.stem) % 2 else None))
        assert torch.equal(mask, torch.ones(1, *SHAPE[1:]) if wanted is None else wanted)
    assert all(LossTarget(*target).mask.shape == (2, 1, 1, 1) for _, target in batches()), "a factor of one without masks"


def test_a_flip_takes_picture_and_mask_alike_at_half_of_the_visits() -> None:
    examples = [replace(example, may_flip=True, mask=example.image) for example in EXAMPLES[1:]]
    order = BatchOrder(examples, 8, SEED)
    flips = []
    for step in range(100):
        parts = batches(step=step, examples=examples, discrete_flow_shift=0.01)  # next to no noise
        noisy, target = joined(parts)[0], joined_target(parts)
        for row, visit in enumerate(order.global_batch(step)):
            flipped = is_flipped(visit, SEED)
            flips.append(flipped)
            assert (float(noisy[row].mean()) < 0) == flipped
            assert (float(target.mask[row, 0, 0, 0]) == 1.0) == flipped
    assert sum(flips) / len(flips) == pytest.approx(0.5, abs=0.06)
    assert not any(is_flipped(Visit(EXAMPLES[0], epoch, 0), SEED) for epoch in range(20)), "only where it was asked for"
