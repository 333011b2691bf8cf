"""Insertion of benchmark results into pages of the documentation."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from files import write, write_json

HERE = Path(__file__).parent
SPEED = HERE.parent / "docs" / "speed.md"


def between(page: Path, mark: str) -> tuple[int, int]:
    """Find the text between ``<!-- mark -->`` and ``<!-- /mark -->`` in a page.

    Raises:
        ValueError: if the page does not have both marks exactly once.
    """
    name = re.escape(mark)
    found = list(re.finditer(rf"<!-- {name} -->(.*?)<!-- /{name} -->", page.read_text(encoding="utf-8"), re.DOTALL))
    if len(found) != 1:
        raise ValueError(f"{page} has the marks <!-- {mark} --> and <!-- /{mark} --> {len(found)} times; expected once")
    return found[0].span(1)


def put(page: Path, mark: str, text: str) -> None:
    """Replace the text between the two marks.

    Raises:
        ValueError: see ``between``.
    """
    begin, end = between(page, mark)
    before = page.read_text(encoding="utf-8")
    new = f"{before[:begin]}\n{text.strip()}\n{before[end:]}".encode()
    write(page, new)


def publish(name: str, text: str, figures: dict[str, Any], *, page: Path = SPEED) -> None:
    """Put a table between the marks ``name`` of a page, and its figures, unrounded, into ``results/name.json``.

    Raises:
        ValueError: see ``between``.
    """
    between(page, name)
    write_json(HERE / "results" / f"{name}.json", figures)
    put(page, name, text)
