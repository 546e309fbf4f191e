"""What the ends of the pipeline are fed: the same samples, whoever asks and however the batch is shared out."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.utils.data.tables import DIRECTORY, Shown, table_of
from utils import randomness
from utils.config.schema.objective import ObjectiveConfig
from utils.data.batches import BatchOrder, SampleDraw
from utils.data.examples import Example
from utils.data.sources.tags import TagShuffle
from utils.objective import rectified_flow
from utils.objective.objective import NO_TARGET, LossTarget, Objective
from utils.pipeline.feed import (
    EMPTY_CAPTION,
    MICRO_BATCHES_AHEAD,
    Feed,
    Layout,
    MicroBatch,
    caption_of,
    is_flipped,
    latents_of,
    noise_level,
    noise_of,
)

SEED = 11
SHAPE = (16, 4, 4)
ALONE = Layout(micro_batch_size=2, num_micro_batches=4, num_replicas=1, replica=0, is_first_stage=True, is_last_stage=True)
IMAGES = [Shown(f"{index}.png", (f"caption {index}",), size=(32, 32)) for index in range(11)]
EXAMPLES = table_of(IMAGES)


def number_of(example: Example) -> int:
    return int(example.image.path.stem)


class Data:
    """Latents and text made of the example's number."""

    def latents(self, example: Example, *, flipped: bool = False) -> Tensor:
        return torch.full(SHAPE, float(number_of(example)) * (-1 if flipped else 1))

    def std(self, example: Example, *, flipped: bool = False) -> Tensor | None:
        return None

    def mask(self, example: Example, *, flipped: bool = False) -> Tensor | None:
        if example.mask is None:
            return None
        mask = torch.linspace(0, 1, SHAPE[-1]).expand(1, *SHAPE[1:])
        return mask.flip(-1) if flipped else mask

    def text(self, caption: str) -> dict[str, Tensor]:
        number = torch.tensor([float(caption.removeprefix("caption ") or -1)])
        return {"clip_l.sequence": number, "clip_l.pooled": number, "t5xxl.sequence": number}


class Posterior(Data):
    """Has standard deviations too; from left to right they grow, or fall in the flipped image."""

    def std(self, example: Example, *, flipped: bool = False) -> Tensor | None:
        std = torch.linspace(0, 1, SHAPE[-1]).expand(SHAPE)
        return std.flip(-1) if flipped else std


MEANS: Any = Data()
POSTERIOR: Any = Posterior()


class Adapter:
    """Gives back what it is given."""

    def network_inputs(self, noisy: Tensor, sigma: Tensor, text: Mapping[str, Tensor]) -> tuple[Tensor, ...]:
        return noisy, sigma, *text.values()


ADAPTER: Any = Adapter()


def make_feed(layout: Layout = ALONE, *, seed: int = SEED, dtype: torch.dtype = torch.float32, **objective: Any) -> Feed:
    examples = objective.pop("examples", EXAMPLES)
    data = objective.pop("data", Data())
    order = BatchOrder(examples, 8, seed)
    return Feed(ADAPTER, data, order, make_objective(**objective), seed=seed, layout=layout, dtype=dtype)


def make_objective(**settings: Any) -> Objective:
    return Objective(ObjectiveConfig(**settings))


def sigma_of(draw: SampleDraw, objective: Objective) -> float:
    return noise_level(draw, objective, SEED).sigma


def batches(layout: Layout = ALONE, step: int = 1, **changes: Any) -> list[MicroBatch]:
    return list(make_feed(layout, **changes).micro_batches(step))


def draws(step: int = 1) -> list[SampleDraw]:
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
    draw, objective = SampleDraw(EXAMPLES[0], 0, 0), make_objective()
    others = [replace(draw, epoch=1), replace(draw, occurrence=1), SampleDraw(EXAMPLES[1], 0, 0)]
    for other in others:
        assert not torch.equal(noise_of(draw, SHAPE, SEED), noise_of(other, SHAPE, SEED))
        assert sigma_of(draw, objective) != sigma_of(other, objective)
    assert not torch.equal(noise_of(draw, SHAPE, SEED), noise_of(draw, SHAPE, SEED + 1))


def test_noise_tells_nothing_about_time() -> None:
    """Two draws of one draw come from two seeds."""
    objective = make_objective(weighting_scheme="none", discrete_flow_shift=1.0)
    drawn = [SampleDraw(EXAMPLES[0], epoch, 0) for epoch in range(2000)]
    times = torch.tensor([sigma_of(draw, objective) for draw in drawn])
    firsts = torch.stack([noise_of(draw, (1,), SEED)[0] for draw in drawn])
    assert abs(float(torch.corrcoef(torch.stack([times, firsts]))[0, 1])) < 0.07


