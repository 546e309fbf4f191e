"""The command line: what is wrong is said at once, by file and key, before anything starts; what is right runs.

Most cases call `train.main()` here, with its exit caught and with a process group forbidden; a few start it for real.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import pytest
from safetensors.torch import save_file

import train
from tests.distributed.lab import Lab
from tests.distributed.launch import newest_run, run_alone, run_deepspeed, run_torchrun, start_ranks
from tests.tiny_model import make_tiny_dataset, random_weights, tiny_shapes, write_experiment
from utils.config.load import load_config
from utils.report.dataset_gather import BAD_FILES, DATASET_REPORT


@dataclass(frozen=True)
class Refusal:
    """What main() said when it refused."""

    exit_code: int
    error: str

    @property
    def errors(self) -> list[str]:
        """One each, without the line that counts them, and without the lines of keys (tests/utils/config/test_lines.py)."""
        lines = [line for line in self.error.splitlines() if line and not line.startswith("Cannot start: ")]
        return [re.sub(r"(\.toml), line \d+: ", r"\1: ", line) for line in lines]


class Bench:
    """Experiments in a folder of the test's own, and main() in this process."""

    def __init__(self, folder: Path, model: Path, dataset: Path, capture: Any, patch: pytest.MonkeyPatch) -> None:
        self.folder, self.model, self.dataset = folder, model, dataset
        self._capture, self._patch = capture, patch

    def experiment(self, **changes: Any) -> Path:
        return write_experiment(self.folder, self.model, changes.pop("images", self.dataset), **changes)

    def main(self, *arguments: str, world_size: int = 1) -> Refusal:
        """train.py ARGUMENTS as rank 0 of so many; fails when it comes to starting a process group."""
        self._patch.setenv("WORLD_SIZE", str(world_size))
        self._patch.setenv("RANK", "0")
        self._patch.setattr("sys.argv", ["train.py", *arguments])
        self._patch.setattr(train.group, "finish", _exit)
        self._patch.setattr(train.group, "start", lambda: pytest.fail("a process group was to be started"))
        self._capture.readouterr()
        with pytest.raises(SystemExit) as caught:
            train.main()
        assert isinstance(caught.value.code, int)
        return Refusal(caught.value.code, self._capture.readouterr().err)

    def refused(self, experiment: Path, *arguments: str, world_size: int = 1) -> list[str]:
        """The errors main() names; it must exit with 1, and leave no trace unless it had to look at images: what it
        found, the next start need not look for, and which are bad, the user wants to know."""
        before = tree(self.folder)
        refusal = self.main("--config", str(experiment), *arguments, world_size=world_size)
        assert refusal.exit_code == 1, refusal.error
        memory = self.folder / "output" / "cache" / "files"
        bad_files = self.folder / "output" / BAD_FILES
        remembered = {str(path) for path in (memory, *memory.parents, *memory.glob("*.safetensors"), bad_files)}
        assert set(tree(self.folder)) - remembered == set(before) - remembered
        count = len(refusal.errors)
        assert f"Cannot start: {count} error{'s' if count > 1 else ''}:" in refusal.error
        return refusal.errors

    def only_error(self, experiment: Path, *arguments: str, world_size: int = 1) -> str:
        (error,) = self.refused(experiment, *arguments, world_size=world_size)
        return error


def _exit(exit_code: int = 0) -> NoReturn:
    raise SystemExit(exit_code)


def tree(folder: Path) -> list[str]:
    return sorted(str(path) for path in folder.rglob("*"))


