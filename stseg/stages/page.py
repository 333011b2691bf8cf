"""HTML of reports: one page without any other file, for light and dark screens, wide and narrow."""

from __future__ import annotations

import html
import re
from collections.abc import Iterable, Sequence
from importlib.metadata import version
from pathlib import Path

from stseg.storage.files import write_atomically

_STYLE = """
:root { color-scheme: light dark; --ink: #1d2126; --soft: #5b646e; --line: #d9dee3; --back: #fff; --panel: #f4f6f8;
  --accent: #0f766e; --alert: #7a4100; --alert-back: #fff3dd; --mask: .5 }
@media (prefers-color-scheme: dark) { :root { --ink: #e4e7ea; --soft: #9ca6b0; --line: #363d45; --back: #14171a;
  --panel: #1e2327; --accent: #4fd1c5; --alert: #ffd08f; --alert-back: #36280f } }
* { box-sizing: border-box }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 68rem; margin: 0 auto; padding: 1.5rem 1rem 4rem;
  color: var(--ink); background: var(--back); overflow-wrap: anywhere }
h1 { font-size: 1.9rem; line-height: 1.2; margin: 0 } h2 { font-size: 1.3rem; margin: 2.8rem 0 .6rem }
h3 { font-size: 1rem; margin: 1.6rem 0 .4rem } p { max-width: 46rem; margin: .5rem 0 }
a { color: var(--accent) } code { font-size: .9em } .soft, figcaption, caption { color: var(--soft) }
.headline { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 20rem), 1fr)); gap: 1rem 2rem;
  margin-top: 1.5rem } .headline > div { background: var(--panel); border-radius: .6rem; padding: 1rem 1.2rem }
.score { font-size: 3.2rem; font-weight: 650; line-height: 1.1; color: var(--accent); white-space: nowrap }
.alert { background: var(--alert-back); color: var(--alert); border-left: .3rem solid; border-radius: .3rem;
  padding: .1rem 1.2rem .6rem; margin-top: 1.5rem } .alert h2 { margin-top: .8rem } .alert ul { padding-left: 1.2rem }
dl { display: grid; grid-template-columns: fit-content(7rem) 1fr; gap: .2rem 1.2rem; margin: 0 }
dt { color: var(--soft) } dd { margin: 0 }
.scroll { overflow-x: auto; margin: .8rem 0 }
table { border-collapse: collapse; font-size: .93rem; min-width: min(100%, 26rem) }
.scroll:focus-visible { outline: 2px solid var(--accent) } caption { text-align: left; padding-bottom: .3rem }
td, th { padding: .25rem 1.2rem .25rem 0; text-align: left; border-bottom: 1px solid var(--line); vertical-align: top;
  white-space: nowrap } th { font-weight: 600 }
td.number, th.number { text-align: right; font-variant-numeric: tabular-nums }
td.long { min-width: 14rem; white-space: normal }
.bar { display: block; width: 6rem; margin-left: auto; height: .35rem; background: var(--line) }
.bar i { display: block; width: var(--share); height: 100%; background: var(--accent) }
.charts, .pictures { display: grid; gap: 1.2rem }
.charts { grid-template-columns: repeat(auto-fit, minmax(min(100%, 26rem), 1fr)) }
.pictures { grid-template-columns: repeat(auto-fill, minmax(min(100%, 13rem), 1fr)) }
.pictures.predictions { grid-template-columns: repeat(auto-fill, minmax(min(100%, 28rem), 1fr)) }
.panels { display: grid; grid-auto-flow: column; grid-auto-columns: minmax(0, 1fr); gap: .4rem }
.panels small { color: var(--soft) }
figure { margin: 0; min-width: 0 } figcaption { font-size: .85rem; line-height: 1.35; padding-top: .3rem }
figcaption b { color: var(--ink); font-weight: 600 }
.charts figure { max-width: 34rem } .charts figcaption { color: var(--ink); font-weight: 600 }
svg.chart { display: block; width: 100%; height: auto } svg.chart * { stroke-linejoin: round; stroke-linecap: butt }
.overlay { position: relative; background: var(--panel) } .overlay img { display: block; width: 100% }
.overlay img + img { position: absolute; inset: 0; height: 100%; opacity: var(--mask) }
.overlay img.small, .overlay img + img { image-rendering: pixelated }
.slider { position: sticky; top: 0; z-index: 1; background: var(--back); padding: .6rem 0; display: flex; gap: .8rem;
  align-items: center; flex-wrap: wrap } .slider input { flex: 1; min-width: 8rem; max-width: 20rem }
.legend { display: flex; flex-wrap: wrap; gap: .2rem 1.2rem; padding: 0; list-style: none; margin: .4rem 0 }
.legend i { display: inline-block; width: 1em; height: 1em; border: 1px solid var(--line); margin-right: .35em;
  vertical-align: -.1em }
summary { cursor: pointer; margin: .5rem 0 }
@media print { .slider { position: static } figure, tr { break-inside: avoid } }
"""
_MOST_ROWS = 40  # of a table that is not folded up
_TITLE = re.compile("[^a-z0-9]+")