@pytest.mark.parametrize("sampling", ["sigma", "logit_normal"])
def test_time_follows_the_objective(sampling: str) -> None:
    objective = make_objective(timestep_sampling=sampling, weighting_scheme="none", discrete_flow_shift=3.0)
    drawn = torch.tensor([sigma_of(SampleDraw(EXAMPLES[0], epoch, 0), objective) for epoch in range(3000)])
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
def test_captions_are_dropped_at_their_rate_and_per_draw(rate: float) -> None:
    objective = make_objective(caption_dropout_rate=rate)
    captions = Counter(caption_of(SampleDraw(EXAMPLES[3], epoch, 0), objective, SEED) for epoch in range(3000))
    assert captions[EMPTY_CAPTION] / 3000 == pytest.approx(rate, abs=0.02)
    assert captions["caption 3"] == 3000 - captions[EMPTY_CAPTION]


def test_a_dropped_caption_is_fed_as_the_empty_one() -> None:
    dropped, kept = joined(batches(caption_dropout_rate=1.0)), joined(batches())
    assert (dropped[2] == -1).all()
    assert torch.equal(dropped[0], kept[0]), "noise and time stay what they are"
    assert torch.equal(dropped[1], kept[1])


def test_encoders_are_dropped_each_for_itself_sequence_and_pooled_together() -> None:
    rates = {"clip_l": 0.5, "t5xxl": 0.25}
    examples = table_of(IMAGES[1:])  # the first one's text is zero by itself
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
    directories = [replace(DIRECTORY, loss_weight=1.0 + number) for number in range(len(IMAGES))]
    examples = table_of([replace(one, directory=own) for one, own in zip(IMAGES, directories, strict=True)])
    settings: dict[str, Any] = {"weighting_scheme": "cosmap", "weighting_by": "loss"}
    weight = joined_target(batches(examples=examples, **settings)).weight
    plain = joined_target(batches(**settings)).weight
    factors = torch.tensor([1.0 + number_of(draw.example) for draw in draws()])
    torch.testing.assert_close(weight, plain * factors)
    assert len(set(plain.tolist())) == len(plain)


def test_masks_ride_with_their_images_and_the_rest_counts_whole() -> None:
    images = [replace(one, mask=one.name if number % 2 else None) for number, one in enumerate(IMAGES)]
    masks = joined_target(batches(examples=table_of(images))).mask
    for mask, draw in zip(masks, draws(), strict=True):
        is_masked = number_of(draw.example) % 2
        wanted = Data().mask(replace(draw.example, mask=draw.example.image if is_masked else None))
        assert torch.equal(mask, torch.ones(1, *SHAPE[1:]) if wanted is None else wanted)
    assert all(LossTarget(*target).mask.shape == (2, 1, 1, 1) for _, target in batches()), "a factor of one without masks"


def test_a_flip_takes_image_and_mask_alike_at_half_of_the_draws() -> None:
    directory = replace(DIRECTORY, may_flip=True)
    examples = table_of([replace(one, mask=one.name, directory=directory) for one in IMAGES[1:]])
    order = BatchOrder(examples, 8, SEED)
    flips = []
    for step in range(100):
        parts = batches(step=step, examples=examples, discrete_flow_shift=0.01)  # next to no noise
        noisy, target = joined(parts)[0], joined_target(parts)
        for row, draw in enumerate(order.global_batch(step)):
            flipped = is_flipped(draw, SEED)
            flips.append(flipped)
            assert (float(noisy[row].mean()) < 0) == flipped
            assert (float(target.mask[row, 0, 0, 0]) == 1.0) == flipped
    assert sum(flips) / len(flips) == pytest.approx(0.5, abs=0.06)
    assert not any(is_flipped(SampleDraw(EXAMPLES[0], epoch, 0), SEED) for epoch in range(20)), "only where it was asked for"


# --- several captions --------------------------------------------------------------------------------------------------


def captions_drawn(example: Example, seed: int = SEED, **objective: Any) -> list[str]:
    """Of many draws."""
    settings = make_objective(**objective)
    return [caption_of(SampleDraw(example, epoch, 0), settings, seed) for epoch in range(3000)]


def test_captions_of_several_lines_are_drawn_evenly() -> None:
    example = replace(EXAMPLES[0], captions=("caption 1", "caption 2", "caption 3"))
    counts = Counter(captions_drawn(example))
    assert counts.keys() == set(example.captions)
    assert all(abs(count / 3000 - 1 / 3) < 0.03 for count in counts.values())


