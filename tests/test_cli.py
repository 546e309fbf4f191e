"""Errors on the command line: all at once, with file and key, before any process group starts."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import save_file

from tests.cli_bench import Bench, cut_off, spoil_caption, spoil_pixels
from tests.tiny_model import make_tiny_dataset, random_weights, tiny_shapes
from utils.config.load import ConfigError
from utils.distributed.world import World
from utils.run.prepare import prepare


@pytest.fixture
def bench(
    tmp_path: Path, tiny_model: Path, tiny_dataset: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> Bench:
    return Bench(tmp_path / "experiment", tiny_model, tiny_dataset, capfd, monkeypatch)


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """Six images that the test may damage."""
    return make_tiny_dataset(tmp_path / "images", num_images=6)


# --- missing files ----------------------------------------------------------------------------------------------------


def test_missing_experiment_file_is_an_error(bench: Bench) -> None:
    path = bench.folder / "nothing.toml"
    assert bench.only_error(path) == f"{path}: does not exist"


def test_missing_dataset_file_is_an_error(bench: Bench) -> None:
    path = bench.folder / "nothing.toml"
    assert bench.only_error(bench.experiment(dataset=str(path))) == f"{path}: does not exist"


@pytest.mark.parametrize("key", ["mmdit", "vae", "clip_l", "clip_g", "t5xxl"])
def test_missing_model_file_is_an_error_with_its_key(bench: Bench, key: str) -> None:
    experiment, path = bench.experiment(**{f"model.{key}": "/no/such/file"}), "/no/such/file"
    error = bench.only_error(experiment)
    assert error.startswith(f"{experiment}: model.{key}: {path} ")


def test_invalid_toml_is_an_error_with_its_line(bench: Bench) -> None:
    experiment = bench.experiment()
    experiment.write_text("seed = 1\nmax_steps = = 3\n")
    error = bench.only_error(experiment)
    assert error.startswith(f"{experiment}: is not valid TOML: ")
    assert "line 2" in error


# --- keys and values ---------------------------------------------------------------------------------------------------


WRONG_KEYS_AND_VALUES: list[tuple[dict[str, Any], str]] = [
    ({"optimizer.learning_rat": 1e-4}, "optimizer.learning_rat: unknown key; did you mean `learning_rate`?"),
    ({"learning_rate": 1e-4}, "learning_rate: unknown key here; it belongs in [optimizer]"),
    (
        {"gradient_acumulation_steps": 2},
        "gradient_acumulation_steps: unknown key; did you mean `gradient_accumulation_steps`, in [pipeline]?",
    ),
    ({"resolutions": [32]}, "resolutions: unknown key here; it belongs in the dataset file"),
    (
        {"dataset_file": {"max_steps": 3}},
        "max_steps: unknown key here; it belongs in the experiment file, at the top level, above the first [table]",
    ),
    ({"max_steps": "ten"}, "max_steps: = 'ten': must be a valid integer"),
    ({"seed": True}, "seed: = True: must be a valid integer"),
    ({"optimizer.learning_rate": -1.0}, "optimizer.learning_rate: = -1.0: must be greater than 0"),
    ({"model.dtype": "float64"}, "model.dtype: = 'float64': must be 'float32' or 'bfloat16'"),
    ({"max_steps": None}, "max_steps: is missing; set `max_steps`, `epochs` or both"),
    ({"optimizer.learning_rate": None}, "optimizer.learning_rate: is missing"),
    ({"model.type": "sd4"}, "model.type: = 'sd4': unknown model type; known: 'sd3'"),
    ({"pipeline.recompute": 4}, "pipeline.recompute: = 4: the network has 3 blocks"),
    (
        {"pipeline.recompute": "some"},
        "pipeline.recompute: = 'some': must be a valid integer, or 'none', 'norms', 'matmuls', 'all' or 'auto'",
    ),
    (
        {"optimizer.master": "split"},
        "optimizer.master: = 'split': only for model.dtype = \"bfloat16\"; float32 weights need nothing beside them",
    ),
    ({"optimizer.master": "kahan"}, "optimizer.master: = 'kahan': must be 'float32', 'split' or 'stochastic'"),
    (
        {"optimizer.step_in_backward": True, "optimizer.type": "lion"},
        "optimizer.step_in_backward: = true: needs pipeline.gradient_accumulation_steps = 1, not 2",
    ),
    ({"optimizer.type": "AdamX"}, "optimizer.type: = 'AdamX': unknown; did you mean 'Adam"),
    ({"optimizer.type": "LBFGS"}, "optimizer.type: = 'LBFGS': cannot be used here: it evaluates the network"),
    ({"optimizer.type": "RAdamScheduleFree", "ema": {}}, "ema: RAdamScheduleFree keeps an average of the weights itself"),
    (
        {"optimizer.args": {"weight_decoy": 0.1}},
        "optimizer.args.weight_decoy: not an argument of AdamW; did you mean weight_decay?; its arguments are betas",
    ),
    ({"optimizer.args": {"weight_decay": -1.0}}, "optimizer.args.weight_decay: = -1.0: must not be negative"),
    (
        {"adapter": {"type": "lora", "targets": ["no_such_.*"]}},
        "adapter.targets[0]: = 'no_such_.*': matches no module; groups are attn, ",
    ),
    (
        {"adapter": {"type": "lora", "targets": ["final_layer.linear", "(x"]}},
        "adapter.targets[1]: = '(x': is not a regular expression: ",
    ),
    ({"sampling": {"prompts": ["a"], "width": 40, "height": 32}}, "sampling.width: = 40: must be a multiple of 16"),
    (
        {"sampling": {"prompts": ["a"], "width": 32, "height": 272}},
        "sampling.height: = 272: the network supports at most 256 ",
    ),
    ({"dataset_file": {"resolutions": [40]}}, "resolutions[0]: = 40: must be a multiple of 16; use 32 or 48"),
    (
        {"dataset_file": {"resolutions": [1024]}},
        "resolutions[0]: = 1024: needs sides of 1456 pixels; the network supports at most 256",
    ),
    ({"dataset_file": {"min_ar": 3.0}}, "min_ar: = 3.0: must not exceed max_ar, which is 2.0"),
    ({"dataset_file": {"directory": []}}, "directory: = []: "),
    ({"objective": {"weighting_scheme": "sech"}}, "objective.weighting_scheme: = 'sech': must be 'none', 'sigma_sqrt', "),
    ({"objective": {"mode_s_n": 0.0}}, "objective.mode_s_n: = 0.0: must be greater than or equal to 0.001"),
    ({"objective": {"min_t": 0.5, "max_t": 0.25}}, "objective.max_t: = 0.25: must be above min_t, 0.5"),
    (
        {"objective": {"weighting_scheme": "mode", "mode_mean": -1.0, "mode_s_n": 1e-3, "min_t": 0.5}},
        "objective: the weight is zero everywhere between min_t and max_t",
    ),
    (
        {"objective": {"weighting_scheme": "mode", "mode_mean": 3.0, "weighting_by": "loss"}},
        "objective: the mean weight mode between min_t and max_t is almost zero: ",
    ),
    (
        {"objective": {"min_t": 0.999}},
        "objective: the mean weight logit_normal between min_t and max_t is almost zero: ",
    ),
    (
        {"objective": {"encoder_dropout_rate": {"clip_h": 0.1}}},
        "objective.encoder_dropout_rate.clip_h: there is no such text encoder; there are clip_l, clip_g, t5xxl",
    ),
    ({"sampling": {"weights": "ema"}}, "sampling.weights: = 'ema': there is no average without an [ema] table"),
    (
        {"eval": {"holdout_images": 3, "weights": "ema"}},
        "eval.weights: = 'ema': there is no average without an [ema] table",
    ),
    ({"eval": {"holdout_images": 12}}, "eval.holdout_images: = 12: "),
    ({"eval": {"every_n_steps": 5}}, "eval: has no images; set holdout_images, such as holdout_images = 16, or add sets"),
    (
        {"sampling": {"prompts": ["a fox --w 40"], "height": 32}},
        "sampling.prompts[0].width: = 40: must be a multiple of 16",
    ),
    ({"sampling": {"prompts_file": "/no/such/file"}}, "sampling.prompts_file: = '/no/such/file': does not exist"),
    (
        {"sampling": {"prompts": ["a"], "width": 32, "height": 32, "skip_layer_guidance": {"layers": [1, 2]}}},
        "sampling.skip_layer_guidance.layers[1]: = 2: must be at most 1; the last block cannot be skipped",
    ),
]


@pytest.mark.parametrize(
    ("changes", "message"),
    WRONG_KEYS_AND_VALUES,
    ids=[message.partition(": ")[0] for _, message in WRONG_KEYS_AND_VALUES],
)
def test_wrong_key_or_value_is_an_error_with_advice(bench: Bench, changes: dict[str, Any], message: str) -> None:
    experiment = bench.experiment(**changes)
    file = experiment.with_name("dataset.toml") if "dataset_file" in changes else experiment
    assert bench.only_error(experiment).startswith(f"{file}: {message}")


def test_bad_line_of_the_prompt_file_is_an_error(bench: Bench, tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("# previews\na fox --w 32 --h 32\na fox --width 32\n\nan owl --s many\nan owl --h 8\n")
    errors = bench.refused(bench.experiment(sampling={"prompts_file": str(prompts), "width": 32, "height": 32}))
    assert [line.split(" ")[:4] for line in errors] == [
        [f"{prompts}:", "line", number, word] for number, word in (("3:", "unknown"), ("5:", "--s"), ("6:", "--h"))
    ]
    assert "the flags are --w (width), --h (height), --d (seed), --s (steps), --l (cfg), --n (negative_prompt)" in errors[0]
    assert "must be greater than or equal to 16" in errors[2]


def test_empty_evaluation_set_is_an_error_with_its_file(bench: Bench, tmp_path: Path) -> None:
    empty, file = tmp_path / "empty", tmp_path / "other.toml"
    empty.mkdir()
    file.write_text(f'resolutions = [32]\n[[directory]]\npath = "{empty}"\n')
    experiment = bench.experiment(eval={"sets": [{"name": "other", "dataset": str(file)}]})
    assert bench.only_error(experiment) == f"{file}: directory: no usable image with a caption in {empty}"


def test_errors_have_the_line_of_the_file(bench: Bench) -> None:
    experiment = bench.experiment(objective={"mode_s_n": 0.0})
    line = experiment.read_text().splitlines().index("mode_s_n = 0.0") + 1
    assert f"{experiment}, line {line}: objective.mode_s_n: " in bench.main("--config", str(experiment)).error


def test_mask_folder_must_exist_and_be_a_different_one(bench: Bench, images: Path) -> None:
    for folder, message in ((images / "no", "is not a folder"), (images, "must be a different folder than path")):
        directory = [{"path": str(images), "mask_path": str(folder)}]
        error = bench.only_error(bench.experiment(dataset_file={"directory": directory}))
        assert "directory[0].mask_path: " in error and message in error


def test_all_errors_of_both_files_are_reported_at_once(bench: Bench) -> None:
    changes = {"sead": 1, "max_steps": 0, "optimizer.type": 3, "model.vea": "x", "dataset_file": {"num_repeat": 2}}
    experiment = bench.experiment(**changes)
    dataset_file = experiment.with_name("dataset.toml")
    starts = {error.rpartition(":")[0].split(": =")[0] for error in bench.refused(experiment)}
    assert starts == {
        f"{experiment}: sead",
        f"{experiment}: max_steps",
        f"{experiment}: optimizer.type",
        f"{experiment}: model.vea",
        f"{dataset_file}: num_repeat",
    }


def test_errors_of_all_later_checks_are_reported_at_once(bench: Bench, images: Path) -> None:
    """Errors beyond the schema: optimizer, groups, images, adapter, previews."""
    spoiled = [spoil_caption(images), cut_off(images)]
    experiment = bench.experiment(
        images=images,
        **{
            "optimizer.type": "AdamX",
            "pipeline.bucket_group": 3,
            "adapter": {"type": "lora", "targets": ["no"]},
            "sampling": {"prompts": ["a"], "width": 40, "height": 32},
        },
    )
    errors = bench.refused(experiment, world_size=3)
    for key in ("optimizer.type", "pipeline.bucket_group", "adapter.targets[0]", "sampling.width"):
        assert sum(error.startswith(f"{experiment}: {key}: ") for error in errors) == 1
    for path in spoiled:
        assert sum(error.startswith(f"{path}: ") for error in errors) == 1


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("max_steps=ten", "max_steps: = 'ten': must be a valid integer"),
        ("optimizer.learning_rate=[1]", "optimizer.learning_rate: = [1]: must be a valid number"),
        ("max_step=3", "max_step: unknown key; did you mean `max_steps`?"),
        ("max_steps", "--set max_steps: must be KEY=VALUE"),
        ("seed.value=1", "seed.value: seed is not a table, so it cannot have the key value"),
    ],
)
def test_overrides_are_checked_like_the_file(bench: Bench, override: str, message: str) -> None:
    experiment = bench.experiment()
    assert bench.only_error(experiment, "--set", override).startswith(f"{experiment}: {message}")


# --- processes ---------------------------------------------------------------------------------------------------------


def test_stages_must_divide_the_processes(bench: Bench) -> None:
    experiment = bench.experiment(**{"pipeline.pipeline_stages": 2})
    message = "pipeline.pipeline_stages: = 2: must divide the number of processes, 3; start a multiple of 2 processes"
    assert bench.only_error(experiment, world_size=3) == f"{experiment}: {message}"


def test_one_process_can_check_a_run_of_several(bench: Bench) -> None:
    checked = bench.main("--config", str(bench.experiment(**{"pipeline.pipeline_stages": 2})), "--check")
    assert (checked.exit_code, checked.error) == (0, "")


# --- groups of one bucket ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("group", "world_size", "each", "whole", "advice"),
    [
        (1, 1, "2 (micro_batch_size_per_gpu 2 x 1 replicas)", 12, "2"),
        (5, 1, "2 (micro_batch_size_per_gpu 2 x 1 replicas)", 12, "4 or 6"),
        (8, 1, "2 (micro_batch_size_per_gpu 2 x 1 replicas)", 12, "6 or 12"),
        (24, 1, "2 (micro_batch_size_per_gpu 2 x 1 replicas)", 12, "12"),
        (6, 2, "4 (micro_batch_size_per_gpu 2 x 2 replicas)", 24, "4 or 8"),
    ],
)
def test_wrong_size_of_groups_is_an_error_with_the_nearest_right_ones(
    bench: Bench, group: int, world_size: int, each: str, whole: int, advice: str
) -> None:
    pipeline = {"pipeline_stages": 1, "gradient_accumulation_steps": 6, "bucket_group": group}
    experiment = bench.experiment(pipeline=pipeline)
    wrong = f"must be a multiple of {each} that divides the global batch, {whole}"
    message = f"{experiment}: pipeline.bucket_group: = {group}: {wrong}; use {advice}"
    assert bench.only_error(experiment, world_size=world_size) == message


def test_groups_are_checked_once_the_stages_are_right(bench: Bench) -> None:
    experiment = bench.experiment(**{"pipeline.pipeline_stages": 2, "pipeline.bucket_group": 3})
    assert "pipeline.pipeline_stages" in bench.only_error(experiment, world_size=3)


@pytest.mark.parametrize(("group", "replicas"), [(2, 1), (4, 1), (8, 2), (10, 5)])
def test_check_by_one_process_assumes_replicas_that_the_groups_are_right_for(
    bench: Bench, group: int, replicas: int
) -> None:
    experiment = bench.experiment(**{"pipeline.bucket_group": group})
    checked = prepare(experiment, [], None, World(0, 0, 1, 1), check_only=True)
    assert (checked.num_replicas, checked.bucket_group, checked.global_batch) == (replicas, group, 4 * replicas)
    with pytest.raises(ConfigError, match=r"bucket_group: = 7: must be a multiple of 2 .* use 4"):
        prepare(experiment, ["pipeline.bucket_group=7"], None, World(0, 0, 1, 1), check_only=True)


def test_missing_weights_and_missing_images_are_reported_together(bench: Bench) -> None:
    experiment = bench.experiment(images=bench.folder / "none", **{"model.mmdit": str(bench.folder / "no.safetensors")})
    errors = bench.main("--config", str(experiment)).errors
    assert any("no.safetensors does not exist" in line for line in errors)
    assert any("none is neither a folder" in line for line in errors)


@pytest.mark.parametrize("stages", ["auto", 6])
def test_more_stages_than_layers_are_an_error(bench: Bench, stages: str | int) -> None:
    experiment = bench.experiment(**{"pipeline.pipeline_stages": stages})
    message = "pipeline.pipeline_stages: = 6: 5 layers cannot be divided into 6 stages"
    assert bench.only_error(experiment, world_size=6) == f"{experiment}: {message}"


# --- weights -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda w: w.pop("joint_blocks.1.x_block.mlp.fc1.bias"), "misses tensor joint_blocks.1.x_block.mlp.fc1.bias (512,)"),
        (
            lambda w: w.update({"final_layer.linear.bias": w["final_layer.linear.bias"][:60].clone()}),
            "tensor final_layer.linear.bias has shape (60,), expected (64,)",
        ),
    ],
    ids=["missing", "misshapen"],
)
def test_weights_that_do_not_fit_are_an_error(bench: Bench, spoil: Callable[[dict[str, Any]], Any], message: str) -> None:
    weights = random_weights(tiny_shapes())
    spoil(weights)
    bench.folder.mkdir()
    path = bench.folder / "spoiled.safetensors"
    save_file(weights, path)
    experiment = bench.experiment(**{"model.mmdit": str(path)})
    assert bench.only_error(experiment) == (
        f"{experiment}: model.mmdit: {path}, by its shapes SD3.5-medium-like (width 128, depth 3), {message}"
    )


# --- images and captions ---------------------------------------------------------------------------------------------


def test_empty_dataset_folder_is_an_error(bench: Bench, tmp_path: Path) -> None:
    folder = tmp_path / "empty"
    folder.mkdir()
    experiment = bench.experiment(images=folder)
    message = f"{experiment.with_name('dataset.toml')}: directory: no usable image with a caption in {folder}"
    assert bench.only_error(experiment) == message


@pytest.mark.parametrize("on_bad_file", ["error", "skip"])
def test_missing_dataset_folder_is_an_error_whatever_on_bad_file(bench: Bench, tmp_path: Path, on_bad_file: str) -> None:
    experiment = bench.experiment(images=tmp_path / "none", dataset_file={"on_bad_file": on_bad_file})
    message = f"{experiment.with_name('dataset.toml')}: directory[0].path: {tmp_path / 'none'} "
    message += "is neither a folder nor a .tar or .parquet file"
    assert bench.only_error(experiment) == message


@pytest.mark.parametrize("key", ["output_dir", "cache_dir"])
def test_output_folder_that_is_a_file_is_an_error(bench: Bench, tmp_path: Path, key: str) -> None:
    file = tmp_path / "file"
    file.write_text("")
    experiment = bench.experiment(**{key: str(file / "inside")})
    assert bench.only_error(experiment) == f"{experiment}: {key}: = {str(file / 'inside')!r}: {file} is a file, not a folder"


def remove_caption(folder: Path) -> Path:
    (folder / "image_004.txt").unlink()
    return folder / "image_004.png"


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (spoil_caption, "is not UTF-8: byte 3 is 0xe9"),
        (cut_off, "is truncated"),
        (remove_caption, "has no caption: image_004.txt is missing"),
    ],
)
def test_bad_file_is_an_error_with_its_reason(
    bench: Bench, images: Path, spoil: Callable[[Path], Path], reason: str
) -> None:
    path = spoil(images)
    experiment = bench.experiment(images=images)
    first, advice = bench.refused(experiment)
    assert first.startswith(f"{path}: {reason}")
    assert advice.startswith(f"{experiment.with_name('dataset.toml')}: on_bad_file: ")
    assert '"skip"' in advice


def test_check_decodes_no_pixels(bench: Bench, images: Path) -> None:
    """The scan before a run reads headers only, so that it is fast for many images."""
    spoil_pixels(images)
    refusal = bench.main("--config", str(bench.experiment(images=images)), "--check")
    assert refusal.exit_code == 0, refusal.error


# --- check only --------------------------------------------------------------------------------------------------------


def test_check_of_an_invalid_experiment_exits_with_1(bench: Bench) -> None:
    assert len(bench.refused(bench.experiment(sead=1), "--check")) == 1
