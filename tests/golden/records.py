"""Records of runs as text: a header of `# key: value`, then lines of words, of which `key=value` are results."""

from __future__ import annotations

import math
from itertools import zip_longest
from pathlib import Path

import torch

PLATFORM = ("torch", "cpu_capability", "cpu_model")
"""Header entries that must be equal for a run to be reproduced bit for bit."""
NUMBERS = ("loss", "grad_norm", "learning_rate")
"""Results that are numbers; all others are hashes."""


def platform() -> dict[str, str]:
    """The header entries that the last bits of a result depend on."""
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    found = (str(torch.__version__), torch.backends.cpu.get_cpu_capability(), models[0] if models else "unknown")
    return dict(zip(PLATFORM, found, strict=True))


def header_of(record: str) -> dict[str, str]:
    lines = [line.removeprefix("# ").partition(": ") for line in record.splitlines() if line.startswith("# ")]
    return {key: value for key, _, value in lines}


def other_platform(golden: str, found: str) -> str | None:
    """Why the records cannot be expected to agree in every bit; None if they can."""
    then, now = header_of(golden), header_of(found)
    changed = [f"{key} was {then[key]!r} and is {now[key]!r}" for key in PLATFORM if then[key] != now[key]]
    return "; ".join(changed) or None


def differences(golden: str, found: str, tolerance: float | None) -> list[str]:
    """A text for each line that differs: in any character, or with a relative tolerance in words and numbers."""
    texts = []
    for before, after in zip_longest(_body(golden), _body(found), fillvalue="nothing"):
        if before != after and (tolerance is None or not _agree(before, after, tolerance)):
            texts.append(f"was {before}\nis  {after}")
    return texts


def without_metadata(record: str) -> str:
    """Without the hashes of exported files' metadata, which include every setting: later versions may have more.

    The index of a folder of shards has them in its JSON; the shards themselves are compared.
    """
    lines = record.splitlines()
    return "\n".join(" ".join(word for word in line.split(" ") if not _is_metadata(word, line)) for line in lines)


def _is_metadata(word: str, line: str) -> bool:
    return word.startswith("metadata=") or (word.startswith("json=") and ".index.json " in line)


def _body(record: str) -> list[str]:
    return [line for line in record.splitlines() if not line.startswith("# ")]


def _agree(before: str, after: str, tolerance: float) -> bool:
    """Whether two lines are of the same thing, and their numbers are close to each other; hashes may differ."""
    names, other_names = ([word.partition("=")[0] for word in line.split()] for line in (before, after))
    return names == other_names and all(
        math.isclose(value, other, rel_tol=tolerance) for value, other in zip(_numbers(before), _numbers(after), strict=True)
    )


def _numbers(line: str) -> list[float]:
    pairs = [word.partition("=") for word in line.split()]
    return [float(value) for key, _, value in pairs if key in NUMBERS and value]
