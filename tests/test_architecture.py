"""How the program is laid out, checked on its syntax trees: who may import whom, and habits that are easily broken."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

LEVELS = {
    "models/family.py": 0,
    "models/sd3/__init__.py": 0,
    "models/sd3/settings.py": 0,
    "models/sd3/mmdit.py": 0,
    "models/tensor_files.py": 0,
    "models/sd3/diffusers_names.py": 1,
    "models/sd3/layers.py": 1,
    "models/sd3/sources.py": 1,
    "models/sd3/tokenizers.py": 2,
    "models/sd3/vae.py": 2,
    "models/sd3/text_encoders.py": 3,
    "models/sd3/lora_files.py": 2,
    "models/sd3/weights.py": 3,
    "models/sd3/family.py": 4,
    "models/__init__.py": 4,
    "utils/__init__.py": 0,
    "utils/config/__init__.py": 0,
    "utils/data/__init__.py": 0,
    "utils/data/cache/__init__.py": 0,
    "utils/data/encoding/__init__.py": 0,
    "utils/data/sources/__init__.py": 0,
    "utils/dataset_report/__init__.py": 0,
    "utils/background.py": 0,
    "utils/data/sources/image_files.py": 0,
    "utils/report/html.py": 2,
    "utils/data/sources/rows.py": 2,
    "utils/data/sources/archive_entries.py": 2,
    "utils/data/sources/reader_process.py": 4,
    "utils/data/sources/readers.py": 5,
    "utils/data/sources/captions.py": 2,
    "utils/data/sources/tags.py": 1,
    "utils/data/columns.py": 1,
    "utils/data/cache/keys.py": 1,
    "utils/data/cache/locks.py": 0,
    "utils/data/cache/shards.py": 2,
    "utils/data/cache/store.py": 3,
    "utils/data/cache/maintenance.py": 3,
    "utils/data/cache/__main__.py": 4,
    "utils/data/sources/directory_scan.py": 2,
    "utils/data/sources/tar_files.py": 3,
    "utils/data/sources/parquet_files.py": 3,
    "utils/data/sources/caption_sources.py": 3,
    "utils/data/image_table.py": 3,
    "utils/data/examples.py": 4,
    "utils/data/encoding/text_storage.py": 0,
    "utils/data/encoding/encoded.py": 5,
    "utils/data/encoding/hashing.py": 7,
    "utils/data/encoding/encoder_pass.py": 7,
    "utils/data/sources/listing.py": 6,
    "utils/data/sources/paired_images.py": 7,
    "utils/data/scan.py": 8,
    "utils/data/encoding/plan.py": 6,
    "utils/report/dataset_facts.py": 3,
    "utils/report/dataset_page.py": 4,
    "utils/report/dataset_gather.py": 8,
    "utils/evaluation/__init__.py": 0,
    "utils/pipeline/__init__.py": 0,
    "utils/previews/__init__.py": 0,
    "utils/objective/rectified_flow.py": 0,
    "utils/objective/timestep_sampling.py": 0,
    "utils/previews/prompts.py": 0,
    "utils/config/presets.py": 0,
    "utils/config/lines.py": 0,
    "utils/randomness.py": 0,
    "utils/distributed/group.py": 0,
    "utils/files/atomic.py": 0,
    "utils/files/safetensors_writer.py": 0,
    "utils/data/buckets.py": 0,
    "utils/pipeline/partition.py": 0,
    "utils/pipeline/optimizer_state.py": 0,
    "utils/tracking/metrics.py": 1,
    "utils/report/plots.py": 1,
    "utils/previews/samplers.py": 1,
    "utils/evaluation/statistics.py": 1,
    "utils/trainable/lora.py": 1,
    "utils/data/sources/decoding.py": 1,
    "utils/data/encoding/masks.py": 2,
    "utils/config/schema/tables.py": 5,
    "utils/config/load.py": 6,
    "utils/config/document.py": 6,
    "utils/optim/registry.py": 6,
    "utils/objective/objective.py": 6,
    "utils/export/metadata.py": 6,
    "utils/trainable/targets.py": 6,
    "utils/data/dataset.py": 6,
    "utils/previews/prompt_list.py": 7,
    "utils/evaluation/points.py": 7,
    "utils/data/batches.py": 5,
    "utils/data/encoding/precompute.py": 8,
    "utils/evaluation/comparison.py": 8,
    "utils/pipeline/feed.py": 8,
    "utils/pipeline/engine.py": 9,
    "utils/checkpoint/save.py": 10,
    "utils/previews/sampling.py": 10,
    "utils/report/run_page.py": 9,
    "utils/evaluation/evaluate.py": 10,
    "utils/export/weights.py": 11,
    "utils/run/prepare.py": 12,
    "utils/run/banner.py": 13,
    "utils/run/events.py": 14,
    "train.py": 15,
}
"""A file imports only files of lower numbers."""

DEEPSPEED_FILES = {"utils/distributed/group.py", "utils/pipeline/engine.py"}
MAX_FUNCTION_LINES = 60
JUNK_DRAWERS = {"common", "misc", "helpers", "helper", "util", "train_util", "stuff"}
FIELD_FILES = (
    *sorted(str(path.relative_to(ROOT)) for path in (ROOT / "utils/config/schema").glob("*.py")),
    "models/sd3/settings.py",
)


def python_files(*places: str) -> list[str]:
    """Paths relative to the root."""
    found = []
    for place in places:
        path = ROOT / place
        found += [path] if path.suffix == ".py" else sorted(path.rglob("*.py"))
    return [str(path.relative_to(ROOT)) for path in found if path.is_file()]


PROGRAM = python_files("train.py", "models", "utils")


@cache
def tree(file: str) -> ast.Module:
    return ast.parse((ROOT / file).read_text(encoding="utf-8"))


def imported_modules(file: str) -> Iterator[str]:
    """Dotted names of everything imported anywhere in the file; of `from a import b`, both a.b and a."""
    for node in ast.walk(tree(file)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}:{node.lineno} imports relatively"
            assert node.module is not None
            for alias in node.names:
                yield f"{node.module}.{alias.name}"
            yield node.module


def file_of(module: str) -> str | None:
    """The program's file a dotted name stands for; None for what is not ours, or is a name inside a file."""
    path = module.replace(".", "/")
    for candidate in (f"{path}.py", f"{path}/__init__.py"):
        if (ROOT / candidate).is_file() and candidate.split("/")[0] in ("models", "utils", "train.py"):
            return candidate
    return None