@pytest.fixture
def bench(
    tmp_path: Path, tiny_model: Path, tiny_dataset: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> Bench:
    return Bench(tmp_path / "experiment", tiny_model, tiny_dataset, capfd, monkeypatch)


@pytest.fixture(scope="module")
def lab(tiny_model: Path, tiny_dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Lab:
    return Lab(tiny_model, tiny_dataset, tmp_path_factory.mktemp("lab"))


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """Six images of the test's own, to spoil."""
    return make_tiny_dataset(tmp_path / "images", num_images=6)


def spoil_caption(folder: Path) -> Path:
    path = folder / "image_001.txt"
    path.write_bytes(b"caf\xe9")
    return path


def cut_off(folder: Path) -> Path:
    path = folder / "image_002.png"
    path.write_bytes(path.read_bytes()[:-40])
    return path


def spoil_pixels(folder: Path) -> Path:
    """Garbage in the middle of a PNG whose header, checksums and end are right: only decoding finds it."""
    path = folder / "image_003.png"
    content = path.read_bytes()
    start = content.index(b"IDAT") + 4
    length = int.from_bytes(content[start - 8 : start - 4], "big")
    garbage = content[start : start + 2] + bytes(length - 2)
    checksum = zlib.crc32(b"IDAT" + garbage).to_bytes(4, "big")
    path.write_bytes(content[:start] + garbage + checksum + content[start + length + 4 :])
    return path


# --- files that are not there ------------------------------------------------------------------------------------------


def test_missing_experiment_file_is_named(bench: Bench) -> None:
    path = bench.folder / "nothing.toml"
    assert bench.only_error(path) == f"{path}: does not exist"


def test_missing_dataset_file_is_named(bench: Bench) -> None:
    path = bench.folder / "nothing.toml"
    assert bench.only_error(bench.experiment(dataset=str(path))) == f"{path}: does not exist"


@pytest.mark.parametrize("key", ["mmdit", "vae", "clip_l", "clip_g", "t5xxl"])
def test_missing_model_file_is_named_with_its_key(bench: Bench, key: str) -> None:
    experiment, path = bench.experiment(**{f"model.{key}": "/no/such/file"}), "/no/such/file"
    error = bench.only_error(experiment)
    assert error.startswith(f"{experiment}: model.{key}: {path} ")


def test_broken_toml_is_named_with_its_line(bench: Bench) -> None:
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
    ({"max_steps": None}, "max_steps: is missing; say how long to train by `max_steps`, `epochs` or both"),
    ({"optimizer.learning_rate": None}, "optimizer.learning_rate: is missing"),
    ({"model.type": "sd4"}, "model.type: = 'sd4': unknown model type; known: 'sd3'"),
    ({"optimizer.type": "AdamX"}, "optimizer.type: = 'AdamX': unknown; did you mean 'Adam"),
    ({"optimizer.type": "Muon"}, "optimizer.type: = 'Muon': cannot be used here: its update depends on"),
    (
        {"optimizer.args": {"weight_decoy": 0.1}},
        "optimizer.args.weight_decoy: not an argument of AdamW; its arguments are betas",
    ),
    ({"optimizer.args": {"weight_decay": -1.0}}, "optimizer.args: AdamW rejects them: Invalid weight_decay value: -1.0"),
    (
        {"adapter": {"type": "lora", "targets": ["no_such_.*"]}},
        "adapter.targets[0]: = 'no_such_.*': matches no module; groups are attn, ",
    ),
    (
        {"adapter": {"type": "lora", "targets": ["final_layer.linear", "(x"]}},
        "adapter.targets[1]: = '(x': is no regular expression: ",
    ),
    ({"sampling": {"prompts": ["a"], "width": 40, "height": 32}}, "sampling.width: = 40: must be a multiple of 16"),
    ({"sampling": {"prompts": ["a"], "width": 32, "height": 272}}, "sampling.height: = 272: the network supports at most 256 "),
    ({"dataset_file": {"resolutions": [40]}}, "resolutions[0]: = 40: must be a multiple of 16; use 32 or 48"),
    (
        {"dataset_file": {"resolutions": [1024]}},
        "resolutions[0]: = 1024: needs sides of 1456 pixels; the network supports at most 256",
    ),
    ({"dataset_file": {"min_ar": 3.0}}, "min_ar: = 3.0: must not be above max_ar, 2.0"),
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
        "objective: between min_t and max_t the weight mode is next to nothing, ",
    ),
    (
        {"objective": {"min_t": 0.999}},
        "objective: between min_t and max_t the weight logit_normal is next to nothing, ",
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
    ({"eval": {"every_n_steps": 5}}, "eval: names no images: give holdout_images = 16, say, or sets of other images"),
    (
        {"sampling": {"prompts": ["a fox --w 40"], "height": 32}},
        "sampling.prompts[0].width: = 40: must be a multiple of 16",
    ),
    ({"sampling": {"prompts_file": "/no/such/file"}}, "sampling.prompts_file: = '/no/such/file': does not exist"),
    (
        {"sampling": {"prompts": ["a"], "width": 32, "height": 32, "skip_layer_guidance": {"layers": [1, 2]}}},
        "sampling.skip_layer_guidance.layers[1]: = 2: must be at most 1; the last cannot be left out",
    ),
]


@pytest.mark.parametrize(
    ("changes", "message"),
    WRONG_KEYS_AND_VALUES,
    ids=[message.partition(": ")[0] for _, message in WRONG_KEYS_AND_VALUES],
)
def test_wrong_key_or_value_is_named_with_what_to_do(bench: Bench, changes: dict[str, Any], message: str) -> None:
    experiment = bench.experiment(**changes)
    file = experiment.with_name("dataset.toml") if "dataset_file" in changes else experiment
    assert bench.only_error(experiment).startswith(f"{file}: {message}")


def test_a_bad_line_of_the_prompt_file_is_named(bench: Bench, tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("# previews\na fox --w 32 --h 32\na fox --width 32\n\nan owl --s many\nan owl --h 8\n")
    told = bench.refused(bench.experiment(sampling={"prompts_file": str(prompts), "width": 32, "height": 32}))
    assert [line.split(" ")[:4] for line in told] == [
        [f"{prompts}:", "line", number, word] for number, word in (("3:", "unknown"), ("5:", "--s"), ("6:", "--h"))
    ]
    assert "the flags are --w (width), --h (height), --d (seed), --s (steps), --l (cfg), --n (negative_prompt)" in told[0]
    assert "must be greater than or equal to 16" in told[2]


def test_an_empty_evaluation_set_is_named_with_its_file(bench: Bench, tmp_path: Path) -> None:
    empty, file = tmp_path / "empty", tmp_path / "other.toml"
    empty.mkdir()
    file.write_text(f'resolutions = [32]\n[[directory]]\npath = "{empty}"\n')
    experiment = bench.experiment(eval={"sets": [{"name": "other", "dataset": str(file)}]})
    assert bench.only_error(experiment) == f"{file}: directory: no usable image with a caption in {empty}"


def test_a_line_of_the_file_is_named(bench: Bench) -> None:
    experiment = bench.experiment(objective={"mode_s_n": 0.0})
    line = experiment.read_text().splitlines().index("mode_s_n = 0.0") + 1
    assert f"{experiment}, line {line}: objective.mode_s_n: " in bench.main("--config", str(experiment)).error


def test_a_mask_folder_must_be_there_and_another(bench: Bench, images: Path) -> None:
    for folder, message in ((images / "no", "is not a folder"), (images, "must be a different folder than path")):
        directory = [{"path": str(images), "mask_path": str(folder)}]
        error = bench.only_error(bench.experiment(dataset_file={"directory": directory}))
        assert "directory[0].mask_path: " in error and message in error


def test_every_mistake_of_both_files_is_shown_at_once(bench: Bench) -> None:
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


def test_mistakes_of_every_later_check_are_shown_at_once(bench: Bench, images: Path) -> None:
    """What only the files themselves tell: optimizer, stages, images, adapter, previews."""
    spoiled = [spoil_caption(images), cut_off(images)]
    experiment = bench.experiment(
        images=images,
        **{
            "optimizer.type": "AdamX",
            "pipeline.pipeline_stages": 2,
            "adapter": {"type": "lora", "targets": ["no"]},
            "sampling": {"prompts": ["a"], "width": 40, "height": 32},
        },
    )
    errors = bench.refused(experiment, world_size=3)
    for key in ("optimizer.type", "pipeline.pipeline_stages", "adapter.targets[0]", "sampling.width"):
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
        ("seed.value=1", "seed.value: seed is no table, so it has no key value"),
    ],
)
def test_override_is_typed_like_the_file(bench: Bench, override: str, message: str) -> None:
    experiment = bench.experiment()
    assert bench.only_error(experiment, "--set", override).startswith(f"{experiment}: {message}")


