"""What is told of long work: progress bars or lines on the standard error stream, and the log ``"stseg"``."""

from __future__ import annotations

import logging
import sys
import time
from contextlib import suppress
from typing import Any, TypeAlias, TypeVar

from tqdm.auto import tqdm

LOG = logging.getLogger("stseg")
"""The log of the library. It has no output of its own."""
LOG.addHandler(logging.NullHandler())

_EVERY, _LONGEST = 30.0, 300.0  # seconds between two lines, at first and in long work
_IN_NOTEBOOK = any(kind.__module__ == "tqdm.notebook" for kind in tqdm.__mro__)

Self = TypeVar("Self", bound="Lines")


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


_STDERR = _Stream()  # a single one: tqdm clears the bars on a stream before it writes a message there


def progress_bar(
    *, title: str, total: int, show: bool, initial: int = 0, unit: str = "step", warm_up: int | None = None
) -> Progress:
    """Make a bar; where the standard error stream is no terminal, lines now and then.

    Args:
        title: name of the work.
        total: number of units.
        show: whether to show anything.
        initial: how many were done before.
        unit: of what, in the singular.
        warm_up: how many to do before the time left is estimated, from the average over all of them; None estimates it
            on a bar from the latest ones.
    """
    if show and sys.stderr is not None and not (_IN_NOTEBOOK or _is_terminal()):
        return Lines(title=title, total=total, initial=initial, unit=unit, warm_up=warm_up or 1)
    bar = _Bar(
        total=total,
        initial=initial,
        desc=title,
        disable=not show or sys.stderr is None,
        smoothing=0.3 if warm_up is None else 0,
        dynamic_ncols=True,
        file=_STDERR,
    )
    bar.warm_up = warm_up or 0
    return bar


class _Bar(tqdm):  # type: ignore[type-arg]  # generic in the stubs alone
    """A bar without an estimate until enough is done."""

    warm_up = 0

    @property
    def format_dict(self) -> Any:
        known = super().format_dict
        if self.n - self.initial < self.warm_up:
            known["rate"] = 0  # shown as unknown
        return known


class Lines:
    """Progress as complete lines: the first, the last, and one every 30 seconds, in long work every 5 minutes.

    Args:
        title: name of the work.
        total: number of units.
        initial: how many were done before.
        unit: of what, in the singular.
        warm_up: how many to do before the time left is estimated.
    """

    def __init__(self, *, title: str, total: int, initial: int = 0, unit: str = "step", warm_up: int = 1) -> None:
        self.title, self.total, self.initial, self.unit, self.warm_up = title, total, initial, unit, warm_up
        self.n = initial
        self._began = time.monotonic()
        self._due: float = 0.0  # of the next line, in seconds since then
        self._written: int | None = None  # where the last line was
        self._numbers: dict[str, str] = {}

    def __enter__(self: Self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        if self.n not in (self.initial, self._written):
            self._write(time.monotonic() - self._began, last=True)

    def update(self, n: int = 1) -> None:
        """Count what was done, and write a line if one is due."""
        self.n += n
        seconds = time.monotonic() - self._began
        if n and seconds >= self._due and self.n < self.total:
            self._due = seconds + min(max(_EVERY, seconds / 20), _LONGEST)
            self._write(seconds)

    def set_postfix(self, numbers: dict[str, str] | None = None, refresh: bool | None = True) -> None:
        """Set the numbers of the next line, formatted, by name."""
        self._numbers = dict(numbers or {})

    def _write(self, seconds: float, *, last: bool = False) -> None:
        self._written, done = self.n, self.n - self.initial
        parts = [f"{self.n}/{self.total} {self.unit}s", f"{self.n / max(1, self.total):.0%}".replace("%", " %")]
        if done > self.warm_up and seconds > 0:
            rate = done / seconds
            parts.append(f"{rate:.1f} {self.unit}s/s" if rate >= 1 else f"{1 / rate:.1f} s/{self.unit}")
        parts += [f"{name} {number}" for name, number in self._numbers.items()]
        if last:
            parts.append(f"after {format_duration(seconds)}")
        elif done > self.warm_up:
            parts.append(f"{format_duration(seconds / done * (self.total - self.n))} left")
        _STDERR.write(f"{self.title}: {', '.join(parts)}\n")
        _STDERR.flush()


Progress: TypeAlias = _Bar | Lines
"""Where work that is done is counted."""


def show_message(text: str) -> None:
    """Write a message below the bars."""
    if sys.stderr is not None:
        tqdm.write(text, file=_STDERR)


def warn_of_run(text: str, *, show: bool) -> None:
    """Log a warning that concerns a run, and write it below the bars, unless the log is written there.

    Args:
        text: what was seen.
        show: whether to write anything.
    """
    LOG.warning(text)
    if show and not _log_is_shown():
        show_message(f"warning: {text}")


def format_duration(seconds: float) -> str:
    """Format a duration in its two largest units.

    Example:
        >>> [format_duration(seconds) for seconds in (0.4, 59.7, 1500, 3660, 200000)]
        ['0.4 s', '1 min', '25 min', '1 h 1 min', '2 d 7 h']
    """
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    if seconds < 59.5:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    if minutes < 60:
        return f"{minutes} min"
    if minutes < 24 * 60:
        return f"{minutes // 60} h {minutes % 60} min"
    hours = minutes // 60
    return f"{hours // 24} d {hours % 24} h"


def _is_terminal() -> bool:
    with suppress(Exception):  # of any type: the stream may be one of a host program
        return bool(sys.stderr.isatty())
    return False


def _log_is_shown() -> bool:
    """Return whether a warning in the log is written to a standard stream."""
    streams = (sys.stdout, sys.stderr, sys.__stdout__, sys.__stderr__)
    logger: logging.Logger | None = LOG if LOG.isEnabledFor(logging.WARNING) else None
    while logger is not None:
        for handler in logger.handlers:
            if isinstance(handler, logging.StreamHandler) and handler.stream is not None:  # noqa: SIM102
                if handler.level <= logging.WARNING and any(handler.stream is stream for stream in streams):
                    return True
        logger = logger.parent if logger.propagate else None
    return False