def imported_files(file: str) -> set[str]:
    found = {file_of(module) for module in imported_modules(file)}
    # `from utils import randomness` runs the empty utils/__init__.py, which is no dependency worth a level.
    return {path for path in found if path is not None and path != file}


def attribute_names(file: str) -> set[str]:
    return {node.attr for node in ast.walk(tree(file)) if isinstance(node, ast.Attribute)}


def dotted(node: ast.AST) -> str:
    """`torch.cuda.synchronize` of such an expression; "" for others."""
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute):
        inner = dotted(node.value)
        return f"{inner}.{node.attr}" if inner else ""
    return ""


def test_every_file_has_a_level_and_every_level_a_file() -> None:
    assert set(PROGRAM) == set(LEVELS)


def test_the_documented_table_of_levels_is_this_one() -> None:
    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    documented = {path: int(level) for level, path in re.findall(r"^ *(\d+) +(\S+\.py) ", text, flags=re.MULTILINE)}
    empty = {file for file in PROGRAM if not tree(file).body}
    assert documented == {path: level for path, level in LEVELS.items() if path not in empty}


@pytest.mark.parametrize("file", PROGRAM)
def test_a_file_imports_only_lower_levels(file: str) -> None:
    too_high = {path: LEVELS[path] for path in imported_files(file) if LEVELS[path] >= LEVELS[file]}
    assert not too_high, f"{file} is of level {LEVELS[file]}"


