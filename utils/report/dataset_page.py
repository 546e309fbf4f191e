"""The dataset page: crops, buckets, truncated captions, draws per epoch, duplicates and skipped files of a dataset.

The page is one file with embedded images. Sections without content are omitted. Long lists are folded, very long ones
shortened with the number of entries that are missing.
"""

from __future__ import annotations

from base64 import b64encode
from collections.abc import Sequence
from typing import TYPE_CHECKING

from utils.report.dataset_facts import BucketFacts, CutCaption, DatasetFacts, EncoderFacts, Thumbnail
from utils.report.html import header_row, html_of, page, plot_figure, table_of

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MAX_OPEN, MAX_LISTED = 10, 300
"""Entries of a list that are visible at first, and after unfolding."""
MAX_OPEN_CAPTIONS = 3
MAX_GROUP = 20
"""Listed paths of one group of duplicates."""
START_CHARACTERS, MAX_CHARACTERS = 180, 8000
"""Characters of a caption that are visible while it is folded, and at most."""
MAX_HEIGHT_REM, MAX_RATIO = 17, 3.0
"""Limits of the two images of a pair. Their widths follow their aspect ratios, so that both have one height."""

_CSS = """
:root { --box: #eef1f6; --first: #2f6fbd; --again: #cc5a14; --filler: #8a8a8a; --mark: #ffe3b8; }
@media (prefers-color-scheme: dark) { :root { --box: #22262e; --mark: #5e3a10; } }
nav { display: flex; flex-wrap: wrap; gap: .2rem 1.1rem; }
a { color: inherit; text-underline-offset: .2em; text-decoration-color: var(--soft); }
h3 { font-size: 1rem; margin: 1.4rem 0 .5rem; overflow-wrap: anywhere; }
h3 span { font-weight: 400; margin-left: .4rem; }
p { margin: .4rem 0; max-width: 44rem; }
.soft { color: var(--soft); }
.warnings { margin: 0 0 1rem; padding: .2rem .9rem; border-left: 4px solid var(--again); background: var(--box); }
.rows th { white-space: normal; overflow-wrap: anywhere; min-width: 6rem; }
.buckets th { white-space: normal; min-width: 4rem; max-width: 20rem; overflow-wrap: break-word; vertical-align: bottom; }
.buckets th ~ th, .buckets td { text-align: right; }
.bar { display: flex; width: clamp(6rem, 20vw, 14rem); height: .8rem; margin-top: .3rem; }
.bar i, .key i { background: var(--first); }
.bar .again, .key .again { background: var(--again); }
.bar .filler, .key .filler { background: var(--filler); }
.key { display: flex; flex-wrap: wrap; gap: .2rem 1.2rem; margin-top: .6rem; font-size: .9rem; color: var(--soft); }
.key i { display: inline-block; width: .8rem; height: .8rem; margin-right: .4rem; vertical-align: -.05rem; }
.cards { display: grid; gap: 1.4rem; grid-template-columns: repeat(auto-fill, minmax(min(100%, 19rem), 1fr)); }
.card { min-width: 0; }
.card figcaption { margin-top: .3rem; }
.card bdi { color: var(--ink); font-weight: 600; }
.pair { display: flex; gap: .3rem; align-items: flex-start; }
.pair div { position: relative; min-width: 0; overflow: hidden; }
.pair img { display: block; width: 100%; height: auto; background: var(--box); }
.pair .crop { position: absolute; box-shadow: inset 0 0 0 2px #fff, inset 0 0 0 3px #000, 0 0 0 40rem rgb(0 0 0 / 60%); }
.text { white-space: pre-line; }
.card .text { color: var(--ink); }
summary { cursor: pointer; }
.more > summary { color: var(--soft); margin: .6rem 0; }
.long > summary { list-style: none; }
.long > summary::-webkit-details-marker { display: none; }
.long > summary::after { content: " more"; color: var(--soft); text-decoration: underline; text-underline-offset: .2em; }
.long[open] > summary::after { content: "less"; }
.long[open] > summary > span { display: none; }
mark { background: var(--mark); color: inherit; border-bottom: 2px solid var(--again); }
.list { margin: .4rem 0; padding: 0; list-style: none; max-width: 60rem; overflow-wrap: anywhere; }
.list li { padding: .35rem 0; border-bottom: 1px solid var(--line); }
.list.plain li { border: 0; }
.reasons bdi, .group bdi { display: block; }
.beside { flex: 1 1 24rem; min-width: 0; max-width: 44rem; }
@media (min-width: 50rem) { .reasons li { display: grid; grid-template-columns: 3fr 2fr; gap: 1.5rem; } }
"""


