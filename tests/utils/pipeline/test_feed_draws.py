"""The random choices of one draw of an example: time, noise, caption, dropout, flip and posterior sample."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from typing import Any

import pytest
import torch

from tests.utils.data.tables import DIRECTORY, table_of
from tests.utils.pipeline.feeding import (
    ALONE,
    EXAMPLES,
    IMAGES,
    MEANS,
    POSTERIOR,
    SEED,
    SHAPE,
    Data,
    Posterior,
    batches,
    draws,
    joined,
    joined_inputs,
    joined_target,
    make_objective,
    number_of,
    sigma_of,
)
from utils import randomness
from utils.data.batches import BatchOrder, SampleDraw
from utils.data.examples import Example
from utils.data.sources.tags import TagShuffle
from utils.objective.loss import LossTarget
from utils.pipeline.feed import (
    EMPTY_CAPTION,
    caption_of,
    is_flipped,
    latents_of,
    noise_of,
)


def test_a_new_epoch_and_a_repeat_draw_new_noise_and_time() -> None:
    draw, objective = SampleDraw(EXAMPLES[0], 0, 0), make_objective()
    others = [replace(draw, epoch=1), replace(draw, occurrence=1), SampleDraw(EXAMPLES[1], 0, 0)]
    for other in others:
        assert not torch.equal(noise_of(draw, SHAPE, SEED), noise_of(other, SHAPE, SEED))
        assert sigma_of(draw, objective) != sigma_of(other, objective)
    assert not torch.equal(noise_of(draw, SHAPE, SEED), noise_of(draw, SHAPE, SEED + 1))


def test_noise_and_time_of_a_draw_are_uncorrelated() -> None:
    """The two random numbers come from different seeds."""
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
    assert float(drawn.median()) == pytest.approx(0.75, abs=0.03)  # t = 0.5, shifted
    assert float((drawn < 0.5).float().mean()) == pytest.approx({"sigma": 0.25, "logit_normal": 0.136}[sampling], abs=0.03)


@pytest.mark.parametrize("rate", [0.0, 0.1, 1.0])
def test_captions_are_dropped_at_their_rate_and_per_draw(rate: float) -> None:
    objective = make_objective(caption_dropout_rate=rate)
    captions = Counter(caption_of(SampleDraw(EXAMPLES[3], epoch, 0), objective, SEED) for epoch in range(3000))
    assert captions[EMPTY_CAPTION] / 3000 == pytest.approx(rate, abs=0.02)
    assert captions["caption 3"] == 3000 - captions[EMPTY_CAPTION]


def test_a_dropped_caption_is_replaced_by_the_empty_caption() -> None:
    dropped, kept = joined(batches(caption_dropout_rate=1.0)), joined(batches())
    assert (dropped[2] == -1).all()
    assert torch.equal(dropped[0], kept[0]), "noise and time are unchanged"
    assert torch.equal(dropped[1], kept[1])


def test_encoders_are_dropped_independently_each_with_all_its_tensors() -> None:
    rates = {"clip_l": 0.5, "t5xxl": 0.25}
    examples = table_of(IMAGES[1:])  # the text of the first is zero without dropout
    fed = [joined(batches(step=step, encoder_dropout_rate=rates, examples=examples)) for step in range(200)]
    clip, pooled, t5 = (torch.cat([parts[index] for parts in fed]).flatten() == 0 for index in (2, 3, 4))
    assert torch.equal(clip, pooled)
    assert float(clip.float().mean()) == pytest.approx(0.5, abs=0.05)
    assert float(t5.float().mean()) == pytest.approx(0.25, abs=0.05)
    assert float((clip & t5).float().mean()) == pytest.approx(0.125, abs=0.04), "independently"


def test_a_single_rate_applies_to_every_encoder_and_changes_neither_noise_nor_time() -> None:
    dropped, kept = joined(batches(encoder_dropout_rate=1.0)), joined(batches())
    assert not any(part.any() for part in dropped[2:5])
    assert all(part.any() for part in kept[2:5])
    assert all(torch.equal(dropped[index], kept[index]) for index in (0, 1, 5))


def test_the_weights_of_directory_and_time_are_multiplied() -> None:
    directories = [replace(DIRECTORY, loss_weight=1.0 + number) for number in range(len(IMAGES))]
    examples = table_of([replace(one, directory=own) for one, own in zip(IMAGES, directories, strict=True)])
    settings: dict[str, Any] = {"weighting_scheme": "cosmap", "weighting_by": "loss"}
    weight = joined_target(batches(examples=examples, **settings)).weight
    plain = joined_target(batches(**settings)).weight
    factors = torch.tensor([1.0 + number_of(draw.example) for draw in draws()])
    torch.testing.assert_close(weight, plain * factors)
    assert len(set(plain.tolist())) == len(plain)


def test_images_without_a_mask_have_a_mask_of_ones() -> None:
    images = [replace(one, mask=one.name if number % 2 else None) for number, one in enumerate(IMAGES)]
    masks = joined_target(batches(examples=table_of(images))).mask
    for mask, draw in zip(masks, draws(), strict=True):
        is_masked = number_of(draw.example) % 2
        wanted = Data().mask(replace(draw.example, mask=draw.example.image if is_masked else None))
        assert torch.equal(mask, torch.ones(1, *SHAPE[1:]) if wanted is None else wanted)
    unmasked = [LossTarget(*micro_batch.target).mask for micro_batch in batches()]
    assert all(torch.equal(mask, torch.ones(2, 1, 1, 1)) for mask in unmasked)


def test_half_of_the_draws_are_flipped_image_and_mask_together() -> None:
    directory = replace(DIRECTORY, may_flip=True)
    examples = table_of([replace(one, mask=one.name, directory=directory) for one in IMAGES[1:]])
    order = BatchOrder(examples, 8, SEED)
    flips = []
    for step in range(100):
        parts = batches(step=step, examples=examples, discrete_flow_shift=0.01)  # hardly any noise
        noisy, target = joined(parts)[0], joined_target(parts)
        for row, draw in enumerate(order.global_batch(step)):
            flipped = is_flipped(draw, SEED)
            flips.append(flipped)
            assert (float(noisy[row].mean()) < 0) == flipped
            assert (float(target.mask[row, 0, 0, 0]) == 1.0) == flipped
    assert sum(flips) / len(flips) == pytest.approx(0.5, abs=0.06)
    assert not any(is_flipped(SampleDraw(EXAMPLES[0], epoch, 0), SEED) for epoch in range(20)), "only where it is configured"


# --- several captions --------------------------------------------------------------------------------------------------


def captions_drawn(example: Example, seed: int = SEED, **objective: Any) -> list[str]:
    """The captions of 3000 draws."""
    settings = make_objective(**objective)
    return [caption_of(SampleDraw(example, epoch, 0), settings, seed) for epoch in range(3000)]


def test_several_captions_are_drawn_with_equal_frequency() -> None:
    example = replace(EXAMPLES[0], captions=("caption 1", "caption 2", "caption 3"))
    counts = Counter(captions_drawn(example))
    assert counts.keys() == set(example.captions)
    assert all(abs(count / 3000 - 1 / 3) < 0.03 for count in counts.values())


def test_the_drawn_caption_depends_on_seed_and_draw_only() -> None:
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


def test_several_captions_are_dropped_at_the_same_draws_as_one() -> None:
    example = replace(EXAMPLES[0], captions=("caption 1", "caption 2"))
    dropped, kept = captions_drawn(example, caption_dropout_rate=0.3), captions_drawn(example)
    assert dropped.count(EMPTY_CAPTION) / 3000 == pytest.approx(0.3, abs=0.03)
    assert all(one in (EMPTY_CAPTION, other) for one, other in zip(dropped, kept, strict=True))
    alone = captions_drawn(EXAMPLES[0], caption_dropout_rate=0.3)
    assert [one == EMPTY_CAPTION for one in alone] == [one == EMPTY_CAPTION for one in dropped]


def test_the_drawn_caption_is_fed() -> None:
    images = [replace(one, captions=(f"caption {n}", f"caption {n + 100}")) for n, one in enumerate(IMAGES)]
    examples = table_of(images)
    text = joined(batches(examples=examples))[2].flatten().tolist()
    shown = BatchOrder(examples, 8, SEED).global_batch(1)
    assert text == [float(caption_of(draw, make_objective(), SEED).removeprefix("caption ")) for draw in shown]
    assert any(number >= 100 for number in text)
    assert any(number < 100 for number in text)


# --- samples of the posterior ------------------------------------------------------------------------------------------


def test_each_draw_has_its_own_sample_of_the_posterior() -> None:
    example = EXAMPLES[3]
    shown = [SampleDraw(example, epoch, occurrence) for epoch in range(500) for occurrence in (0, 3)]
    samples = torch.stack([latents_of(draw, POSTERIOR, SEED) for draw in shown])
    assert len({sample.sum().item() for sample in samples}) == len(shown)
    assert torch.equal(samples[..., 0], torch.full_like(samples[..., 0], 3)), "where the std is zero"
    means, stds = samples.mean(dim=(0, 1, 2)), samples.std(dim=(0, 1, 2))
    torch.testing.assert_close(means, torch.full((4,), 3.0), rtol=0, atol=0.03)
    torch.testing.assert_close(stds, torch.linspace(0, 1, 4), rtol=0.03, atol=0)


def test_a_posterior_sample_depends_on_seed_and_draw_only() -> None:
    draw = SampleDraw(EXAMPLES[3], 2, 1)
    sample = latents_of(draw, POSTERIOR, SEED)
    assert torch.equal(latents_of(SampleDraw(EXAMPLES[3], 2, 1), POSTERIOR, SEED), sample)
    others = [replace(draw, epoch=1), replace(draw, occurrence=0), replace(draw, example=replace(EXAMPLES[3], key="k"))]
    for other in others:
        assert not torch.equal(latents_of(other, POSTERIOR, SEED), sample)
    assert not torch.equal(latents_of(draw, POSTERIOR, SEED + 1), sample)


def test_without_std_the_latents_are_the_mean() -> None:
    assert torch.equal(latents_of(SampleDraw(EXAMPLES[3], 2, 1), MEANS, SEED), torch.full(SHAPE, 3.0))


def test_posterior_sample_and_noise_are_uncorrelated() -> None:
    """Otherwise noise would partly cancel in the latents it is added to."""
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


def test_first_and_last_stage_have_the_same_posterior_samples() -> None:
    first = joined_inputs(batches(replace(ALONE, is_last_stage=False), data=Posterior()))
    last = joined_target(batches(replace(ALONE, is_first_stage=False), data=Posterior())).output
    noisy, sigma = first[:2]
    recovered = noisy - sigma[:, None, None, None] * last  # x_t - sigma v
    wanted = torch.stack([latents_of(draw, POSTERIOR, SEED) for draw in draws()])
    torch.testing.assert_close(recovered, wanted, rtol=0, atol=1e-4)
    assert torch.equal(noisy, joined(batches(data=Posterior()))[0])
    assert not torch.equal(noisy, joined(batches())[0])
