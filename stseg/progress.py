"""Progress bars and messages on the standard error stream, which never stop the work."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from contextlib import suppress
from typing import Any

from tqdm.auto import tqdm


class _Stream:
    """The standard error stream; it may be missing, closed, full or a broken pipe."""

    def write(self, text: str) -> None:
        """Write text if possible."""
        with suppress(OSError, ValueError):
            if sys.stderr is not None:
                sys.stderr.write(text)

    def flush(self) -> None:
        """Flush if possible."""
        with suppress(OSError, ValueError):
            if sys.stderr is not None:
                sys.stderr.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(sys.stderr, name)


def progress_bar(
    iterable: Iterable[Any] | None = None, *, title: str, total: int, show: bool, initial: int = 0
) -> tqdm[Any]:
    """Make a progress bar over an iterable, or one that is updated by hand."""
    shown = show and sys.stderr is not None
    return tqdm(
        iterable, total=total, initial=initial, desc=title, disable=not shown, dynamic_ncols=True, file=_Stream()
    )


def show_message(text: str) -> None:
    """Write a message below the bars."""
    if sys.stderr is not None:
        tqdm.write(text, file=_Stream())