# --- processes ---------------------------------------------------------------------------------------------------------


def test_stages_must_divide_the_processes(bench: Bench) -> None:
    experiment = bench.experiment(**{"pipeline.pipeline_stages": 2})
    message = "pipeline.pipeline_stages: = 2: must divide the number of processes, 3; start a multiple of 2 processes"
    assert bench.only_error(experiment, world_size=3) == f"{experiment}: {message}"


def test_check_of_a_run_of_several_processes_needs_but_one(bench: Bench) -> None:
    looked = bench.main("--config", str(bench.experiment(**{"pipeline.pipeline_stages": 2})), "--check")
    assert (looked.exit_code, looked.error) == (0, "")


def test_missing_weights_and_missing_images_are_told_at_once(bench: Bench) -> None:
    experiment = bench.experiment(images=bench.folder / "none", **{"model.mmdit": str(bench.folder / "no.safetensors")})
    told = bench.main("--config", str(experiment)).errors
    assert any("no.safetensors does not exist" in line for line in told)
    assert any("none is neither a folder" in line for line in told)


@pytest.mark.parametrize("stages", ["auto", 6])
def test_more_stages_than_layers_are_refused(bench: Bench, stages: str | int) -> None:
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
def test_weights_that_do_not_fit_are_named(bench: Bench, spoil: Callable[[dict[str, Any]], Any], message: str) -> None:
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


