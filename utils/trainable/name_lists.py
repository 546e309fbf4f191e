"""Long lists of names in messages, shortened."""

from __future__ import annotations

from collections.abc import Iterable

MAX_NAMES_SHOWN = 3


def shortened(names: Iterable[str]) -> str:
    """Returns the first names, and how many more there are: "a, b, c and 4 more"."""
    listed = list(names)
    more = f" and {len(listed) - MAX_NAMES_SHOWN} more" if len(listed) > MAX_NAMES_SHOWN else ""
    return ", ".join(listed[:MAX_NAMES_SHOWN]) + more
