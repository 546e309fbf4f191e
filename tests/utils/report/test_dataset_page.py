"""The dataset page as text: its content, the escaping of users' texts, and that it loads nothing from elsewhere."""

from __future__ import annotations

import re
from base64 import b64encode
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache
from itertools import pairwise

import pytest

from tests.utils.report.html_elements import Page
from tests.utils.report.make_facts import ATTACK, UNBROKEN, empty_facts, hostile_facts, usual_facts
from utils.report.dataset_facts import BucketFacts, CutCaption, DatasetFacts, EncoderFacts
from utils.report.dataset_page import MAX_CHARACTERS, MAX_GROUP, MAX_LISTED, render
from utils.report.html import html_of
from utils.report.plots import MAX_BARS, token_bars

HEADINGS = ["Summary", "Buckets", "Images", "Captions", "Exposure", "Duplicates", "Skipped", "Bad files"]
USUAL, HOSTILE, EMPTY = usual_facts(), hostile_facts(), empty_facts()


@cache
def usual_page() -> str:
    return render(USUAL)


@cache
def hostile_page() -> str:
    return render(HOSTILE)


def pages() -> list[Page]:
    return [Page(usual_page()), Page(hostile_page())]


def headings(text: str) -> list[str]:
    return re.findall("<h2>(.*?)</h2>", text)


def section(text: str, heading: str) -> str:
    return text.split(f"<h2>{heading}</h2>")[1].split("</section>")[0]


def with_captions(*captions: str) -> str:
    """A page that has only images with these captions."""
    thumbnails = [replace(USUAL.thumbnails[0], caption=caption) for caption in captions]
    return render(replace(EMPTY, thumbnails=thumbnails))


def with_cut(kept: str, cut: str) -> str:
    encoder = EncoderFacts("t5xxl", 77, [(90, 1)], 1, [CutCaption("a.jpg", kept, cut, 90)])
    return render(replace(EMPTY, encoders=[encoder]))


# --- content -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("page", [usual_page, hostile_page])
def test_full_page_has_every_section_and_a_link_to_it(page: Callable[[], str]) -> None:
    assert headings(page()) == HEADINGS
    assert [link["href"] for link in Page(page()).all("a")] == [f"#{name.lower().replace(' ', '-')}" for name in HEADINGS]


@pytest.mark.parametrize(
    ("fields", "heading"),
    [
        (["rows"], "Summary"),
        (["warnings"], "Summary"),
        (["buckets"], "Buckets"),
        (["thumbnails"], "Images"),
        (["encoders"], "Captions"),
        (["exposure"], "Exposure"),
        (["duplicates", "num_duplicates"], "Duplicates"),
        (["skipped", "num_skipped"], "Skipped"),
        (["bad_files", "num_bad"], "Bad files"),
    ],
)
def test_sections_without_content_are_omitted(fields: Sequence[str], heading: str) -> None:
    text = render(replace(EMPTY, **{field: getattr(USUAL, field) for field in fields}))
    assert headings(text) == [heading]


def test_empty_dataset_has_a_page() -> None:
    text = render(EMPTY)
    assert headings(text) == [] and Page(text).text.split() == ["Nothing", "Nothing"]


def test_the_same_facts_give_the_same_page() -> None:
    assert render(usual_facts()) == usual_page()


def test_buckets_have_counts_and_bars() -> None:
    text = section(usual_page(), "Buckets")
    assert re.findall(r"<td>([\d,]+)</td>", text)[:5] == ["310", "640", "310", "20", "41"]
    assert re.findall(r"<td>([\d,]+)</td>", text)[-5:] == ["1,412", "1,768", "310", "46", "53"]
    assert re.findall(r"<td>(\d\.\d\d)</td>", text) == ["1.03", "1.01", "1.02", "5.33", "1.03"], "factors"
    bars = [sum(map(float, re.findall(r"width:([\d.]+)%", bar))) for bar in text.split('class="bar"')[1:]]
    assert bars == pytest.approx([100 * bucket.shown_per_epoch / 808 for bucket in USUAL.buckets], abs=0.01)


def test_draws_that_differ_between_epochs_are_means_with_a_decimal() -> None:
    text = section(render(replace(EMPTY, buckets=[BucketFacts("32x32", 8, 32 / 3, 8 / 3, 0)])), "Buckets")
    assert re.findall(r"<td>([\d.,]+)</td>", text) == ["8", "10.7", "0", "2.7", "1.33", "0"]


def test_card_has_both_images_the_crop_frame_and_its_texts() -> None:
    image = replace(USUAL.thumbnails[0], crop=(0.125, 0.0, 0.875, 1.0), flipped=True)
    text = section(render(replace(EMPTY, thumbnails=[image])), "Images")
    sources = [f"data:image/jpeg;base64,{b64encode(jpeg).decode()}" for jpeg in (image.original, image.encoded)]
    assert re.findall('src="(.*?)"', text) == sources
    assert 'class="crop" style="left:12.500%;top:0.000%;width:75.000%;height:100.000%"' in text
    assert "1300x1000, 25% cropped, flipped" in text and image.image in text


