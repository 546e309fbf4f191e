"""Cache keys depend on every part and never change."""

from __future__ import annotations

import os

from utils.data.cache.keys import KEY_BYTES, content_key


def test_keys_depend_on_every_part_and_on_the_boundaries() -> None:
    keys = [
        content_key(),
        content_key(""),
        content_key("", ""),
        content_key("ab", "c"),
        content_key("a", "bc"),
        content_key("abc"),
        content_key("c", "ab"),
        content_key('ab", "c'),
        content_key("a2:bc"),
        content_key("Ab", "c"),
        content_key("\u00e4"),
        content_key("a\u0308"),
    ]
    assert len(set(keys)) == len(keys)
    assert {len(key) for key in keys} == {KEY_BYTES}
    assert content_key("a", "b") == content_key("a", "b")


def test_names_that_are_not_utf8_have_keys() -> None:
    names = [os.fsdecode(name) for name in (b"\xff.png", b"\xfe.png")]
    assert len({content_key(name) for name in names}) == 2


def test_known_keys_never_change() -> None:
    """A change would silently encode every dataset again."""
    assert content_key("a photo of a red fox", "1024x1024").hex() == GOLDEN_KEY


# python -c "from utils.data.cache.keys import content_key; print(content_key('a photo of a red fox', '1024x1024').hex())"
GOLDEN_KEY = "c823d0bddddc8cf997c8575fcd9bddbc"
