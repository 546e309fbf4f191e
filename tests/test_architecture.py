"""The architecture: order of folders, sizes of files and functions, forbidden imports and calls, and keys that are read."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

from docs import list_files

ROOT = Path(__file__).parents[1]
FLOORS = (
    ("train.py",),
    ("utils/run",),
    ("utils/report",),
    ("utils/export",),
    ("utils/evaluation", "utils/previews", "utils/checkpoint"),
    ("utils/pipeline",),
    ("utils/trainable",),
    ("utils/optim", "utils/data", "utils/tracking"),
    ("utils/objective",),
    ("utils/config",),
    ("utils/distributed", "utils/files", "utils/background.py", "utils/console.py", "utils/randomness.py"),
    ("models",),
)
"""From top to bottom. A file imports from its own floor and from lower ones."""
DEEPSPEED_FOLDERS = ("utils/distributed/", "utils/pipeline/")
MAX_FILE_LINES = 500
MAX_FUNCTION_LINES = 60
MAX_STORY_LINES = 150
JUNK_DRAWERS = {"common", "misc", "helpers", "helper", "util", "train_util", "stuff"}
FIELD_FILES = (
    *(f"utils/config/schema/{path.name}" for path in sorted((ROOT / "utils/config/schema").glob("*.py"))),
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
    """Dotted names of everything a file imports anywhere; `from a import b` gives both a.b and a."""
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
    """The program's file with that dotted name; None for other modules and for names within a file."""
    path = module.replace(".", "/")
    for candidate in (f"{path}.py", f"{path}/__init__.py"):
        if (ROOT / candidate).is_file() and candidate.split("/")[0] in ("models", "utils", "train.py"):
            return candidate
    return None


def imported_files(file: str) -> set[str]:
    found = {file_of(module) for module in imported_modules(file)}
    # `from utils import randomness` imports the empty utils/__init__.py, which does not count as a dependency.
    return {path for path in found if path is not None and path != file}


@cache
def attribute_names(file: str) -> set[str]:
    return {node.attr for node in ast.walk(tree(file)) if isinstance(node, ast.Attribute)}


def dotted(node: ast.AST) -> str:
    """The dotted name of an expression such as `torch.cuda.synchronize`; "" for other expressions."""
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute):
        inner = dotted(node.value)
        return f"{inner}.{node.attr}" if inner else ""
    return ""


def floor_of(file: str) -> int:
    """The floor of a file, 0 at the top."""
    return next(
        number
        for number, places in enumerate(FLOORS)
        if any(file == place or file.startswith(place + "/") for place in places)
    )


@pytest.mark.parametrize("file", [file for file in PROGRAM if tree(file).body])
def test_file_imports_from_its_own_floor_and_lower_ones(file: str) -> None:
    assert not [path for path in imported_files(file) if tree(path).body and floor_of(path) < floor_of(file)]


def test_imports_of_files_form_no_cycle() -> None:
    assert all(list_files.level(file) >= 0 for file in list_files.program_files())


def test_documented_table_of_files_is_current() -> None:
    """`python -m docs.list_files` writes it."""
    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    assert list_files.table() in text
    assert all(f"`{Path(file).name}`" in text for file in list_files.program_files())


def test_documented_folders_are_those_of_the_floors() -> None:
    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8").partition("## Where to change what")[0]
    documented = re.findall(r"^\| `((?:utils|models)/\w*/?|utils/\w+\.py|train\.py)` \|", text, flags=re.MULTILINE)
    floors = [floor_of(place.rstrip("/") + ("/x.py" if place.endswith("/") else "")) for place in documented]
    assert len(documented) >= 17 and floors == sorted(floors)


def test_train_py_is_a_page() -> None:
    assert len((ROOT / "train.py").read_text(encoding="utf-8").splitlines()) < MAX_STORY_LINES


@pytest.mark.parametrize("file", python_files("train.py", "models", "utils", "examples", "tests", "docs"))
def test_no_file_is_too_long(file: str) -> None:
    assert len((ROOT / file).read_text(encoding="utf-8").splitlines()) <= MAX_FILE_LINES


def test_models_know_nothing_of_the_trainer() -> None:
    for file in python_files("models"):
        assert not [path for path in imported_files(file) if not path.startswith("models/")], file
        assert not [name for name in imported_modules(file) if name.split(".")[0] in ("deepspeed", "toml")], file


def test_nothing_imports_train() -> None:
    for file in python_files("models", "utils"):
        assert "train" not in {module.split(".")[0] for module in imported_modules(file)}, file


def test_deepspeed_is_imported_in_two_folders() -> None:
    importing = {file for file in PROGRAM if "deepspeed" in {name.split(".")[0] for name in imported_modules(file)}}
    assert importing
    assert not [file for file in importing if not file.startswith(DEEPSPEED_FOLDERS)]


def test_trainer_names_no_model_family() -> None:
    for file in python_files("train.py", "utils"):
        assert not [name for name in imported_modules(file) if name.startswith("models.sd3")], file


@pytest.mark.parametrize("file", [*PROGRAM, *python_files("examples")])
def test_no_function_is_too_long(file: str) -> None:
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
    """(file, class, field) of every configuration key."""
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
