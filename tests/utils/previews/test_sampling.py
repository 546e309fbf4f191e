"""What is drawn together, and what is written. The drawing itself: tests/distributed/test_previews.py."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from utils.config.schema.sampling import SamplingConfig
from utils.previews.prompt_list import Prompt
from utils.previews.sampling import Group, listing_entry, make_batches, write_images


def prompt(text: str = "a", width: int = 32, height: int = 32, seed: int = 0, steps: int = 4, cfg: float = 3.0) -> Prompt:
    return Prompt(text, "", width, height, seed, steps, cfg, "sampling.prompts[0]")


def colour(number: int, width: int = 32, height: int = 16) -> Image.Image:
    return Image.new("RGB", (width, height), (number, number, number))


# --- batches -----------------------------------------------------------------------------------------------------------


def test_only_prompts_of_one_shape_and_number_of_passes_share_a_batch() -> None:
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
def test_batches_of_a_group_are_of_one_size(count: int, size: int, expected: list[list[int]]) -> None:
    (batches,) = make_batches([prompt()] * count, size).values()
    assert batches == expected


# --- writing -----------------------------------------------------------------------------------------------------------


def entries(*prompts: Prompt) -> list[dict[str, Any]]:
    return [listing_entry(entry, SamplingConfig(), 3.0) for entry in prompts]


def read_listing(folder: Path) -> list[dict[str, Any]]:
    listing: list[dict[str, Any]] = json.loads((folder / "prompts.json").read_text(encoding="utf-8"))
    return listing


def test_images_come_with_everything_that_made_them(tmp_path: Path) -> None:
    one, two = prompt("a Füchsin", 48, 32, 5, 28, 4.5), prompt("")
    write_images(tmp_path, 0, [colour(1), colour(2)], entries(one, two))
    folder = tmp_path / "step_000000"
    assert sorted(path.name for path in folder.iterdir()) == ["000.png", "001.png", "prompts.json"]
    assert read_listing(folder)[0] == {
        "prompt": "a Füchsin",
        "negative_prompt": "",
        "width": 48,
        "height": 32,
        "seed": 5,
        "steps": 28,
        "cfg": 4.5,
        "sampler": "euler",
        "shift": 3.0,
        "skip_layer_guidance": None,
        "decode_tile_pixels": 1024,
        "file": "000.png",
    }
    assert [entry["file"] for entry in read_listing(folder)] == ["000.png", "001.png"]
    assert [np.asarray(Image.open(folder / file)).max() for file in ("000.png", "001.png")] == [1, 2]


def test_later_images_are_also_shown_beside_the_first(tmp_path: Path) -> None:
    write_images(tmp_path, 0, [colour(1), colour(2)], entries(prompt("a"), prompt("b")))
    write_images(tmp_path, 100, [colour(11), colour(12)], entries(prompt("a"), prompt("b")))
    both = np.asarray(Image.open(tmp_path / "step_000100" / "beside_step_0" / "001.png"))
    assert both.shape == (16, 64, 3)
    assert (both[:, :32] == 2).all()
    assert (both[:, 32:] == 12).all()


def test_what_stands_beside_is_the_same_prompt_wherever_it_was_in_the_list(tmp_path: Path) -> None:
    write_images(tmp_path, 0, [colour(1), colour(2)], entries(prompt("a"), prompt("b")))
    write_images(tmp_path, 7, [colour(11), colour(12), colour(13)], entries(prompt("b"), prompt("a", seed=1), prompt("c")))
    folder = tmp_path / "step_000007" / "beside_step_0"
    assert [path.name for path in folder.iterdir()] == ["000.png"]
    assert np.asarray(Image.open(folder / "000.png"))[0, 0, 0] == 2


@pytest.mark.parametrize("spoil", ["folder", "listing", "image", "no json"])
def test_without_first_images_the_current_ones_are_written_alone(tmp_path: Path, spoil: str) -> None:
    if spoil != "folder":
        write_images(tmp_path, 0, [colour(1)], entries(prompt()))
    folder = tmp_path / "step_000000"
    if spoil == "listing":
        (folder / "prompts.json").unlink()
    elif spoil == "image":
        (folder / "000.png").unlink()
    elif spoil == "no json":
        (folder / "prompts.json").write_text("[{")
    write_images(tmp_path, 7, [colour(11)], entries(prompt()))
    assert sorted(path.name for path in (tmp_path / "step_000007").iterdir()) == ["000.png", "prompts.json"]


def test_images_of_a_step_that_is_made_again_replace_the_old_ones(tmp_path: Path) -> None:
    """What a killed run left half-written is not in the way."""
    write_images(tmp_path, 7, [colour(1), colour(2)], entries(prompt("a"), prompt("b")))
    (tmp_path / ".step_000007.tmp").mkdir()
    (tmp_path / ".step_000007.tmp" / "000.png").write_bytes(b"half")
    write_images(tmp_path, 7, [colour(3)], entries(prompt("a")))
    assert [path.name for path in tmp_path.iterdir()] == ["step_000007"]
    assert sorted(path.name for path in (tmp_path / "step_000007").iterdir()) == ["000.png", "prompts.json"]
    assert np.asarray(Image.open(tmp_path / "step_000007" / "000.png"))[0, 0, 0] == 3
