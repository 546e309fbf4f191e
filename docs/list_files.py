"""Writes the table of files in docs/architecture.md:  python -m docs.list_files

Each line has the import level of a file, its path, and the first sentence of its docstring. The level is the length of the
longest chain of imports below the file.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "architecture.md"
START, END = "<!-- files -->\n", "<!-- end of files -->\n"


@cache
def program_files() -> list[str]:
    """Paths of the program's files, relative to the root; empty files are not listed."""
    paths = [ROOT / "train.py", *_by_folder(ROOT / "models"), *_by_folder(ROOT / "utils")]
    return [str(path.relative_to(ROOT)) for path in paths if path.read_text(encoding="utf-8").strip()]


def _by_folder(root: Path) -> list[Path]:
    return sorted(root.rglob("*.py"), key=lambda path: (path.parent, path.name))


@cache
def _tree(file: str) -> ast.Module:
    return ast.parse((ROOT / file).read_text(encoding="utf-8"))


@cache
def imported_files(file: str) -> set[str]:
    """The program's files that a file imports anywhere, directly."""
    names: list[str] = []
    for node in ast.walk(_tree(file)):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names += [node.module or "", *(f"{node.module}.{alias.name}" for alias in node.names)]
    candidates = {name.replace(".", "/") + ending for name in names for ending in (".py", "/__init__.py")}
    return candidates & set(program_files()) - {file}


@cache
def level(file: str) -> int:
    """The import level of a file; RecursionError where imports form a cycle."""
    return 1 + max(map(level, imported_files(file)), default=-1)


def first_sentence(file: str) -> str:
    """The first sentence of the file's docstring, for a cell of a Markdown table."""
    text = " ".join((ast.get_docstring(_tree(file)) or "").split("\n\n")[0].split())
    return text.split(". ")[0].rstrip(".").replace("|", r"\|")


def table() -> str:
    """The table as Markdown, by folder."""
    return "".join(_lines())


def _lines() -> Iterator[str]:
    folder = None
    for file in program_files():
        if folder != (folder := str(Path(file).parent)):
            yield f"\n| {folder if folder != '.' else ''} | level | |\n|---|---|---|\n"
        yield f"| `{Path(file).name}` | {level(file)} | {first_sentence(file)} |\n"


def main() -> None:
    before, _, rest = PAGE.read_text(encoding="utf-8").partition(START)
    after = rest.partition(END)[2]
    PAGE.write_text(before + START + table() + "\n" + END + after, encoding="utf-8")


if __name__ == "__main__":
    main()