def test_empty_dataset_folder_is_named(bench: Bench, tmp_path: Path) -> None:
    folder = tmp_path / "empty"
    folder.mkdir()
    experiment = bench.experiment(images=folder)
    message = f"{experiment.with_name('dataset.toml')}: directory: no usable image with a caption in {folder}"
    assert bench.only_error(experiment) == message


@pytest.mark.parametrize("on_bad_file", ["error", "skip"])
def test_missing_dataset_folder_is_refused_whatever_bad_files_do(bench: Bench, tmp_path: Path, on_bad_file: str) -> None:
    experiment = bench.experiment(images=tmp_path / "none", dataset_file={"on_bad_file": on_bad_file})
    message = f"{experiment.with_name('dataset.toml')}: directory[0].path: {tmp_path / 'none'} "
    message += "is neither a folder nor a .tar or .parquet file"
    assert bench.only_error(experiment) == message


@pytest.mark.parametrize("key", ["output_dir", "cache_dir"])
def test_folder_to_write_to_that_is_a_file_is_named(bench: Bench, tmp_path: Path, key: str) -> None:
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
def test_bad_file_is_named_with_the_reason(bench: Bench, images: Path, spoil: Callable[[Path], Path], reason: str) -> None:
    path = spoil(images)
    experiment = bench.experiment(images=images)
    first, advice = bench.refused(experiment)
    assert first.startswith(f"{path}: {reason}")
    assert advice.startswith(f"{experiment.with_name('dataset.toml')}: on_bad_file: ")
    assert '"skip"' in advice


def test_check_decodes_no_pixels(bench: Bench, images: Path) -> None:
    """Nor does the scan before a run: a million images are looked through in minutes only by their headers."""
    spoil_pixels(images)
    refusal = bench.main("--config", str(bench.experiment(images=images)), "--check")
    assert refusal.exit_code == 0, refusal.error


@pytest.mark.distributed
def test_bad_files_are_left_out_when_told_so(lab: Lab, images: Path) -> None:
    """Of six images three are bad, one of them only when it is decoded; each is named once, and three are trained on."""
    bad = [spoil_caption(images), cut_off(images), spoil_pixels(images)]
    experiment = lab.experiment({"dataset_file": {"on_bad_file": "skip"}, "epochs": 1}, images)
    run = lab.run(2, experiment)
    for path in bad:
        assert run.output.count(f"skipped: {path}: ") == 1
    listed = [json.loads(line) for line in (experiment.parent / "output" / "bad_files.jsonl").read_text().splitlines()]
    assert sorted(entry["path"] for entry in listed) == sorted(map(str, bad))
    assert {entry["kind"] for entry in listed} == {"bad"}
    # Images 0, 4 and 5 are of three shapes, so each makes a step, filled up with itself.
    assert run.last_step == 3