def render(facts: DatasetFacts) -> str:
    """The HTML of the page; the same facts give the same text."""
    sections = [
        ("Summary", _warnings(facts.warnings) + table_of(facts.rows)),
        ("Buckets", _buckets(facts.buckets)),
        ("Images", _images(facts.thumbnails, facts.buckets)),
        ("Captions", "".join(_encoder(encoder) for encoder in facts.encoders)),
        ("Exposure", _exposure(facts.exposure)),
        ("Duplicates", _duplicates(facts.duplicates, facts.num_duplicates)),
        ("Skipped", _reasons(facts.skipped, facts.num_skipped, "skipped by configuration")),
        ("Bad files", _reasons(facts.bad_files, facts.num_bad, "that cannot be used")),
    ]
    return page(facts.title, sections, _CSS, contents=True)


# --- lists and long texts ----------------------------------------------------------------------------------------------


def _counted(number: int, noun: str) -> str:
    return f"{number:,} {noun}" + ("" if number == 1 else "s")


def _list(kind: str, items: Sequence[str], total: int, num_open: int = MAX_OPEN) -> str:
    """A list of HTML entries: the first visible, the others folded, and the number of entries beyond `items`."""
    visible, folded = _items(kind, items[:num_open]), items[num_open:]
    parts = [visible]
    if folded:
        parts.append(f'<details class="more"><summary>{len(folded):,} more</summary>{_items(kind, folded)}</details>')
    if total > len(items):
        parts.append(f'<p class="soft">{total - len(items):,} more are not listed here.</p>')
    return "".join(parts)


def _items(kind: str, items: Sequence[str]) -> str:
    return f'<ul class="list {kind}">' + "".join(f"<li>{item}</li>" for item in items) + "</ul>" if items else ""


def _long(start: str, whole: str) -> str:
    """Folded HTML: only `start` is visible until it is unfolded."""
    return (
        f'<details class="long"><summary><span class="text" dir="auto">{start}</span></summary>'
        f'<div class="text" dir="auto">{whole}</div></details>'
    )


def _text(caption: str) -> str:
    if len(caption) <= 2 * START_CHARACTERS:
        return f'<div class="text" dir="auto">{html_of(caption)}</div>'
    return _long(html_of(caption[:START_CHARACTERS]) + "…", _shortened(caption))


def _shortened(text: str) -> str:
    left = len(text) - MAX_CHARACTERS
    return html_of(text) if left <= 0 else f"{html_of(text[:MAX_CHARACTERS])}… ({left:,} more characters)"


# --- summary and buckets -----------------------------------------------------------------------------------------------


def _warnings(warnings: Sequence[str]) -> str:
    items = [f'<div dir="auto">{html_of(warning)}</div>' for warning in warnings[:MAX_LISTED]]
    return f'<div class="warnings">{_list("plain", items, len(warnings))}</div>' if items else ""


def _buckets(buckets: Sequence[BucketFacts]) -> str:
    """A table of counts with a bar of the draws per epoch in each row."""
    if not buckets:
        return ""
    names = ["bucket", "images", "draws per epoch", "repeats", "fillers", "factor", "upscaled", ""]
    most = max(1, *(bucket.shown_per_epoch for bucket in buckets))
    rows = "".join(_bucket_row(bucket.name, _numbers(bucket), _bar(bucket, most)) for bucket in buckets)
    if len(buckets) > 1:
        rows += _bucket_row("all", _numbers(*buckets), "")
    key = '<span><i></i>first draws</span><span><i class="again"></i>repeats</span>'
    return (
        '<div class="numbers" tabindex="0" role="region" aria-label="Table of buckets">'
        f'<table class="buckets">{header_row(names)}{rows}</table></div>'
        f'<div class="key">{key}<span><i class="filler"></i>fillers, which complete the groups of one bucket that steps '
        "consist of</span><span>factor: all draws / draws without fillers</span></div>"
    )


