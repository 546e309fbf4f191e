"""utils/previews/image_files.py: files of preview images. Sampling itself: tests/distributed/test_previews.py."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from utils.config.schema.sampling import SamplingConfig
from utils.previews.image_files import image_entry, write_images
from utils.previews.prompt_list import Prompt


def prompt(text: str = "a", width: int = 32, height: int = 32, seed: int = 0, steps: int = 4, cfg: float = 3.0) -> Prompt:
    return Prompt(text, "", width, height, seed, steps, cfg, "sampling.prompts[0]")


def gray_image(number: int, width: int = 32, height: int = 16) -> Image.Image:
    return Image.new("RGB", (width, height), (number, number, number))


def entries(*prompts: Prompt) -> list[dict[str, Any]]:
    return [image_entry(entry, SamplingConfig(), 3.0) for entry in prompts]


def read_image_list(folder: Path) -> list[dict[str, Any]]:
    image_list: list[dict[str, Any]] = json.loads((folder / "prompts.json").read_text(encoding="utf-8"))
    return image_list


def test_prompts_json_has_everything_an_image_depends_on(tmp_path: Path) -> None:
    one, two = prompt("a Füchsin", 48, 32, 5, 28, 4.5), prompt("")
    write_images(tmp_path, 0, [gray_image(1), gray_image(2)], entries(one, two))
    folder = tmp_path / "step_000000"
    assert sorted(path.name for path in folder.iterdir()) == ["000.png", "001.png", "prompts.json"]
    assert read_image_list(folder)[0] == {
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
    assert [entry["file"] for entry in read_image_list(folder)] == ["000.png", "001.png"]
    assert [np.asarray(Image.open(folder / file)).max() for file in ("000.png", "001.png")] == [1, 2]


def test_later_images_are_also_written_beside_those_of_step_0(tmp_path: Path) -> None:
    write_images(tmp_path, 0, [gray_image(1), gray_image(2)], entries(prompt("a"), prompt("b")))
    write_images(tmp_path, 100, [gray_image(11), gray_image(12)], entries(prompt("a"), prompt("b")))
    both = np.asarray(Image.open(tmp_path / "step_000100" / "beside_step_0" / "001.png"))
    assert both.shape == (16, 64, 3)
    assert (both[:, :32] == 2).all()
    assert (both[:, 32:] == 12).all()


def test_the_image_of_step_0_has_the_same_prompt_at_any_index(tmp_path: Path) -> None:
    write_images(tmp_path, 0, [gray_image(1), gray_image(2)], entries(prompt("a"), prompt("b")))
    write_images(
        tmp_path, 7, [gray_image(11), gray_image(12), gray_image(13)], entries(prompt("b"), prompt("a", seed=1), prompt("c"))
    )
    folder = tmp_path / "step_000007" / "beside_step_0"
    assert [path.name for path in folder.iterdir()] == ["000.png"]
    assert np.asarray(Image.open(folder / "000.png"))[0, 0, 0] == 2


@pytest.mark.parametrize("missing", ["folder", "list", "image", "valid json"])
def test_without_images_of_step_0_only_the_current_ones_are_written(tmp_path: Path, missing: str) -> None:
    if missing != "folder":
        write_images(tmp_path, 0, [gray_image(1)], entries(prompt()))
    folder = tmp_path / "step_000000"
    if missing == "list":
        (folder / "prompts.json").unlink()
    elif missing == "image":
        (folder / "000.png").unlink()
    elif missing == "valid json":
        (folder / "prompts.json").write_text("[{")
    write_images(tmp_path, 7, [gray_image(11)], entries(prompt()))
    assert sorted(path.name for path in (tmp_path / "step_000007").iterdir()) == ["000.png", "prompts.json"]


def test_images_of_a_repeated_step_replace_the_old_ones(tmp_path: Path) -> None:
    """An incomplete folder of a killed run is removed."""
    write_images(tmp_path, 7, [gray_image(1), gray_image(2)], entries(prompt("a"), prompt("b")))
    (tmp_path / ".step_000007.tmp").mkdir()
    (tmp_path / ".step_000007.tmp" / "000.png").write_bytes(b"half")
    write_images(tmp_path, 7, [gray_image(3)], entries(prompt("a")))
    assert [path.name for path in tmp_path.iterdir()] == ["step_000007"]
    assert sorted(path.name for path in (tmp_path / "step_000007").iterdir()) == ["000.png", "prompts.json"]
    assert np.asarray(Image.open(tmp_path / "step_000007" / "000.png"))[0, 0, 0] == 3
