"""Captions from text files and tables, their errors, and shuffled tag orders."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest

from utils.data.sources.captions import read_caption, read_caption_table, split_lines
from utils.data.sources.decoding import BadFile
from utils.data.sources.tags import TagShuffle

TAGS = "  fox, snow , red fur,, night,1girl, moon "
SHUFFLE = TagShuffle(num_orders=8, delimiter=", ", keep_tokens=2)


@pytest.fixture
def write(tmp_path: Path) -> Callable[[str, str | bytes], Path]:
    def write_file(name: str, content: str | bytes) -> Path:
        path = tmp_path / name
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return path

    return write_file


Write = Callable[[str, str | bytes], Path]


@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"])
def test_caption_is_its_file_without_byte_order_mark_and_surrounding_white_space(write: Write, mark: bytes) -> None:
    assert (
        read_caption(write("a.txt", mark + " \n ein Fuchs – 狐\r\nim Schnee\r \n".encode())) == "ein Fuchs – 狐\nim Schnee"
    )
    assert read_caption(write("a.txt", mark)) == ""


def test_text_that_is_not_utf8_is_rejected_with_the_byte(write: Write) -> None:
    for mark in (b"", b"\xef\xbb\xbf"):
        with pytest.raises(BadFile) as caught:
            read_caption(write("a.txt", mark + "cafe au lait, caf".encode() + b"\xe9 noir"))
        assert caught.value.reason == f"is not UTF-8: byte {len(mark) + 17} is 0xe9"
    with pytest.raises(BadFile, match="is not UTF-8: byte 0 is 0xff"):
        read_caption(write("a.txt", "a fox".encode("utf-16")))


def test_unreadable_caption_is_rejected_with_the_system_s_reason(tmp_path: Path) -> None:
    with pytest.raises(BadFile, match="cannot be read: No such file or directory"):
        read_caption(tmp_path / "none.txt")
    with pytest.raises(BadFile, match="cannot be read: Is a directory"):
        read_caption(tmp_path)


def test_each_non_blank_line_is_a_caption() -> None:
    assert split_lines("a fox\n\n  in snow \n") == ["a fox", "in snow"]
    assert split_lines("one\u2028line\x0bonly") == ["one\u2028line\x0bonly"]
    assert split_lines(" \n\n") == split_lines("") == [""]


def test_all_table_formats_give_the_same_captions(write: Write) -> None:
    expected = {"fox.jpg": ['a fox,\n"red"'], "sub/owl.png": ["an owl"], "elk": [""]}
    plain = {"fox.jpg": ' a fox,\n"red" ', "sub/owl.png": ["an owl"], "elk": ""}
    scripts = {
        "fox.jpg": {"caption": 'a fox,\n"red"', "tags": "fox, red"},
        "sub/owl.png": {"tags": "an owl", "train_resolution": [64, 64]},
        "elk": {"caption": None, "tags": " "},
    }
    lines = [
        {"file_name": "fox.jpg", "text": 'a fox,\n"red"', "seed": 3},
        {"file_name": "sub/owl.png", "caption": ["an owl "]},
        {"file_name": "elk", "text": None, "caption": ""},
    ]
    jsonl = "\r\n".join(json.dumps(line) for line in lines)
    assert read_caption_table(write("captions.json", json.dumps(plain))) == expected
    assert read_caption_table(write("meta.JSON", json.dumps(scripts))) == expected
    assert read_caption_table(write("metadata.jsonl", f"\ufeff{jsonl}\r\n\r\n")) == expected
    assert (
        read_caption_table(
            write("metadata.csv", '\ufefffile_name,id,text\nfox.jpg,1,"a fox,\n""red"""\n\nsub/owl.png,2,an owl\nelk,3,\n')
        )
        == expected
    )


def test_several_captions_of_one_image_keep_their_order(write: Write) -> None:
    assert read_caption_table(write("captions.json", '{"a.png": ["z", " b", "", "z"]}')) == {"a.png": ["z", "b", "", "z"]}


def test_line_separator_inside_a_json_string_does_not_end_the_line(write: Write) -> None:
    line = json.dumps({"file_name": "a.png", "text": "one\u2028two\x85three"}, ensure_ascii=False)
    assert read_caption_table(write("metadata.jsonl", line)) == {"a.png": ["one\u2028two\x85three"]}


def test_image_whose_caption_is_null_is_skipped(write: Write) -> None:
    assert read_caption_table(write("captions.json", '{"a": null, "b": {"caption": null}, "c": "c"}')) == {"c": ["c"]}
    assert read_caption_table(write("metadata.jsonl", '{"file_name": "a", "text": null}')) == {}


def test_duplicate_name_is_allowed_only_with_the_same_caption(write: Write) -> None:
    once = '{"file_name": "a.png", "text": "x"}\n'
    assert read_caption_table(write("metadata.jsonl", once + once)) == {"a.png": ["x"]}
    with pytest.raises(BadFile, match="^.*: line 3: 'a.png' already has a different caption above$"):
        read_caption_table(write("metadata.jsonl", once + once + once.replace('"x"', '"y"')))
    with pytest.raises(BadFile, match="key 'a.png': appears twice with different values"):
        read_caption_table(write("captions.json", '{"a.png": "x", "a.png": "y"}'))


