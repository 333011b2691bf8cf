"""Charts as SVG that is part of a page, drawn by matplotlib where it is installed."""

from __future__ import annotations

import io
import math
import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, TypeAlias

from stseg.stages.page import Html, element, escape

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis
    from matplotlib.figure import Figure

Line: TypeAlias = tuple[Sequence[float], Sequence[float]]
"""Horizontal and vertical coordinates of points."""

_INK = "#010203"  # stands for the color of the text around a chart, which matplotlib cannot name
_COLORS = ("#4477aa", "#ee6677", "#228833", "#bb9a1f", "#33a6c9", "#aa3377", "#7f7f7f", "#e08214")  # on light and dark
_STROKES = ("-", "--", ":", "-.")
_WIDTH, _HEIGHT, _ROW = 5.0, 2.6, 0.2  # inches; the page scales a chart to its column
MISSING = Html("<p>There are no curves: they need matplotlib (<code>pip install stseg[report]</code>).</p>")


class Charts:
    """Draws the charts of one page: each becomes a figure with a caption, and an empty text without matplotlib."""

    def __init__(self) -> None:
        self._count = 0
        try:
            import matplotlib  # noqa: F401

            self.are_drawn = True
        except ImportError:
            self.are_drawn = False

    def lines(self, title: str, lines: Mapping[str, Line], *, x: str, y: str) -> Html:
        """Draw lines by name; values that are not finite are gaps."""
        if not self.are_drawn or not lines:
            return Html("")
        columns = max(1, min(3, 52 // (max(map(len, lines)) + 4)))
        rows = -(-len(lines) // columns) if len(lines) > 1 else 0
        figure, axes = self._figure(rows)
        for number, (name, (across, up)) in enumerate(lines.items()):
            color, stroke = _COLORS[number % len(_COLORS)], _STROKES[number // len(_COLORS) % len(_STROKES)]
            dot = "." if len(across) <= 60 else ""
            known = [value if math.isfinite(value) else math.nan for value in up]
            axes.plot(across, known, stroke, marker=dot, color=color, label=_literal(name), linewidth=1.4)
        _count_by_integers(axes.xaxis)
        if rows:
            figure.legend(loc="lower center", ncols=columns, frameon=False, fontsize=8.5, labelcolor=_INK)
        _dress(axes, x, y)
        names = ", ".join(lines)
        return self._svg(figure, title, f"{title}: {y} over {x}, of {names}" if rows else f"{title}: {y} over {x}")

    def histogram(
        self, title: str, values: Sequence[float], *, x: str, y: str, cut: float | None, parts: Sequence[str]
    ) -> Html:
        """Draw a histogram, with a line at a cut between two parts of the values, to the right and to the left."""
        if not self.are_drawn or not values:
            return Html("")
        figure, axes = self._figure()
        low, high = min(values), max(values)
        limits = (0.0, 1.0) if low >= 0 and high <= 1 else (low, high if high > low else low + 1)
        axes.hist(values, bins=40, range=limits, color=_COLORS[0])
        if cut is not None:
            axes.axvline(cut, color=_COLORS[1], linestyle="--", linewidth=1.4)
            for text, side, shift in zip(parts, ("left", "right"), (4, -4), strict=True):
                axes.annotate(
                    text, (cut, 1), xycoords=("data", "axes fraction"), xytext=(shift, -4), textcoords="offset points",
                    ha=side, va="top", color=_INK, fontsize=8.5,
                )  # fmt: skip
        axes.set_xlim(*limits)
        _count_by_integers(axes.yaxis)
        _dress(axes, x, y)
        note = "" if cut is None else f"; the cut between {parts[0]} and {parts[1]} is at {cut:.3f}"
        return self._svg(figure, title, f"{title}: {len(values)} {y} by {x}{note}")

    def _figure(self, rows: int = 0) -> tuple[Figure, Axes]:
        """Return a figure with room for rows of a legend below its axes."""
        from matplotlib.figure import Figure

        height = _HEIGHT + _ROW * rows
        figure = Figure(figsize=(_WIDTH, height))
        figure.patch.set_alpha(0)
        left, bottom, around = 0.7, 0.5 + _ROW * rows, 0.15
        place = (left / _WIDTH, bottom / height, (_WIDTH - left - around) / _WIDTH, (height - bottom - around) / height)
        return figure, figure.add_axes(place)

    def _svg(self, figure: Figure, title: str, description: str) -> Html:
        """Return a figure as an element, in which no id is that of another one."""
        import matplotlib

        self._count += 1
        file = io.StringIO()
        nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
        with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "stseg"}):
            figure.savefig(file, format="svg", metadata=nothing)
        text = file.getvalue()
        text = text[text.index("<svg") :]
        text = re.sub("<metadata>.*?</metadata>|<style.*?</style>|<!--.*?-->", "", text, flags=re.S)
        text = re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>chart-{self._count}-", text)
        box = re.search('viewBox="[^"]*"', text)
        assert box is not None
        label = escape(description)
        text = f'<svg class="chart" role="img" aria-label="{label}" {box[0]}>{text[text.index(">") + 1 :]}'
        text = re.sub(r"\n\s*", "\n", text.replace(_INK, "currentColor"))
        return element("figure", element("figcaption", title), Html(text))


def _dress(axes: Axes, x: str, y: str) -> None:
    axes.set_xlabel(_literal(x), color=_INK, fontsize=9)
    axes.set_ylabel(_literal(y), color=_INK, fontsize=9)
    axes.tick_params(colors=_INK, labelsize=8.5)
    axes.grid(alpha=0.25)
    axes.patch.set_alpha(0)
    for side, spine in axes.spines.items():
        spine.set_visible(side in ("left", "bottom"))
        spine.set_color(_INK)


def _count_by_integers(axis: Axis) -> None:
    from matplotlib.ticker import MaxNLocator

    axis.set_major_locator(MaxNLocator("auto", integer=True))


def _literal(text: str) -> str:
    """Return a text in which matplotlib sees no formula, and no name that hides a line from the legend."""
    readable = text.encode(errors="backslashreplace").decode().replace("$", r"\$")
    return f" {readable}" if readable.startswith("_") else readable