class Html(str):
    """Text that is HTML already; any other text is escaped."""


def escape(text: object) -> Html:
    """Return a text as HTML, unless it is HTML already.

    Example:
        >>> escape("a < b"), escape(Html("<b>"))
        ('a &lt; b', '<b>')
    """
    if isinstance(text, Html):
        return text
    # Ids from file names that are not valid UTF-8 contain surrogates, which cannot be written.
    readable = str(text).encode(errors="backslashreplace").decode().replace("\0", "\\x00")
    return Html(html.escape(readable))


def element(tag: str, *content: object, **attributes: object) -> Html:
    """Return an element; the attribute ``kind`` is its class, and ``_`` in names is ``-``.

    Example:
        >>> element("td", "3 < 4", kind="number")
        '<td class="number">3 &lt; 4</td>'
    """
    names = {"kind": "class"}
    given = "".join(
        f' {names.get(name, name.replace("_", "-"))}="{escape(value)}"' for name, value in attributes.items()
    )
    return Html(f"<{tag}{given}>{join(content)}</{tag}>")


def join(parts: Iterable[object]) -> Html:
    """Return parts one after another."""
    return Html("".join(escape(part) for part in parts))


def section(title: str, *content: object) -> Html:
    """Return a section with a heading, or nothing if it is empty."""
    body = join(content)
    identifier = _TITLE.sub("-", title.lower()).strip("-")
    return Html("") if not body else element("section", element("h2", title), body, id=identifier, aria_label=title)


def table(
    caption: str, head: Sequence[object], rows: Iterable[Sequence[object]], *, numbers: Sequence[int] = ()
) -> Html:
    """Return a table that scrolls within itself where it is too wide; nothing if there are no rows.

    Args:
        caption: what it holds.
        head: titles of the columns.
        rows: the cells.
        numbers: columns of numbers, to the right.
    """
    rows = list(rows)
    if not rows:
        return Html("")

    def line(tag: str, cells: Sequence[object], **attributes: object) -> Html:
        kinds = (
            "number" if place in numbers else "long" if len(str(cell)) > 60 else "" for place, cell in enumerate(cells)
        )
        parts = (
            element(tag, cell, **attributes, **({"kind": kind} if kind else {}))
            for cell, kind in zip(cells, kinds, strict=True)
        )
        return element("tr", *parts)

    body = element("tbody", *(line("td", row) for row in rows))
    whole = element("table", element("caption", caption), element("thead", line("th", head, scope="col")), body)
    return element("div", whole, kind="scroll", tabindex=0, role="region", aria_label=caption)


def definitions(pairs: Iterable[tuple[str, object]]) -> Html:
    """Return a list of terms and what they are, without those that are empty."""
    parts = [join((element("dt", name), element("dd", value))) for name, value in pairs if value not in ("", None)]
    return element("dl", *parts)


def details(title: str, *content: object) -> Html:
    """Return what is folded up under a title; nothing if it is empty."""
    body = join(content)
    return element("details", element("summary", title), body) if body else Html("")


def folded(title: str, rows: Sequence[object], content: Html) -> Html:
    """Return a table, folded up under its title if it has many rows."""
    return details(title, content) if len(rows) > _MOST_ROWS else content


def alert(title: str, texts: Sequence[str]) -> Html:
    """Return a list that stands out; nothing if it is empty."""
    if not texts:
        return Html("")
    items = element("ul", *(element("li", text) for text in texts))
    return element("section", element("h2", title), items, kind="alert", id="alert", aria_label=title)


def share_bar(text: str, share: float) -> Html:
    """Return a number with a bar below it, filled to a share in [0, 1]."""
    bar = element("i", style=f"--share: {100 * share:.4g}%")
    return join((text, element("span", bar, kind="bar", aria_hidden="true")))


def percent(share: float | None, digits: int = 1) -> str:
    """Format a share as percent; a dash if there is none.

    Example:
        >>> percent(0.614), percent(None), percent(float("nan"))
        ('61.4 %', '–', '–')
    """
    return "–" if share is None or share != share else f"{100 * share:.{digits}f} %"


def duration(seconds: float) -> str:
    """Format a duration.

    Example:
        >>> duration(8.64), duration(192), duration(7501)
        ('8.6 s', '3 min 12 s', '2 h 05 min')
    """
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02} min"


def write_page(path: Path, title: str, kind: str, *content: object, script: str = "") -> Path:
    """Write a page with a title, and return its path.

    Args:
        path: the file.
        title: its title.
        kind: what sort of page it is, below the title.
        content: what stands on it.
        script: JavaScript.
    """
    header = element("header", element("h1", title), element("p", kind, kind="soft"))
    body = element("main", header, *content)
    text = (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f'<meta name="generator" content="stseg {version("stseg")}">'
        f"{element('title', title)}<style>{_STYLE}</style></head>\n<body>{body}"
        f"{f'<script>{script}</script>' if script else ''}</body></html>\n"
    )
    write_atomically(path, lambda file: file.write(text.encode()))
    return path
