"""Previews: equal images in any layout, agreement with diffusers' pipeline, and no effect on training."""

from __future__ import annotations

import json
import math
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor

from models.sd3.text_conditioning import join_text
from models.sd3.weights import NetworkFiles
from models.tensor_files import open_file
from tests.distributed.lab import Lab, Run
from tests.distributed.launch import newest_run, start_ranks
from tests.distributed.test_layouts import FULL, LORA, assert_same_run
from tests.models.sd3.diffusers_reference import diffusers_network
from utils import randomness
from utils.config.load import ConfigError
from utils.distributed.world import World
from utils.run.experiment import Experiment
from utils.run.prepare import prepare

pytestmark = pytest.mark.distributed

PREVIEWS: dict[str, Any] = {
    "sampling": {
        "prompts": ["a red circle", "a blue square", "a tree"],
        "every_n_steps": 4,
        "steps": 3,
        "cfg": 3.0,
        "width": 48,
        "height": 32,
        "batch_size": 2,
    }
}
"""The simplest previews, for tests of other features."""
TABLES: list[dict[str, Any]] = [
    {"prompt": "a red circle"},
    {"prompt": "a blue square", "negative_prompt": "red", "width": 32, "height": 64, "seed": 5, "cfg": 2.0},
    {"prompt": "a hill", "width": 64, "height": 32, "steps": 4, "seed": 3},
]
LINES = [
    "# a comment",
    "",
    "a tree --d 11 --l 6 --n grey, dull",
    "a lake --l 1 --d 8",
    "a red circle --d 12 --l 1.5",
    "a moon --w 48 --h 48",
    "--d 21",
]
"""The last is an empty prompt."""
NUM_PROMPTS = len(TABLES) + 5
SAMPLING: dict[str, Any] = {
    "every_n_steps": 4,
    "sampler": "dpmpp_2m",
    "steps": 6,
    "cfg": 3.0,
    "width": 48,
    "height": 32,
    "batch_size": 2,
    "skip_layer_guidance": {"layers": [1], "scale": 2.0, "start": 0.1, "end": 0.7},
}
TWO_REPLICAS: dict[str, Any] = {"pipeline.pipeline_stages": 1, "pipeline.gradient_accumulation_steps": 2}


