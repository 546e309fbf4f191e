"""Building blocks of the program's HTML pages.

A page is a single file without scripts and without references to the network. It follows the reader's light or dark mode
and fits a phone. Plots are embedded as SVG. Texts come from users: every text is escaped by `html_of`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from html import escape
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Rows = Sequence[tuple[str, str]]
"""(name, text)."""

_CSS = """
:root { color-scheme: light dark; --ink: #222; --soft: #667; --line: #ccd; --paper: #fff; }
@media (prefers-color-scheme: dark) { :root { --ink: #ddd; --soft: #99a; --line: #445; --paper: #16181c; } }
body { margin: 0; background: var(--paper); color: var(--ink); font: 15px/1.45 system-ui, sans-serif; }
main { max-width: 70rem; margin: 0 auto; padding: 1rem; }
h1 { font-size: 1.4rem; margin: 0 0 1rem; overflow-wrap: anywhere; }
h2 { font-size: 1.1rem; margin: 2rem 0 .5rem; }
table { border-collapse: collapse; }
th, td { text-align: left; vertical-align: top; padding: .2rem .9rem .2rem 0; border-bottom: 1px solid var(--line); }
th { font-weight: 600; white-space: nowrap; }
caption { text-align: left; padding-bottom: .3rem; }
.rows td { overflow-wrap: anywhere; }
.numbers { overflow-x: auto; }
.numbers td { font-variant-numeric: tabular-nums; white-space: nowrap; }
.side { display: flex; flex-wrap: wrap; gap: 1rem 2.5rem; align-items: flex-start; }
figure { margin: 0; }
figcaption { color: var(--soft); font-size: .9rem; max-width: 40rem; overflow-wrap: anywhere; }
svg { max-width: 100%; height: auto; color: var(--ink); display: block; }
"""
# Control characters, marks that change the writing direction, and surrogates (bytes of a path that are not UTF-8).
_INVISIBLE = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


def html_of(text: str) -> str:
    """A user's text as HTML, for an element or a quoted attribute. Invisible characters are written as \\u202e."""
    return escape(_INVISIBLE.sub(lambda found: f"\\u{ord(found[0]):04x}", text))


def page(title: str, sections: Sequence[tuple[str, str]], css: str, *, contents: bool = False) -> str:
    """A user's text as HTML, for an element or a quoted attribute. Invisible characters become escapes such as \\u202e."""
    present = [(heading, content) for heading, content in sections if content]
    body = "".join(_section(heading, content, _anchor(heading) if contents else "") for heading, content in present)
    links = "".join(f'<a href="#{_anchor(heading)}">{html_of(heading)}</a> ' for heading, _ in present)
    navigation = f'<nav aria-label="Sections">{links}</nav>\n' if contents and present else ""
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{html_of(title)}</title><style>{_CSS}{css}</style></head>\n"
        f"<body><main><h1>{html_of(title)}</h1>\n{navigation}{body}</main></body></html>\n"
    )


def _section(heading: str, content: str, anchor: str) -> str:
    identity = f' id="{anchor}"' if anchor else ""
    return f"<section{identity}><h2>{html_of(heading)}</h2>{content}</section>\n"


def _anchor(heading: str) -> str:
    return re.sub(r"\W+", "-", heading.lower())


def table_of(rows: Rows) -> str:
    """A table of names and texts; empty without rows."""
    if not rows:
        return ""
    return '<table class="rows">' + "".join(table_row([name, text]) for name, text in rows) + "</table>"


def table_row(cells: Sequence[str]) -> str:
    """A table row; its first cell is a row header."""
    others = "".join(f"<td>{html_of(cell)}</td>" for cell in cells[1:])
    return f'<tr><th scope="row">{html_of(cells[0])}</th>{others}</tr>'


def header_row(cells: Sequence[str]) -> str:
    """A row of column headers; a cell without text is an ordinary cell."""
    return "<tr>" + "".join(f'<th scope="col">{html_of(cell)}</th>' if cell else "<td></td>" for cell in cells) + "</tr>"


def plot_figure(name: str, caption: str, draw: Callable[[], Figure]) -> str:
    """A plot with its caption. `name` is its label for screen readers and must be unique within a page."""
    from utils.report import plots  # imported here: matplotlib takes a second

    # The page's own text colour, which is light on a dark page.
    svg = plots.as_svg(name, draw).replace(plots.INK, "currentColor")
    below = f"<figcaption>{html_of(caption)}</figcaption>" if caption else ""
    named = svg.replace("<svg ", f'<svg role="img" aria-label="{html_of(name)}" ', 1)
    return f"<figure>{named}{below}</figure>"