def test_which_caption_is_drawn_is_a_function_of_seed_and_draw() -> None:
    example = replace(EXAMPLES[0], captions=("caption 1", "caption 2"))
    drawn = captions_drawn(example)
    assert captions_drawn(example) == drawn
    others = [captions_drawn(example, SEED + 1), captions_drawn(replace(example, key="0/other.png@32"))]
    others.append([caption_of(SampleDraw(example, epoch, 1), make_objective(), SEED) for epoch in range(3000)])
    for other in others:
        agreeing = sum(one == two for one, two in zip(drawn, other, strict=True)) / 3000
        assert agreeing == pytest.approx(0.5, abs=0.04)


def test_every_order_of_tags_is_drawn() -> None:
    shuffle = TagShuffle(4, ", ", 0)
    example = replace(EXAMPLES[0], captions=("a, b, c, d, e, f, g", "h, i, j, k, l, m, n"), shuffle=shuffle)
    counts = Counter(captions_drawn(example))
    assert counts.keys() == {example.caption(number) for number in range(8)}
    assert len(counts) == 8
    assert all(abs(count / 3000 - 1 / 8) < 0.025 for count in counts.values())


def test_several_captions_are_dropped_like_one() -> None:
    example = replace(EXAMPLES[0], captions=("caption 1", "caption 2"))
    dropped, kept = captions_drawn(example, caption_dropout_rate=0.3), captions_drawn(example)
    assert dropped.count(EMPTY_CAPTION) / 3000 == pytest.approx(0.3, abs=0.03)
    assert all(one in (EMPTY_CAPTION, other) for one, other in zip(dropped, kept, strict=True))
    alone = captions_drawn(EXAMPLES[0], caption_dropout_rate=0.3)
    assert [one == EMPTY_CAPTION for one in alone] == [one == EMPTY_CAPTION for one in dropped]


def test_the_drawn_caption_is_the_one_that_is_fed() -> None:
    images = [replace(one, captions=(f"caption {n}", f"caption {n + 100}")) for n, one in enumerate(IMAGES)]
    examples = table_of(images)
    text = joined(batches(examples=examples))[2].flatten().tolist()
    shown = BatchOrder(examples, 8, SEED).global_batch(1)
    assert text == [float(caption_of(draw, make_objective(), SEED).removeprefix("caption ")) for draw in shown]
    assert any(number >= 100 for number in text)
    assert any(number < 100 for number in text)


# --- samples of the posterior ------------------------------------------------------------------------------------------


def test_each_draw_has_a_sample_of_the_posterior_of_its_own() -> None:
    example = EXAMPLES[3]
    shown = [SampleDraw(example, epoch, occurrence) for epoch in range(500) for occurrence in (0, 3)]
    samples = torch.stack([latents_of(draw, POSTERIOR, SEED) for draw in shown])
    assert len({sample.sum().item() for sample in samples}) == len(shown)
    assert torch.equal(samples[..., 0], torch.full_like(samples[..., 0], 3)), "where the deviation is zero"
    means, stds = samples.mean(dim=(0, 1, 2)), samples.std(dim=(0, 1, 2))
    torch.testing.assert_close(means, torch.full((4,), 3.0), rtol=0, atol=0.03)
    torch.testing.assert_close(stds, torch.linspace(0, 1, 4), rtol=0.03, atol=0)


def test_a_sample_is_a_function_of_seed_and_draw() -> None:
    draw = SampleDraw(EXAMPLES[3], 2, 1)
    sample = latents_of(draw, POSTERIOR, SEED)
    assert torch.equal(latents_of(SampleDraw(EXAMPLES[3], 2, 1), POSTERIOR, SEED), sample)
    others = [replace(draw, epoch=1), replace(draw, occurrence=0), replace(draw, example=replace(EXAMPLES[3], key="k"))]
    for other in others:
        assert not torch.equal(latents_of(other, POSTERIOR, SEED), sample)
    assert not torch.equal(latents_of(draw, POSTERIOR, SEED + 1), sample)


def test_without_std_the_mean_is_used_as_it_is() -> None:
    assert torch.equal(latents_of(SampleDraw(EXAMPLES[3], 2, 1), MEANS, SEED), torch.full(SHAPE, 3.0))