@pytest.mark.parametrize(
    ("crop", "words"),
    [((0, 0, 1, 1), "nothing cropped"), ((0, 0, 1, 0.995), "less than 1% cropped"), ((0, 0, 0.5, 0.5), "75% cropped")],
)
def test_card_states_how_much_is_cropped(crop: tuple[float, float, float, float], words: str) -> None:
    text = render(replace(EMPTY, thumbnails=[replace(USUAL.thumbnails[0], crop=crop, flipped=False)]))
    assert f"1300x1000, {words}</div>" in text


def test_images_are_listed_under_their_bucket() -> None:
    first, second = USUAL.thumbnails[0], USUAL.thumbnails[-1]
    text = section(render(replace(USUAL, thumbnails=[first, second, first])), "Images")
    assert re.findall("<h3>(.*?)<span.*?>(.*?)</span>", text) == [
        ("1024x1024", "2 of 802 images"),
        ("1536x640", "1 of 3 images"),
    ]
    assert [len(part.split("<figure")) - 1 for part in text.split("<h3>")[1:]] == [2, 1]


def test_short_caption_is_whole_and_long_one_folded() -> None:
    assert "<details" not in with_captions("a hill\nin the morning")
    text = with_captions("word " * 400)
    assert '<details class="long">' in text and ("word " * 400) in text


def test_truncated_text_is_marked() -> None:
    assert "a hill with <mark>sheep &amp; mist</mark>" in with_cut("a hill with ", "sheep & mist")
    folded = with_cut("begin " + "a " * 300 + "end", "sheep " + "b " * 300 + "mist")
    summary, whole = re.findall(r'dir="auto">(.*?)</(?:span|div)>', section(folded, "Captions"), flags=re.DOTALL)
    assert summary.startswith("…") and summary.endswith("…") and "end<mark>sheep" in summary and "begin" not in summary
    assert whole.startswith("begin") and whole.endswith("mist</mark>") and "end<mark>sheep" in whole


def test_page_says_whether_captions_are_truncated() -> None:
    text = section(render(replace(EMPTY, encoders=[USUAL.encoders[1]])), "Captions")
    assert "No caption is truncated." in text and "mark" not in text
    text = section(render(replace(EMPTY, encoders=[USUAL.encoders[0]])), "Captions")
    assert "212 of 3,190 captions are longer than the limit of 77 tokens." in text and "No caption" not in text


def test_equal_use_of_all_images_is_one_sentence() -> None:
    for draws, words in ((1.0, "once"), (2.5, "2.5 times")):
        text = section(render(replace(EMPTY, exposure=[(draws, 7), (9.0, 0)])), "Exposure")
        assert text == f"<p>Every image is used {words} per epoch.</p>"
    assert "From 1 to 5.33 times per epoch, 1.23 on average." in section(usual_page(), "Exposure")


# --- large content -----------------------------------------------------------------------------------------------------


def test_long_list_is_folded_and_shortened() -> None:
    text = section(hostile_page(), "Bad files")
    assert text.startswith("<p>10,000 files that cannot be used.</p>")
    assert text.count("<li>") == MAX_LISTED
    assert "<summary>290 more</summary>" in text and "9,700 more are not listed here." in text


def test_complete_list_mentions_no_further_entries() -> None:
    assert "more" not in section(usual_page(), "Bad files")
    text = section(usual_page(), "Skipped")
    assert "<summary>4 more</summary>" in text and "17 more are not listed here." in text


def test_large_group_of_duplicates_is_shortened() -> None:
    text = section(hostile_page(), "Duplicates")
    assert text.count("<bdi>copy ") == MAX_GROUP
    assert f"{5_000 - MAX_GROUP:,} more" in text and "4,319 more are not listed here." in text


def test_very_long_caption_is_shortened() -> None:
    text = with_captions("x" * (MAX_CHARACTERS + 1234))
    assert "… (1,234 more characters)" in text and len(text) < 2 * len(with_captions("x"))


def test_page_with_many_images_is_under_three_megabytes() -> None:
    image = replace(USUAL.thumbnails[0], original=bytes(15_000), encoded=bytes(15_000))
    assert len(render(replace(USUAL, thumbnails=[image] * 48)).encode()) < 3_000_000


# --- safety ---------------------------------------------------------------------------------------------------------


def test_texts_of_users_remain_text() -> None:
    usual, hostile = pages()
    assert {tag for tag, _ in hostile.elements} <= {tag for tag, _ in usual.elements}
    names = [{name for _, attributes in page.elements for name in attributes} for page in (usual, hostile)]
    assert names[1] <= names[0]
    for words in (ATTACK, UNBROKEN, "שלום", "\\u202eturned", "\\u0000\\u001b[31m\\udce9"):
        assert words in hostile.text
    assert hostile.words[0] == HOSTILE.title


