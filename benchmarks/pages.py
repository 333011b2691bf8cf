"""Puts what a benchmark printed into a page of the documentation."""

from __future__ import annotations

import re
from pathlib import Path


def put(page: Path, mark: str, text: str) -> None:
    """Replace what stands between ``<!-- mark -->`` and ``<!-- /mark -->``.

    Raises:
        ValueError: if the page does not have the two marks once.
    """
    between = rf"(<!-- {re.escape(mark)} -->).*?(<!-- /{re.escape(mark)} -->)"
    new, count = re.subn(between, lambda m: f"{m[1]}\n{text.strip()}\n{m[2]}", page.read_text(), flags=re.DOTALL)
    if count != 1:
        raise ValueError(f"{page} has the marks <!-- {mark} --> and <!-- /{mark} --> {count} times; expected once")
    page.write_text(new)
