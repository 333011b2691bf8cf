"""Names that are nearest to one that is missing, for messages."""

from __future__ import annotations

import difflib
from bisect import bisect
from collections.abc import Collection, Sequence, Set
from unicodedata import is_normalized, normalize

_COMPARED = 10_000  # comparing one name with more of them takes seconds


def nearest(name: str, there: Collection[str]) -> str:
    """Return the nearest of the names that are there and in what it differs, as the end of a message, or ``""``.

    Example:
        >>> nearest("Car_0", ["car_0", "car_1"])
        "; 'car_0' is there, which differs in letter case"
        >>> nearest("car_0", ["train/car_0"])
        "; 'train/car_0' is there, with the folder 'train/' in front"
        >>> nearest("car_0", ["tree"])
        ''
    """
    there, folded = sorted(there), _folded(name)
    for other in there:
        if _folded(other) == folded:
            return f"; {other!r} is there, which differs in {_difference(name, other)}"
    return _other_folder(name, there) or _near(name, there)


def ending_of(names: Sequence[str], there: Set[str]) -> str | None:
    """Return what most of the names need at their end to be one of those that are there, or None.

    Example:
        >>> ending_of(["car_1", "car_2"], {"car_1_mask", "car_10_mask", "car_2_mask"})
        '_mask'
        >>> ending_of(["car_1"], {"car_10"})
    """
    some = names[:1000]
    ends = {other[len(some[0]) :] for other in there if some and other.startswith(some[0])} - {""}
    fits = {end: sum(name + end in there for name in some) for end in ends if "/" not in end}
    # One longer name alone may be that of another image, such as car_10 for car_1.
    fits = {end: count for end, count in fits.items() if not end[0].isdigit() and (count > 1 or not end[0].isalpha())}
    return max(fits, key=lambda end: (fits[end], -len(end), end), default=None)


def quoted(text: str) -> str:
    """Format a string as code in double quotes."""
    return '"' + repr(text)[1:-1].replace('"', '\\"') + '"'


def _folded(name: str) -> str:
    return normalize("NFC", normalize("NFC", name).casefold())


def _difference(name: str, other: str) -> str:
    if normalize("NFC", name) != normalize("NFC", other):
        return "letter case" if name.casefold() == other.casefold() else "letter case and Unicode form"
    form = "NFC" if is_normalized("NFC", other) else "NFD"
    return (
        f"Unicode form, which looks the same on screen (unicodedata.normalize({form!r}, name) makes one of the other)"
    )


def _other_folder(name: str, there: list[str]) -> str:
    file = name.rpartition("/")[2]
    found = [other for other in there if other.endswith(file) and other.rpartition("/")[2] == file]
    for other in found:
        if other.endswith(f"/{name}"):
            return f"; {other!r} is there, with the folder {other[: -len(name)]!r} in front"
        if name.endswith(f"/{other}"):
            return f"; {other!r} is there, without the folder {name[: -len(other)]!r} in front"
    return f"; {found[0]!r} is there, in another folder" if found else ""


def _near(name: str, there: list[str]) -> str:
    if len(there) > _COMPARED:
        place = bisect(there, name)
        there = there[max(0, place - 50) : place + 50]
    close = difflib.get_close_matches(name, there, n=1, cutoff=0.75)
    return f"; the nearest name that is there is {close[0]!r}" if close else ""