def test_every_text_of_the_facts_is_escaped() -> None:
    """Each text is tested alone: an unescaped tag would be an element of the page."""
    tag = "<u>"
    thumbnail = replace(USUAL.thumbnails[0], image=tag, caption=tag, bucket=tag)
    encoder = EncoderFacts(tag, 77, [(90, 1)], 1, [CutCaption(tag, tag, tag, 90)])
    facts = DatasetFacts(
        title=tag,
        rows=[(tag, tag)],
        buckets=[replace(USUAL.buckets[0], name=tag)],
        thumbnails=[thumbnail],
        encoders=[encoder],
        exposure=[],
        bad_files=[(tag, tag)],
        num_bad=1,
        skipped=[(tag, tag)],
        num_skipped=1,
        duplicates=[[tag, tag]],
        num_duplicates=1,
        warnings=[tag],
    )
    text = render(facts)
    assert Page(text).all("u") == [] and tag not in text
    of_image, of_encoder, of_files = 2 + 2 + 1, 1 + 1 + 3, 2 + 2 + 2
    assert text.count("&lt;u&gt;") == 2 + 2 + 1 + of_image + of_encoder + of_files + 1


def test_invisible_characters_are_escaped() -> None:
    assert html_of("a\u202eb\x00\udcff") == "a\\u202eb\\u0000\\udcff"
    assert html_of("a\tb\nc\u200f é 漢 😀") == "a\tb\nc\u200f é 漢 😀"
    hostile_page().encode("utf-8")


def test_page_loads_nothing_from_elsewhere() -> None:
    for page, text in zip(pages(), (usual_page(), hostile_page()), strict=True):
        assert not {"script", "link", "iframe", "object", "embed", "base", "form"} & {tag for tag, _ in page.elements}
        for _, attributes in page.elements:
            for name, value in attributes.items():
                assert not name.startswith("on")
                if name in ("src", "href", "xlink:href", "srcset"):
                    assert value.startswith(("#", "data:image/jpeg;base64,"))
                assert "://" not in value or name in ("xmlns", "xmlns:xlink", "alt", "aria-label")
        style = text[text.index("<style>") : text.index("</style>")]
        assert "url(" not in style and "@import" not in style


def test_every_reference_has_exactly_one_target() -> None:
    for text in (usual_page(), hostile_page()):
        ids = [attributes["id"] for _, attributes in Page(text).elements if "id" in attributes]
        assert len(ids) == len(set(ids))
        assert set(re.findall(r"""(?:url\(|href=")#([\w-]+)""", text)) == set(ids)


# --- accessibility ----------------------------------------------------------------------------------------------------


def test_images_plots_and_tables_have_text_for_screen_readers() -> None:
    for page in pages():
        assert all(image["alt"] for image in page.all("img"))
        assert all(svg["role"] == "img" and svg["aria-label"] for svg in page.all("svg"))
        assert page.all("th") and all(cell["scope"] in ("row", "col") for cell in page.all("th"))
    assert len({svg["aria-label"] for svg in pages()[0].all("svg")}) == 3


def test_plots_use_the_text_colour_of_the_page() -> None:
    body = usual_page().split("<body>")[1]
    assert "#222222" not in body and "#000000" not in body and "currentColor" in body


@pytest.mark.parametrize("scheme", [0, 1], ids=["light", "dark"])
def test_text_has_enough_contrast(scheme: int) -> None:
    """The contrast is at least 4.5, as WCAG 2.1 requires."""
    colors: dict[str, str] = {}
    for is_dark, block in re.findall(r"(dark\) \{ )?:root \{(.*?)\}", usual_page()):
        if scheme or not is_dark:
            colors |= dict(re.findall(r"--(\w+): #(\w+);", block))
    for letters, ground in (("ink", "paper"), ("soft", "paper"), ("ink", "box"), ("soft", "box"), ("ink", "mark")):
        light, dark = sorted((luminance(colors[letters]), luminance(colors[ground])), reverse=True)
        assert (light + 0.05) / (dark + 0.05) > 4.5, (letters, ground)


def luminance(color: str) -> float:
    digits = color if len(color) == 6 else "".join(2 * digit for digit in color)
    channels = [int(digits[place : place + 2], 16) / 255 for place in (0, 2, 4)]
    linear = [value / 12.92 if value <= 0.04045 else ((value + 0.055) / 1.055) ** 2.4 for value in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


# --- bars of the histogram ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("max_tokens", [1, 3, 77, 154, 256, 512])
@pytest.mark.parametrize("longest", [0, 1, 60, 77, 78, 500, 100_000])
def test_bars_count_every_caption_and_split_at_the_limit(max_tokens: int, longest: int) -> None:
    histogram = [(tokens, 1 + tokens % 3) for tokens in sorted({0, longest // 2, longest, max_tokens, max_tokens + 1})]
    start, width, heights = token_bars(histogram, max_tokens)
    assert sum(heights) == sum(count for _, count in histogram)
    assert len(heights) <= MAX_BARS + 2
    edges = [start + index * width for index in range(len(heights) + 1)]
    assert max_tokens + 0.5 in edges and start < 0
    read = sum(height for height, (_, right) in zip(heights, pairwise(edges), strict=True) if right <= max_tokens + 0.5)
    assert read == sum(count for tokens, count in histogram if tokens <= max_tokens)