def test_models_know_nothing_of_the_trainer() -> None:
    for file in python_files("models"):
        assert not [path for path in imported_files(file) if not path.startswith("models/")], file
        assert not [name for name in imported_modules(file) if name.split(".")[0] in ("deepspeed", "toml")], file


def test_nothing_imports_train() -> None:
    for file in python_files("models", "utils"):
        assert "train" not in {module.split(".")[0] for module in imported_modules(file)}, file


def test_deepspeed_is_imported_in_two_files() -> None:
    importing = {file for file in PROGRAM if "deepspeed" in {name.split(".")[0] for name in imported_modules(file)}}
    assert importing == DEEPSPEED_FILES


def test_the_trainer_names_no_model_family() -> None:
    for file in python_files("train.py", "utils"):
        assert not [name for name in imported_modules(file) if name.startswith("models.sd3")], file


@pytest.mark.parametrize("file", [*PROGRAM, *python_files("examples")])
def test_no_function_is_longer_than_a_screen(file: str) -> None:
    functions = [node for node in ast.walk(tree(file)) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]
    lengths = {node.name: (node.end_lineno or node.lineno) - node.lineno + 1 for node in functions}
    assert not {name: length for name, length in lengths.items() if length > MAX_FUNCTION_LINES}


def test_no_junk_drawers() -> None:
    assert not [file for file in [*PROGRAM, *python_files("examples")] if Path(file).stem in JUNK_DRAWERS]


@pytest.mark.parametrize("file", PROGRAM)
def test_no_accelerator_is_named(file: str) -> None:
    for node in ast.walk(tree(file)):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            assert node.value != "cuda" and not node.value.startswith("cuda:"), f"{file}:{node.lineno}"
        assert not dotted(node).startswith("torch.cuda"), f"{file}: {dotted(node)}"


@pytest.mark.parametrize("file", PROGRAM)
def test_nothing_executable_is_read_from_files(file: str) -> None:
    executable = {"pickle", "cPickle", "dill", "joblib", "cloudpickle", "marshal", "shelve"}
    assert not executable & {module.split(".")[0] for module in imported_modules(file)}
    for node in ast.walk(tree(file)):
        if isinstance(node, ast.Call):
            assert dotted(node.func) not in ("torch.load", "eval", "exec"), f"{file}:{node.lineno}"
            for keyword in node.keywords:
                value = keyword.value.value if isinstance(keyword.value, ast.Constant) else None
                assert (keyword.arg, value) not in (
                    ("allow_pickle", True),
                    ("weights_only", False),
                    ("trust_remote_code", True),
                ), f"{file}:{node.lineno}"


@pytest.mark.parametrize("file", [file for file in PROGRAM if file != "utils/randomness.py"])
def test_only_randomness_draws_random_numbers(file: str) -> None:
    assert not {"random", "secrets", "numpy.random"} & set(imported_modules(file))
    drawing = {"rand", "randn", "randint", "randperm", "rand_like", "randn_like", "randint_like", "normal", "bernoulli"}
    forbidden = {f"torch.{name}" for name in drawing | {"manual_seed", "seed", "Generator", "multinomial"}}
    forbidden |= {"np.random", "numpy.random"}
    assert not forbidden & {dotted(node) for node in ast.walk(tree(file))}
    assert not {"normal_", "uniform_", "bernoulli_", "random_", "exponential_"} & attribute_names(file)


def schema_fields() -> list[tuple[str, str, str]]:
    """(file, class, field) of every key a user can write."""
    return [
        (file, node.name, statement.target.id)
        for file in FIELD_FILES
        for node in tree(file).body
        if isinstance(node, ast.ClassDef)
        for statement in node.body
        if isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name)
    ]


@pytest.mark.parametrize(("file", "table", "field"), schema_fields())
def test_every_key_is_read(file: str, table: str, field: str) -> None:
    assert any(field in attribute_names(other) for other in PROGRAM), f"{table}.{field} is documented and never read"


def test_the_keys_are_found() -> None:
    assert len(schema_fields()) > 45