def _numbers(*buckets: BucketFacts) -> list[str]:
    """The cells of a row for one bucket, or for several together."""
    draws, fillers = sum(bucket.shown_per_epoch for bucket in buckets), sum(bucket.num_fillers for bucket in buckets)
    return [
        f"{sum(bucket.num_images for bucket in buckets):,}",
        _mean(draws),
        f"{sum(bucket.num_repeats for bucket in buckets):,}",
        _mean(fillers),
        f"{draws / (draws - fillers):.2f}",
        f"{sum(bucket.num_enlarged for bucket in buckets):,}",
    ]


def _mean(number: float) -> str:
    """A mean over epochs, with a decimal where it is not the same in every epoch."""
    return f"{number:,.0f}" if abs(number - round(number)) < 0.05 else f"{number:,.1f}"


def _bucket_row(name: str, numbers: Sequence[str], bar: str) -> str:
    cells = "".join(f"<td>{number}</td>" for number in numbers)
    return f'<tr><th scope="row">{html_of(name)}</th>{cells}<td>{bar}</td></tr>'


def _bar(bucket: BucketFacts, most: float) -> str:
    """A bar whose length is the draws per epoch relative to the largest bucket."""
    first = bucket.shown_per_epoch - bucket.num_repeats - bucket.num_fillers
    parts = [("first", first), ("again", bucket.num_repeats), ("filler", bucket.num_fillers)]
    pieces = "".join(f'<i class="{name}" style="width:{number / most:.3%}"></i>' for name, number in parts if number)
    return f'<div class="bar" aria-hidden="true">{pieces}</div>'


# --- images ----------------------------------------------------------------------------------------------------------


def _images(thumbnails: Sequence[Thumbnail], buckets: Sequence[BucketFacts]) -> str:
    """The thumbnails of each bucket, in the order of their first one."""
    if not thumbnails:
        return ""
    in_all = {bucket.name: bucket.num_images for bucket in buckets}
    parts = [
        '<p class="soft">Left: the whole image; the frame shows the trained area. '
        "Right: that area, decoded from the cached latents.</p>"
    ]
    for name in dict.fromkeys(thumbnail.bucket for thumbnail in thumbnails):
        cards = [_card(thumbnail) for thumbnail in thumbnails if thumbnail.bucket == name]
        of_all = f"{len(cards):,} of {_counted(in_all[name], 'image')}" if name in in_all else ""
        heading = f'<h3>{html_of(name)}<span class="soft">{of_all}</span></h3>'
        parts.append(f'{heading}<div class="cards">{"".join(cards)}</div>')
    return "".join(parts)


def _card(thumbnail: Thumbnail) -> str:
    left, top, right, bottom = thumbnail.crop
    width, height = thumbnail.width * (right - left), thumbnail.height * (bottom - top)
    ratios = [min(thumbnail.width / thumbnail.height, MAX_RATIO), min(width / height, MAX_RATIO)]
    box = f"left:{left:.3%};top:{top:.3%};width:{right - left:.3%};height:{bottom - top:.3%}"
    whole = _image(thumbnail.original, f"{thumbnail.image}, whole", (thumbnail.width, thumbnail.height))
    encoded = _image(thumbnail.encoded, f"{thumbnail.image}, decoded latents", (width, height))
    return (
        f'<figure class="card"><div class="pair" style="max-width:{MAX_HEIGHT_REM * sum(ratios) + 0.3:.2f}rem">'
        f'<div style="flex:{100 * ratios[0]:.2f} 1 0">{whole}<div class="crop" style="{box}"></div></div>'
        f'<div style="flex:{100 * ratios[1]:.2f} 1 0">{encoded}</div></div>'
        f"<figcaption><bdi>{html_of(thumbnail.image)}</bdi><div>{_crop_text(thumbnail)}</div>{_text(thumbnail.caption)}"
        "</figcaption></figure>"
    )


def _image(jpeg: bytes, name: str, size: tuple[float, float]) -> str:
    """An <img> with its aspect ratio, so that the layout does not shift while images load."""
    width, height = (max(1, round(side)) for side in size)
    source = f"data:image/jpeg;base64,{b64encode(jpeg).decode()}"
    return f'<img src="{source}" alt="{html_of(name)}" width="{width}" height="{height}">'


def _crop_text(thumbnail: Thumbnail) -> str:
    left, top, right, bottom = thumbnail.crop
    cut = 1 - (right - left) * (bottom - top)
    words = "nothing" if cut < 1e-4 else "less than 1%" if cut < 0.01 else f"{cut:.0%}"
    return f"{thumbnail.width}x{thumbnail.height}, {words} cropped{', flipped' if thumbnail.flipped else ''}"