NO_KEY = "key 'a.png': has none of the keys text, caption, captions, prompt and no string under tags"
WRONG = [
    ("captions.json", b'{"a.png": "caf\xe9"}', "is not UTF-8: byte 14 is 0xe9"),
    ("captions.json", "", "is not JSON: Expecting value (line 1, column 1)"),
    ("captions.json", '{"a.png":\n "x" 3}', "is not JSON: Expecting ',' delimiter (line 2, column 6)"),
    ("captions.json", "[" * 100_000, "is not usable JSON: its brackets are nested too deeply"),
    ("captions.json", "[]", "is a list: must be an object of names and captions"),
    ("captions.json", '{"": "x"}', "key '': must be a name"),
    ("captions.json", '{"a\\n.png": 3}', "key 'a\\n.png': is a number: must be a string or a list of strings"),
    ("captions.json", '{"a.png": true}', "key 'a.png': is true or false: must be a string or a list of strings"),
    ("captions.json", '{"a.png": ["x", {}]}', "key 'a.png': has an object: must be a string or a list of strings"),
    ("captions.json", '{"a.png": []}', "key 'a.png': is an empty list: must be a string or a list of at least one"),
    ("captions.json", '{"a.png": "\\ud83d"}', "key 'a.png': has an unpaired surrogate, which is not a character"),
    ("captions.json", '{"a.png": {}}', NO_KEY),
    ("meta.json", '{"a.png": {"tags": ["x"]}}', NO_KEY),
    ("metadata.jsonl", '\n{"file_name": "a"', "line 2: is not JSON: Expecting ',' delimiter (line 1, column 18)"),
    ("metadata.jsonl", '"a.png"', "line 1: is a string: must be an object"),
    ("metadata.jsonl", '{"text": "x"}', "line 1: file_name must be the name of an image"),
    ("metadata.jsonl", '{"file_name": "", "text": "x"}', "line 1: file_name must be the name of an image"),
    ("metadata.jsonl", '{"file_name": "a", "text": 1}', "line 1: text is a number: must be a string or a list of strings"),
    ("metadata.csv", "name,text", "line 1: the header must have file_name and one of text, caption, captions, prompt, tags"),
    ("metadata.csv", "file_name,text,text\n", "line 1: the header contains a name twice"),
    ("metadata.csv", 'file_name,text\na,"x\ny"\nb,y,z\n', "line 4: has 3 fields, but the header has 2"),
    ("metadata.csv", 'file_name,text\na,"x\ny",z', "line 2: has 3 fields, but the header has 2"),
    ("metadata.csv", 'file_name,text\na,"x\n', "line 2: is not CSV: unexpected end of data"),
    ("metadata.csv", "file_name,text\n,x\n", "line 2: file_name must be the name of an image"),
    ("captions.toml", "", "is not a caption table: its name must end in .json, .jsonl, .csv"),
]


@pytest.mark.parametrize(("name", "content", "reason"), WRONG)
def test_invalid_table_is_rejected_with_the_location(write: Write, name: str, content: str | bytes, reason: str) -> None:
    path = write(name, content)
    with pytest.raises(BadFile) as caught:
        read_caption_table(path)
    assert (caught.value.path, caught.value.reason) == (path, reason)


def test_long_names_are_shortened_in_messages(write: Write) -> None:
    with pytest.raises(BadFile) as caught:
        read_caption_table(write("captions.json", json.dumps({"x" * 10**6: 3})))
    assert len(caught.value.reason) < 200


def test_order_0_is_the_caption_as_written() -> None:
    assert SHUFFLE.order(TAGS, 0) == TAGS


def test_other_orders_permute_all_tags_but_the_kept_ones() -> None:
    orders = [SHUFFLE.order(TAGS, number).split(", ") for number in range(1, 8)]
    assert all(order[:2] == ["fox", "snow"] for order in orders)
    assert all(Counter(order) == Counter(["fox", "snow", "red fur", "night", "1girl", "moon"]) for order in orders)
    assert len({tuple(order) for order in orders}) > 3


def test_order_depends_only_on_caption_and_number() -> None:
    other = TagShuffle(num_orders=99, delimiter=", ", keep_tokens=2)
    assert [other.order(TAGS, number) for number in range(8)] == [SHUFFLE.order(TAGS, number) for number in range(8)]
    assert SHUFFLE.order(TAGS, 1) == "fox, snow, red fur, moon, 1girl, night"


def test_captions_of_the_same_length_are_ordered_differently() -> None:
    letters, digits = "abcdefgh", "12345678"
    free = TagShuffle(num_orders=2, delimiter=",", keep_tokens=0)
    first, second = free.order(",".join(letters), 1).split(","), free.order(",".join(digits), 1).split(",")
    assert [letters.index(tag) for tag in first] != [digits.index(tag) for tag in second]


@pytest.mark.parametrize("caption", ["", " fox ", "a, b", "a ,b,c,", "a,b,, ,"])
def test_fewer_than_two_movable_tags_stay_as_written(caption: str) -> None:
    assert {SHUFFLE.order(caption, number) for number in range(8)} == {caption}


def test_tags_are_split_and_joined_only_at_the_delimiter() -> None:
    bars = TagShuffle(num_orders=20, delimiter=" | ", keep_tokens=0)
    assert {bars.order("a, b|c |d", number) for number in range(1, 20)} <= {
        "a, b | c | d", "a, b | d | c", "c | a, b | d", "c | d | a, b", "d | a, b | c", "d | c | a, b",
    }  # fmt: skip
    words = TagShuffle(num_orders=20, delimiter=" ", keep_tokens=1)
    assert {words.order("a b, c", number) for number in range(1, 20)} == {"a b, c", "a c b,"}


@pytest.mark.skipif(os.geteuid() == 0, reason="root can read everything")
def test_unreadable_table_is_rejected(write: Write) -> None:
    path = write("captions.json", "{}")
    path.chmod(0)
    with pytest.raises(BadFile, match="cannot be read: Permission denied"):
        read_caption_table(path)