@pytest.mark.distributed
@pytest.mark.parametrize("num_processes", [1, 2])
def test_image_that_cannot_be_decoded_ends_the_caching_pass_by_name(lab: Lab, images: Path, num_processes: int) -> None:
    path = spoil_pixels(images)
    experiment = lab.experiment({}, images)
    assert lab.finish(1, experiment, "--check").exit_code == 0, "its header is right"
    ranks = lab.start(num_processes, experiment)
    finished = ranks.wait(limit_seconds=60)
    assert finished.exit_code == 1
    assert finished.output.count(f"{path}: cannot be decoded: ") == 1
    assert "on_bad_file" in finished.output
    assert "Traceback" not in finished.output


@pytest.mark.distributed
def test_loss_that_is_no_number_stops_the_run_and_names_the_batch(lab: Lab, tmp_path: Path) -> None:
    weights = random_weights(tiny_shapes())
    weights["joint_blocks.0.x_block.mlp.fc1.bias"][0] = float("nan")
    save_file(weights, tmp_path / "spoiled.safetensors")
    experiment = lab.experiment({"model.mmdit": str(tmp_path / "spoiled.safetensors")})
    finished = lab.finish(2, experiment)
    assert finished.exit_code == 1
    assert "step 1: loss nan" in finished.output
    assert finished.output.count("0/image_") >= 4
    run = newest_run(experiment.parent / "output")
    assert not (run / "weights").exists()
    assert not (run / "checkpoints").exists()


# --- as real processes -------------------------------------------------------------------------------------------------


@pytest.mark.distributed
def test_torchrun_ends_soon_and_says_it_once(bench: Bench) -> None:
    experiment = bench.experiment(**{"optimizer.learning_rat": 1e-4})
    before = tree(bench.folder)
    finished = run_torchrun(2, "--config", str(experiment), limit_seconds=60)
    assert finished.exit_code == 1
    assert finished.output.count("did you mean `learning_rate`?") == 1
    assert finished.seconds < 30
    assert tree(bench.folder) == before


@pytest.mark.distributed
def test_deepspeed_ends_soon_and_says_it_once(bench: Bench) -> None:
    experiment = bench.experiment(**{"pipeline.pipeline_stages": 3})
    before = tree(bench.folder)
    finished = run_deepspeed(2, "--config", str(experiment), limit_seconds=60)
    assert finished.exit_code == 1
    assert finished.output.count("must divide the number of processes, 2") == 1
    assert finished.seconds < 30
    assert tree(bench.folder) == before


@pytest.mark.distributed
def test_bad_input_exits_with_1(bench: Bench) -> None:
    missing = bench.folder / "nothing.toml"
    finished = run_alone("--config", str(missing))
    assert finished.exit_code == 1
    assert f"{missing}: does not exist" in finished.output
    assert "Traceback" not in finished.output
    assert not bench.folder.exists()


@pytest.mark.distributed
def test_help_and_wrong_usage_exit_as_usual() -> None:
    shown = run_alone("--help")
    assert shown.exit_code == 0
    assert all(option in shown.output for option in ("--config", "--check", "--cache-only", "--report", "--resume", "--set"))
    assert "local_rank" not in shown.output
    wrong = run_alone("--confg", "x.toml")
    assert wrong.exit_code == 2
    assert "--config" in wrong.output


@pytest.mark.distributed
def test_check_says_what_would_happen_and_writes_nothing(bench: Bench) -> None:
    experiment = bench.experiment()
    before = tree(bench.folder)
    finished = run_alone("--config", str(experiment), "--check", "--set", "max_steps=5")
    assert finished.exit_code == 0
    assert "12 (12 examples; by bucket 16x48: 4, 32x32: 4, 48x16: 4)" in finished.output
    assert "5, 3 an epoch" in finished.output
    assert str(bench.folder / "output") in finished.output
    assert tree(bench.folder) == before


def test_check_of_a_wrong_experiment_exits_with_1(bench: Bench) -> None:
    assert len(bench.refused(bench.experiment(sead=1), "--check")) == 1


# --- only the cache ----------------------------------------------------------------------------------------------------


def shards(cache: Path) -> dict[Path, int]:
    """Every shard with its time of change."""
    return {path: path.stat().st_mtime_ns for path in cache.glob("*/*/*.safetensors")}


