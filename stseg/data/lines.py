"""Text files of which every line is an item."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from stseg.errors import DataError


def numbered_lines(path: str | Path) -> Iterator[tuple[int, str]]:
    """Number, from 1, and text of the lines of a file in UTF-8 that hold more than white space.

    Raises:
        DataError: if the file is not UTF-8.
        OSError: if there is no such file.
    """
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not a text file in UTF-8: {error}") from None
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            yield number, line