def test_a_sample_tells_nothing_about_the_noise() -> None:
    """Else noise would be partly taken away from the latents it is mixed with."""
    shown = [SampleDraw(EXAMPLES[0], epoch, 0) for epoch in range(200)]
    samples = torch.stack([latents_of(draw, POSTERIOR, SEED)[..., -1].flatten() for draw in shown]).flatten()
    noise = torch.stack([noise_of(draw, SHAPE, SEED)[..., -1].flatten() for draw in shown]).flatten()
    assert abs(float(torch.corrcoef(torch.stack([samples, noise]))[0, 1])) < 0.04


def test_a_flipped_image_has_its_own_mean_and_std() -> None:
    example = replace(EXAMPLES[3], may_flip=True)
    shown = [SampleDraw(example, epoch, 0) for epoch in range(20)]
    flips = {is_flipped(draw, SEED) for draw in shown}
    assert flips == {True, False}
    for draw in shown:
        flipped = is_flipped(draw, SEED)
        normal = randomness.normal(SEED, "posterior", example.key, draw.epoch, 0, shape=SHAPE)
        std = torch.linspace(1, 0, 4) if flipped else torch.linspace(0, 1, 4)
        assert torch.equal(latents_of(draw, POSTERIOR, SEED), (-3.0 if flipped else 3.0) + std * normal)


def test_both_stages_have_the_same_samples() -> None:
    first = joined_inputs(batches(replace(ALONE, is_last_stage=False), data=Posterior()))
    last = joined_target(batches(replace(ALONE, is_first_stage=False), data=Posterior())).output
    noisy, sigma = first[:2]
    recovered = noisy - sigma[:, None, None, None] * last  # x_t - sigma v
    wanted = torch.stack([latents_of(draw, POSTERIOR, SEED) for draw in draws()])
    torch.testing.assert_close(recovered, wanted, rtol=0, atol=1e-4)
    assert torch.equal(noisy, joined(batches(data=Posterior()))[0])
    assert not torch.equal(noisy, joined(batches())[0])


def joined_inputs(parts: list[MicroBatch]) -> list[Tensor]:
    return [torch.cat(tensors) for tensors in zip(*(inputs for inputs, _ in parts), strict=True)]


# --- ahead of the network ----------------------------------------------------------------------------------------------


def assert_same(ours: list[MicroBatch], wanted: list[MicroBatch]) -> None:
    for (inputs, target), (wanted_inputs, wanted_target) in zip(ours, wanted, strict=True):
        assert all(torch.equal(one, other) for one, other in zip(inputs, wanted_inputs, strict=True))
        assert all(torch.equal(one, other) for one, other in zip(target, wanted_target, strict=True))


@pytest.mark.parametrize("is_first_stage", [True, False])
@pytest.mark.parametrize("is_last_stage", [True, False])
def test_steps_give_exactly_what_each_step_gives_alone(is_first_stage: bool, is_last_stage: bool) -> None:
    layout = replace(ALONE, is_first_stage=is_first_stage, is_last_stage=is_last_stage)
    steps = range(3, 9)  # over the end of an epoch
    with make_feed(layout, data=Posterior()).steps(steps) as everything:
        for step, micro_batches in zip(steps, everything, strict=True):
            assert_same(list(micro_batches), batches(layout, step, data=Posterior()))


@pytest.mark.parametrize("num_used", [0, 1, 3])
def test_what_a_stage_does_not_look_at_is_not_taken_for_the_next_step_s(num_used: int) -> None:
    with make_feed().steps(range(5)) as everything:
        for step, micro_batches in enumerate(everything):
            used = [next(micro_batches) for _ in range(num_used)]
            assert_same(used, batches(step=step)[:num_used])


def test_a_step_has_no_more_than_its_own_micro_batches() -> None:
    with make_feed().steps(range(2)) as everything:
        assert [len(list(micro_batches)) for micro_batches in everything] == [ALONE.num_micro_batches] * 2


def test_micro_batches_are_made_in_another_thread_a_few_ahead() -> None:
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
    assert not makers[0].is_alive(), "leaving ends it, although steps are left"


def test_an_error_while_a_step_is_made_ready_is_raised_in_that_step() -> None:
    caption = f"caption {int(joined_inputs(batches(step=2)[1:2])[2][0])}"

    class Broken(Data):
        asked = 0

        def text(self, wanted: str) -> dict[str, Tensor]:
            self.asked += 1
            if self.asked > 8 * 2 + ALONE.micro_batch_size:  # the second micro-batch of step 2
                raise KeyError(wanted)
            return super().text(wanted)

    with make_feed(data=Broken()).steps(range(5)) as everything:
        for _ in range(2):
            assert len(list(next(everything))) == ALONE.num_micro_batches
        last = next(everything)
        next(last)
        with pytest.raises(KeyError, match=caption):
            next(last)
