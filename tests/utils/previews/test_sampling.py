"""utils/previews/sampling.py: batches of prompts. Sampling itself: tests/distributed/test_previews.py."""

from __future__ import annotations

import pytest

from utils.previews.prompt_list import Prompt
from utils.previews.sampling import Group, make_batches


def prompt(text: str = "a", width: int = 32, height: int = 32, seed: int = 0, steps: int = 4, cfg: float = 3.0) -> Prompt:
    return Prompt(text, "", width, height, seed, steps, cfg, "sampling.prompts[0]")


def test_prompts_of_equal_size_steps_and_guidance_share_a_batch() -> None:
    prompts = [
        prompt(),
        prompt(width=48),
        prompt("b", seed=9, cfg=7.0),
        prompt(steps=5),
        prompt(cfg=1.0),
        prompt(height=48),
        prompt(width=48, seed=1),
    ]
    assert make_batches(prompts, 4) == {
        Group(32, 32, 4, True): [[0, 2]],
        Group(48, 32, 4, True): [[1, 6]],
        Group(32, 32, 5, True): [[3]],
        Group(32, 32, 4, False): [[4]],
        Group(32, 48, 4, True): [[5]],
    }


@pytest.mark.parametrize(
    ("count", "size", "expected"),
    [
        (1, 4, [[0]]),
        (3, 4, [[0, 1, 2]]),
        (4, 4, [[0, 1, 2, 3]]),
        (5, 2, [[0, 1], [2, 3], [4, 4]]),
        (5, 4, [[0, 1, 2, 3], [4, 4, 4, 4]]),
        (3, 1, [[0], [1], [2]]),
    ],
)
def test_batches_of_a_group_have_one_size(count: int, size: int, expected: list[list[int]]) -> None:
    (batches,) = make_batches([prompt()] * count, size).values()
    assert batches == expected