@pytest.fixture(scope="module")
def previews(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Configuration changes that generate images of all prompts."""
    path = tmp_path_factory.mktemp("prompts") / "prompts.txt"
    path.write_text("\n".join(LINES), encoding="utf-8")
    return {"sampling": {**SAMPLING, "prompts": TABLES, "prompts_file": str(path)}, "max_steps": 4}


def images(run: Run) -> dict[str, np.ndarray]:
    folder = run.folder / "samples"
    return {str(path.relative_to(folder)): np.asarray(Image.open(path)) for path in sorted(folder.glob("*/*.png"))}


def image_list(run: Run, step: int) -> list[dict[str, Any]]:
    entries: list[dict[str, Any]] = json.loads((run.folder / "samples" / f"step_{step:06d}" / "prompts.json").read_text())
    return entries


def assert_same_images(one: dict[str, np.ndarray], other: dict[str, np.ndarray]) -> None:
    assert one.keys() == other.keys()
    assert [name for name in one if not np.array_equal(one[name], other[name])] == []


# --- schedule and settings ---------------------------------------------------------------------------------------------


def test_previews_are_generated_at_the_start_every_n_steps_and_at_the_end(lab: Lab, previews: dict[str, Any]) -> None:
    generated = images(lab.shared_run(2, {**previews, "max_steps": 5}))
    assert sorted(generated) == [f"step_{step:06d}/{index:03d}.png" for step in (0, 4, 5) for index in range(NUM_PROMPTS)]
    assert len({image.tobytes() for image in generated.values()}) == len(generated), "training and prompts change images"


def test_each_image_has_the_settings_of_its_prompt(lab: Lab, previews: dict[str, Any]) -> None:
    run = lab.shared_run(2, previews)
    keys = ("prompt", "negative_prompt", "width", "height", "seed", "steps", "cfg")
    assert [tuple(entry[key] for key in keys) for entry in image_list(run, 0)] == [
        ("a red circle", "", 48, 32, 0, 6, 3.0),
        ("a blue square", "red", 32, 64, 5, 6, 2.0),
        ("a hill", "", 64, 32, 3, 4, 3.0),
        ("a tree", "grey, dull", 48, 32, 11, 6, 6.0),
        ("a lake", "", 48, 32, 8, 6, 1.0),
        ("a red circle", "", 48, 32, 12, 6, 1.5),
        ("a moon", "", 48, 48, 6, 6, 3.0),
        ("", "", 48, 32, 21, 6, 3.0),
    ]
    for step in (0, 4):
        for entry in image_list(run, step):
            with Image.open(run.folder / "samples" / f"step_{step:06d}" / entry["file"]) as image:
                assert image.size == (entry["width"], entry["height"])


def test_current_images_are_written_beside_those_of_step_0(lab: Lab, previews: dict[str, Any]) -> None:
    run = lab.shared_run(2, previews)
    generated = images(run)
    for index in range(NUM_PROMPTS):
        both = np.asarray(Image.open(run.folder / "samples" / "step_000004" / "beside_step_0" / f"{index:03d}.png"))
        first, now = generated[f"step_000000/{index:03d}.png"], generated[f"step_000004/{index:03d}.png"]
        assert np.array_equal(both, np.concatenate([first, now], axis=1))
    assert not (run.folder / "samples" / "step_000000" / "beside_step_0").exists()


# --- layouts -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_stages", [2, 3])
def test_previews_of_several_stages_equal_those_of_one(lab: Lab, previews: dict[str, Any], num_stages: int) -> None:
    """With 3 stages, skip-layer guidance skips all blocks of the middle stage."""
    assert_same_images(images(lab.shared_run(1, previews)), images(lab.shared_run(num_stages, previews)))


@pytest.mark.parametrize(("num_processes", "stages"), [(2, 1), (4, 2)], ids=["1 stage", "2 stages"])
def test_previews_of_two_replicas_equal_those_of_one(
    lab: Lab, previews: dict[str, Any], num_processes: int, stages: int
) -> None:
    """Images of step 0 are compared: later the weights differ in their last bits."""
    run = lab.shared_run(num_processes, {**previews, **TWO_REPLICAS, "pipeline.pipeline_stages": stages, "max_steps": 1})
    assert "x 2 replicas" in run.output
    first = {name: image for name, image in images(run).items() if name.startswith("step_000000")}
    one = images(lab.shared_run(1, previews))
    assert_same_images(first, {name: image for name, image in one.items() if name in first})
    assert len(first) == NUM_PROMPTS


def test_a_prompt_with_a_seed_gives_the_same_image_at_any_index(lab: Lab, previews: dict[str, Any]) -> None:
    moved = [LINES[4], LINES[2], "a new one --d 1", LINES[3]]
    changes = {"sampling": {**SAMPLING, "prompts": moved}, "max_steps": 1}
    before, after = images(lab.shared_run(1, previews)), images(lab.shared_run(1, changes))
    for now, then in ((0, 5), (1, 3), (3, 4)):
        assert np.array_equal(after[f"step_000000/{now:03d}.png"], before[f"step_000000/{then:03d}.png"])


@pytest.mark.parametrize("changes", [FULL, LORA], ids=["full", "lora"])
def test_previews_do_not_change_training(lab: Lab, previews: dict[str, Any], changes: dict[str, Any]) -> None:
    assert_same_run(lab.shared_run(2, {**changes, "max_steps": 4}), lab.shared_run(2, {**changes, **previews}))


# --- agreement with diffusers ------------------------------------------------------------------------------------------

DIFFUSERS_SAMPLING: dict[str, Any] = {**SAMPLING, "sampler": "euler", "prompts": TABLES}
ADDITIVE = {"objective": {"model_prediction_type": "additive", "discrete_flow_shift": 2.0, "shift_resolution": 96}}
CASES: dict[str, tuple[dict[str, Any], str, str]] = {
    "full": (FULL, "last", "mmdit.safetensors"),
    "full, averaged": ({"ema": {"decay": 0.5, "warmup": False}}, "ema", "ema/mmdit.safetensors"),
    "full, additive": (ADDITIVE, "last", "mmdit.safetensors"),
    "lora": (LORA, "last", "lora_diffusers.safetensors"),
    "lora, averaged": ({**LORA, "ema": {"decay": 0.5, "warmup": False}}, "ema", "ema/lora_diffusers.safetensors"),
}
"""Name -> configuration changes, weights of the previews, exported file with these weights."""
TOLERANCE = 1
"""Largest difference of a pixel value, of 255."""


def opened(run: Run) -> Experiment:
    return prepare(run.experiment, [], None, World(0, 0, 1, 1))


def network_of(lab: Lab, exported: Path | None) -> Any:
    """Returns diffusers' network with the initial weights, or with those of an exported file."""
    start = lab.model / "mmdit.safetensors"
    config = NetworkFiles(open_file(start)).config
    if exported is None or "lora" in exported.name:
        network = diffusers_network(config, load_file(start))
        if exported is not None:
            network.load_lora_adapter(load_file(exported))
        return network
    return diffusers_network(config, load_file(exported))


@cache
def encoded(experiment_path: Path, text: str) -> tuple[Tensor, Tensor]:
    """Returns context (1, L, D) and pooled (1, D), computed by the encoders."""
    family: Any = prepare(experiment_path, [], None, World(0, 0, 1, 1)).family
    tensors = {}
    for encoder in family.text_encoders:
        (item,) = encoder.load(torch.device("cpu"))([text])
        tensors.update({f"{encoder.name}.{name}": tensor[None] for name, tensor in item.items()})
    return join_text(tensors, family.text_tokens, family.config)


def add_input_to_output(network: Any) -> None:
    """Changes a network of prediction type "additive" to one whose output is the velocity."""
    forward = network.forward
    network.forward = lambda hidden_states, **others: (forward(hidden_states, **others)[0] + hidden_states,)


def sample_with_diffusers(network: Any, lab: Lab, run: Run, entry: dict[str, Any], shift: float) -> np.ndarray:
    """Returns the image of StableDiffusion3Pipeline for an entry of prompts.json, from the same noise."""
    from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, StableDiffusion3Pipeline

    parts = {name: None for index in ("", "_2", "_3") for name in (f"text_encoder{index}", f"tokenizer{index}")}
    pipeline = StableDiffusion3Pipeline(
        transformer=network,
        vae=AutoencoderKL.from_pretrained(lab.model / "vae"),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=shift),
        **parts,
    )
    pipeline.set_progress_bar_config(disable=True)
    context, pooled = encoded(run.experiment, entry["prompt"])
    negative_context, negative_pooled = encoded(run.experiment, entry["negative_prompt"])
    shape = (16, entry["height"] // 8, entry["width"] // 8)
    skip = SAMPLING["skip_layer_guidance"]
    (image,) = pipeline(
        prompt_embeds=context,
        pooled_prompt_embeds=pooled,
        negative_prompt_embeds=negative_context,
        negative_pooled_prompt_embeds=negative_pooled,
        latents=randomness.normal(entry["seed"], "preview", shape=shape)[None],
        num_inference_steps=entry["steps"],
        sigmas=torch.linspace(1, 0, entry["steps"] + 1)[:-1].tolist(),
        guidance_scale=entry["cfg"],
        width=entry["width"],
        height=entry["height"],
        skip_guidance_layers=skip["layers"],
        skip_layer_guidance_scale=skip["scale"],
        skip_layer_guidance_start=skip["start"],
        skip_layer_guidance_stop=skip["end"],
        output_type="np",
    ).images
    return np.asarray((image * 255).round().astype(int))


@pytest.mark.parametrize("case", CASES)
def test_previews_agree_with_images_of_diffusers(lab: Lab, case: str) -> None:
    """Before training, and after it with the exported file: that of the averaged weights, if they are configured."""
    changes, weights, file = CASES[case]
    sampling = {**DIFFUSERS_SAMPLING, "weights": weights}
    run = lab.shared_run(2, {**changes, "max_steps": 3, "optimizer.learning_rate": 5e-3, "sampling": sampling})
    generated = images(run)
    for step, exported in ((0, None), (3, run.folder / "weights" / "step_000003" / file)):
        network = network_of(lab, exported)
        if changes is ADDITIVE:
            add_input_to_output(network)
        for entry in image_list(run, step):
            shift = 2.0 * math.sqrt(entry["width"] * entry["height"]) / 96 if changes is ADDITIVE else 3.0
            expected = sample_with_diffusers(network, lab, run, entry, shift)
            difference = np.abs(generated[f"step_{step:06d}/{entry['file']}"].astype(int) - expected)
            assert difference.max() <= TOLERANCE
            assert expected.std() > 20


def test_previews_of_averaged_and_last_weights_differ(lab: Lab) -> None:
    changes = {**FULL, "max_steps": 3, "ema": {"decay": 0.5, "warmup": False}}
    runs = [
        lab.shared_run(2, {**changes, "sampling": {**SAMPLING, "prompts": TABLES, "weights": weights}})
        for weights in ("last", "ema")
    ]
    last, averaged = (images(run) for run in runs)
    same = {name for name in last if np.array_equal(last[name], averaged[name])}
    assert same == {f"step_000000/{index:03d}.png" for index in range(len(TABLES))}, "there is no average before training"
    assert_same_run(*runs)


def test_no_text_encoder_is_loaded_for_previews(lab: Lab, previews: dict[str, Any]) -> None:
    """Once their outputs are cached; preview_ranks.py raises an error when one is loaded."""
    experiment = lab.run(2, lab.experiment(previews), "--set", "max_steps=2").experiment
    arguments = ["--config", str(experiment), "--resume"]
    finished = start_ranks(2, arguments, experiment.parent / "log.txt", "tests.distributed.preview_ranks").wait()
    assert finished.exit_code == 0, finished.output
    resumed = Run(experiment, newest_run(experiment.parent / "output"), finished.output)
    assert_same_images(
        {name: image for name, image in images(resumed).items() if "step_000004" in name},
        {name: image for name, image in images(lab.shared_run(2, previews)).items() if "step_000004" in name},
    )
    finished = start_ranks(
        1,
        [*arguments, "--set", "sampling.negative_prompt=new"],
        experiment.parent / "log2.txt",
        "tests.distributed.preview_ranks",
    ).wait()
    assert "was loaded" in finished.output


# --- errors ------------------------------------------------------------------------------------------------------------


def test_errors_of_prompts_have_file_and_line_and_come_before_the_run(lab: Lab, tmp_path: Path) -> None:
    lines = tmp_path / "prompts.txt"
    lines.write_text("fine\na fox --x 3\na hare --w 40\n")
    sampling = {"prompts": ["a fox --w wide", "a hare --s 0"], "width": 32, "height": 32}
    with pytest.raises(ConfigError) as caught:
        prepare(lab.experiment({"sampling": sampling}), [], None, World(0, 0, 1, 1))
    assert [(error.key, error.message) for error in caught.value.errors] == [
        ("sampling.prompts[0]", "= 'a fox --w wide': --w wide: must be a whole number, the width"),
        ("sampling.prompts[1].steps", "= 0: must be greater than or equal to 1"),
    ]
    experiment = lab.experiment({"sampling": {**sampling, "prompts": ["a"], "prompts_file": str(lines)}})
    with pytest.raises(ConfigError) as caught:
        prepare(experiment, [], None, World(0, 0, 1, 1))
    first, second = caught.value.errors
    assert str(first).startswith(f"{lines}: line 2: unknown flag --x; the flags are --w (width), ")
    assert (second.file, second.key) == (experiment, "sampling.prompts_file")
    assert second.message == f"{lines}: line 3: --w = 40: must be a multiple of 16"
