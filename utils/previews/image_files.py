"""The files of preview images: a folder for each step, with the images, a list of them, and comparisons with step 0."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from utils.config.schema.sampling import SamplingConfig
from utils.files.atomic import remove_folder, sync_folder, write_text
from utils.previews.prompt_list import Prompt

IMAGE_LIST = "prompts.json"
BESIDE_STEP_0 = "beside_step_0"


def image_entry(prompt: Prompt, config: SamplingConfig, shift: float) -> dict[str, Any]:
    """Returns the entry of an image in prompts.json, without its file name: everything it depends on but the weights."""
    return {
        "prompt": prompt.text,
        "negative_prompt": prompt.negative,
        "width": prompt.width,
        "height": prompt.height,
        "seed": prompt.seed,
        "steps": prompt.steps,
        "cfg": prompt.cfg,
        "sampler": config.sampler,
        "shift": shift,
        "skip_layer_guidance": config.skip_layer_guidance.model_dump() if config.skip_layer_guidance is not None else None,
        "decode_tile_pixels": config.decode_tile_pixels,
    }


def write_images(parent: Path, step: int, images: Sequence[Image.Image], entries: Sequence[dict[str, Any]]) -> None:
    """Writes the folder `parent/step_…` atomically: images, prompts.json, and each image beside that of step 0."""
    final = parent / f"step_{step:06d}"
    temporary = parent / f".{final.name}.tmp"
    if temporary.exists():
        shutil.rmtree(temporary)
    (temporary / BESIDE_STEP_0).mkdir(parents=True)
    image_list = []
    for index, (image, entry) in enumerate(zip(images, entries, strict=True)):
        file = f"{index:03d}.png"
        image.save(temporary / file)
        image_list.append({**entry, "file": file})
        first = image_at_start(parent, entry) if step > 0 else None
        if first is not None:
            side_by_side(first, image).save(temporary / BESIDE_STEP_0 / file)
    if not any((temporary / BESIDE_STEP_0).iterdir()):
        (temporary / BESIDE_STEP_0).rmdir()
    write_text(temporary / IMAGE_LIST, json.dumps(image_list, indent=1, ensure_ascii=False))
    if final.exists():
        remove_folder(final)
    temporary.replace(final)
    sync_folder(parent)


def image_at_start(parent: Path, entry: dict[str, Any]) -> Image.Image | None:
    """Returns the image of step 0 with the same entry; None if there is none, as for a prompt that was added later."""
    folder = parent / "step_000000"
    try:
        image_list = json.loads((folder / IMAGE_LIST).read_text(encoding="utf-8"))
        for earlier in image_list:
            if earlier == {**entry, "file": earlier.get("file")}:
                return Image.open(folder / earlier["file"]).convert("RGB")
    except (OSError, ValueError, AttributeError):  # the user has deleted or edited files
        pass
    return None


def side_by_side(left: Image.Image, right: Image.Image) -> Image.Image:
    """Returns one image of two images of equal size."""
    both = Image.new("RGB", (left.width + right.width, right.height))
    both.paste(left, (0, 0))
    both.paste(right, (left.width, 0))
    return both