@pytest.mark.distributed
@pytest.mark.parametrize("option", ["--cache-only", "--report"])
def test_the_cache_alone_is_filled_and_a_run_after_it_encodes_nothing(lab: Lab, option: str) -> None:
    experiment = lab.experiment({"cache_dir": None, "max_steps": 2})
    output = experiment.parent / "output"
    finished = lab.finish(2, experiment, option)
    assert finished.exit_code == 0, finished.output
    assert {path.name for path in output.iterdir()} == {"cache", DATASET_REPORT}, "and no run folder"
    assert "a yellow circle" in (output / DATASET_REPORT).read_text(encoding="utf-8")
    before = shards(output / "cache")
    assert {path.parents[1].name.rpartition("-")[0] for path in before} == {"vae", "clip_l", "clip_g", "t5xxl"}
    run = lab.run(2, experiment)
    assert "caching: all entries are in" in run.output
    assert "caching " not in run.output
    assert shards(output / "cache") == before
    assert run.last_step == 2


@pytest.mark.distributed
def test_a_report_that_is_asked_for_is_written_anew_though_everything_is_there(lab: Lab) -> None:
    experiment = lab.experiment({"cache_dir": None, "max_steps": 2})
    page = experiment.parent / "output" / DATASET_REPORT
    assert lab.finish(1, experiment, "--cache-only").exit_code == 0
    page.write_text("an old page")
    assert lab.finish(1, experiment, "--cache-only").exit_code == 0
    assert page.read_text() == "an old page", "nothing has changed since"
    assert lab.finish(1, experiment, "--report").exit_code == 0
    assert page.read_text() != "an old page"


@pytest.mark.distributed
def test_a_cache_without_room_refuses_the_run_by_name(lab: Lab) -> None:
    experiment = lab.experiment({"cache_dir": None, "max_steps": 2})
    log = experiment.parent / "log.txt"
    finished = start_ranks(2, ["--config", str(experiment)], log, "tests.distributed.full_disk_ranks").wait()
    assert finished.exit_code == 1
    assert finished.output.count("of free disk space and caching takes") == 1
    assert f"{experiment}, line" in finished.output or f"{experiment}: cache_dir: " in finished.output
    assert "Traceback" not in finished.output
    assert not shards(experiment.parent / "output" / "cache")


# --- what a run leaves -------------------------------------------------------------------------------------------------


@pytest.mark.distributed
def test_run_folder_holds_the_settings_that_made_it(lab: Lab, tmp_path: Path) -> None:
    """config.toml and dataset.toml load to what ran, overrides included, and overrides reach the run."""
    changes = {"adapter": {"type": "lora", "rank": 2}, "optimizer.args": {"betas": [0.8, 0.9]}, "sampling.prompts": []}
    run = lab.shared_run(1, changes)
    original, resolved = load_config(run.experiment), load_config(run.folder / "config.toml")
    assert resolved.experiment.model_dump() == original.experiment.model_dump()
    shutil.copy(run.folder / "dataset.toml", tmp_path)
    moved = load_config(run.folder / "config.toml", [f"dataset={tmp_path / 'dataset.toml'}"])
    assert moved.dataset == original.dataset

    again = lab.run(1, run.experiment, "--set", "seed=3", "--set", "max_steps=2")
    overridden = load_config(again.folder / "config.toml").experiment
    assert (overridden.seed, overridden.max_steps) == (3, 2)
    assert again.last_step == 2
    assert again.folder != run.folder


@pytest.mark.distributed
def test_run_folder_holds_nothing_unfinished_and_nothing_executable(lab: Lab) -> None:
    run = lab.shared_run(1, {"adapter": {"type": "lora", "rank": 2}, "sampling.prompts": []})
    files = [path for path in run.experiment.parent.rglob("*") if path.is_file() and "log_" not in path.name]
    assert {path.suffix for path in files} == {".toml", ".jsonl", ".json", ".safetensors", ".html"}
    assert not [path for path in files if path.name.startswith(".")]
    assert newest_run(run.experiment.parent / "output") == run.folder
    assert not os.access(files[0], os.X_OK)
