"""Folders of the quickstart: data files of installed packages, and output folders that appear when complete.

An output folder is either complete or absent, and creating it again does nothing. The contents are written to a temporary
folder beside the target, with a marker file that holds the arguments they were made with, and the folder is renamed once it
is complete. An interrupted run therefore never leaves an incomplete folder under the final name.
"""

import importlib.util
import json
import shutil
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path

MARKER = "made_with.json"
HOW_TO_INSTALL = {
    "diffsynth": "--no-deps diffsynth==1.1.9",  # only for SD3's tokenizers; later versions lack them
    "skimage": "scikit-image",
    "sklearn": "scikit-learn",
}


def package_folder(name: str) -> Path:
    """Returns the folder of an installed package without importing it; only its data files are used."""
    spec = importlib.util.find_spec(name)
    if spec is None or not spec.submodule_search_locations:
        raise SystemExit(f"the package {name} is missing; run: pip install {HOW_TO_INSTALL.get(name, name)}")
    return Path(next(iter(spec.submodule_search_locations)))


def is_complete(out: Path, arguments: Mapping[str, object]) -> bool:
    """Returns whether `out` was made with `arguments` before; exits if it is something else."""
    marker = out / MARKER
    if marker.is_file():
        made_with = json.loads(marker.read_text(encoding="utf-8"))
        if made_with == dict(arguments):
            return True
        raise SystemExit(f"{out} was made with {made_with}, not {dict(arguments)}: remove it or choose another --out")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise SystemExit(f"{out} exists and was not made by this script: remove it or choose another --out")
    return False


def make_folder(out: Path, arguments: Mapping[str, object], fill: Callable[[Path], None]) -> bool:
    """Lets `fill` write into a temporary folder and renames it to `out`; returns False if `out` was complete before."""
    if is_complete(out, arguments):
        return False
    out.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{out.name}.", dir=out.parent))
    try:
        temporary.chmod(0o755)  # only the owner can read a folder of mkdtemp; others may read a dataset
        fill(temporary)
        (temporary / MARKER).write_text(json.dumps(dict(arguments)) + "\n", encoding="utf-8")
        temporary.replace(out)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return True
