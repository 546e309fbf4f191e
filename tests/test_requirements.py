"""requirements.txt pins versions within the ranges of setup.cfg, and every imported package is in both files."""

from __future__ import annotations

import ast
import configparser
import sys
from pathlib import Path

from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parent.parent
DISTRIBUTIONS = {"PIL": "pillow", "skimage": "scikit-image", "sklearn": "scikit-learn"}
OWN_PACKAGES = {"models", "utils", "examples", "tests", "train", "docs"}
TRANSITIVE = {"pydantic_core", "packaging", "psutil"}


def pins() -> dict[str, str]:
    lines = [line.split("#")[0].strip() for line in (ROOT / "requirements.txt").read_text().splitlines()]
    return dict(line.split("==") for line in lines if line)


def ranges() -> dict[str, Requirement]:
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    extras = "\n".join(setup["options.extras_require"].values())
    lines = (setup["options"]["install_requires"] + extras).split("\n")
    return {requirement.name: requirement for requirement in map(Requirement, filter(None, map(str.strip, lines)))}


def imported(*places: str) -> set[str]:
    """Names of the third-party packages that these files and folders import directly."""
    names: set[str] = set()
    for place in places:
        files = [ROOT / place] if place.endswith(".py") else sorted((ROOT / place).rglob("*.py"))
        for node in (node for file in files for node in ast.walk(ast.parse(file.read_text()))):
            if isinstance(node, ast.Import):
                names.update(alias.name.split(".")[0] for alias in node.names)
            elif isinstance(node, ast.ImportFrom) and node.module:
                names.add(node.module.split(".")[0])
    return names - set(sys.stdlib_module_names) - OWN_PACKAGES - TRANSITIVE


def test_every_pinned_version_is_in_its_range() -> None:
    pinned, allowed = pins(), ranges()
    assert pinned.keys() == allowed.keys()
    assert [name for name, version in pinned.items() if version not in allowed[name].specifier] == []


def test_everything_imported_is_pinned() -> None:
    names = imported("train.py", "models", "utils", "examples", "tests", "docs")
    assert {DISTRIBUTIONS.get(name, name) for name in names} - pins().keys() == set()


def test_the_makefile_installs_the_pinned_torch() -> None:
    assert f"torch=={pins()['torch']}" in (ROOT / "Makefile").read_text()
