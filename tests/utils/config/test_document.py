"""The generated page of all keys."""

from __future__ import annotations

from pathlib import Path

from utils.config.document import document
from utils.config.load import known_keys
from utils.config.schema.dataset import DatasetConfig
from utils.config.schema.model import experiment_class

PAGE = Path(__file__).resolve().parents[3] / "docs" / "configuration.md"


def test_page_is_generated_from_the_current_schema() -> None:
    """`make docs` updates the page."""
    assert PAGE.read_text(encoding="utf-8") == document()


def test_every_key_has_a_description() -> None:
    page = document()
    for table in (experiment_class("sd3"), DatasetConfig):
        for key, places in known_keys(table).items():
            if f"[{key}]" not in page and f".{key}]" not in page:
                assert page.count(f"| `{key}` |") >= len(places), key
    assert "| None |" not in page