# --- captions ----------------------------------------------------------------------------------------------------------


def _encoder(encoder: EncoderFacts) -> str:
    """The caption lengths for one encoder, and the captions that it truncates."""
    num_captions = sum(count for _, count in encoder.histogram)
    if not num_captions:
        return ""
    beside = ""
    if encoder.num_cut:
        verb = "is" if encoder.num_cut == 1 else "are"
        items = [_cut_caption(caption) for caption in encoder.cut[:MAX_LISTED]]
        beside = (
            f'<div class="beside"><p>{encoder.num_cut:,} of {_counted(num_captions, "caption")} {verb} longer than the '
            f"limit of {encoder.max_tokens} tokens. The <mark>marked</mark> text is truncated.</p>"
            f"{_list('texts', items, encoder.num_cut, MAX_OPEN_CAPTIONS)}</div>"
        )
    return f'<h3>{html_of(encoder.name)}</h3><div class="side">{_token_plot(encoder)}{beside}</div>'


def _token_plot(encoder: EncoderFacts) -> str:
    def draw() -> Figure:
        from utils.report import plots

        return plots.token_figure(encoder.histogram, encoder.max_tokens)

    longest = max(tokens for tokens, count in encoder.histogram if count)
    fits = "" if encoder.num_cut else " No caption is truncated."
    return plot_figure(f"captions by tokens of {encoder.name}", f"The longest has {_counted(longest, 'token')}.{fits}", draw)


def _cut_caption(caption: CutCaption) -> str:
    """A truncated caption; a long one is folded around the point of truncation."""
    kept, cut = caption.kept, caption.cut
    heading = f'<div class="soft"><bdi>{html_of(caption.image)}</bdi>, {_counted(caption.num_tokens, "token")}</div>'
    if len(kept) + len(cut) <= 2 * START_CHARACTERS:
        return f'{heading}<div class="text" dir="auto">{html_of(kept)}<mark>{html_of(cut)}</mark></div>'
    half = START_CHARACTERS // 2
    before, behind = ("…" if len(kept) > half else ""), ("…" if len(cut) > half else "")
    start = f"{before}{html_of(kept[-half:])}<mark>{html_of(cut[:half])}</mark>{behind}"
    return heading + _long(start, f"{_shortened(kept)}<mark>{_shortened(cut)}</mark>")


# --- exposure and files ------------------------------------------------------------------------------------------------


def _exposure(exposure: Sequence[tuple[float, int]]) -> str:
    """The draws per epoch: one sentence, and a plot where images differ."""
    exposure = [(draws, count) for draws, count in exposure if count]
    if not exposure:
        return ""
    least, most = exposure[0][0], exposure[-1][0]
    if least == most:
        return f"<p>Every image is used {_times(most)} per epoch.</p>"
    mean = sum(draws * count for draws, count in exposure) / sum(count for _, count in exposure)

    def draw() -> Figure:
        from utils.report import plots

        return plots.exposure_figure(exposure)

    caption = f"From {round(least, 2):g} to {_times(most)} per epoch, {mean:.2f} on average."
    return plot_figure("images by uses per epoch", caption, draw)


def _times(number: float) -> str:
    return "once" if number == 1 else f"{round(number, 2):g} times"


def _duplicates(groups: Sequence[Sequence[str]], total: int) -> str:
    if not total:
        return ""
    items = [f'<span class="soft">{_counted(len(group), "file")}</span>{_group(group)}' for group in groups[:MAX_LISTED]]
    return f"<p>{_counted(total, 'group')} of files with equal content.</p>{_list('group', items, total)}"


def _group(paths: Sequence[str]) -> str:
    left = len(paths) - MAX_GROUP
    listed = "".join(f"<bdi>{html_of(path)}</bdi>" for path in paths[:MAX_GROUP])
    return listed + (f'<span class="soft">{left:,} more</span>' if left > 0 else "")


def _reasons(files: Sequence[tuple[str, str]], total: int, which: str) -> str:
    if not total:
        return ""
    items = [f'<bdi>{html_of(path)}</bdi><div class="soft">{html_of(reason)}</div>' for path, reason in files[:MAX_LISTED]]
    return f"<p>{_counted(total, 'file')} {which}.</p>{_list('reasons', items, total)}"
