"""What reading a data set shows about it, beyond its items: collected where a check asks for it."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

from stseg.errors import DataWarning

Key = int | tuple[int, ...]

_MOST = 1000  # values that are remembered

_current: ContextVar[Observations | None] = ContextVar("observations", default=None)


@dataclass
class Observations:
    """What was seen while items were read.

    Attributes:
        met: for each ``class_map``, as the tuple of its keys, those that a mask holds.
        unmapped: for each ``class_map``, some of the other values that the masks hold.
        turned: names of the images that were turned by their EXIF orientation and whose masks may not have been.
        palettes: the colors of each index of masks with a palette.
    """

    met: dict[tuple[Any, ...], set[Any]] = field(default_factory=dict)
    unmapped: dict[tuple[Any, ...], set[str]] = field(default_factory=dict)
    turned: list[str] = field(default_factory=list)
    palettes: dict[int, set[tuple[int, ...]]] = field(default_factory=dict)

    def add(self, other: Observations) -> None:
        """Add what another pass, or another process, saw."""
        for keys, met in other.met.items():
            self.met.setdefault(keys, set()).update(met)
        for keys, values in other.unmapped.items():
            mine = self.unmapped.setdefault(keys, set())
            mine.update(list(values)[: _MOST - len(mine)])
        self.turned.extend(other.turned)
        for index, colors in other.palettes.items():
            self.palettes.setdefault(index, set()).update(colors)

    def warn(self, name: str) -> None:
        """Warn of keys of a ``class_map`` that no mask holds, and of masks that may lie beside their image."""
        for keys, met in self.met.items():
            if missing := [key for key in keys if key not in met]:
                warn(
                    f"no mask of the {name} data set holds {_listed(missing)}, which class_map names; "
                    f"of its keys, the masks hold {_listed(sorted(met)) if met else 'none'}"
                )
        for keys, values in self.unmapped.items():
            if len(values) > 2 * len(keys) + 8:
                warn(
                    f"the masks of the {name} data set hold {len(values)}{' or more' if len(values) == _MOST else ''} "
                    f"values that class_map does not name, such as {_listed(sorted(values, key=_as_number), 4)}; "
                    "were they resized with interpolation, or compressed with loss? unmapped=None refuses such masks"
                )
        several = {index: sorted(colors)[:2] for index, colors in self.palettes.items() if len(colors) > 1}
        if several and not any(isinstance(key, tuple) for keys in self.met for key in keys):
            index, (one, other) = next(iter(several.items()))
            warn(
                f"the palettes of the masks of the {name} data set differ: index {index} is {one} in one file and "
                f"{other} in another, so that it may not be the same class; the colors as keys are: "
                f"class_map={{{one}: ..., {other}: ...}}"
            )
        if self.turned:
            count = len(self.turned)
            warn(
                f"{count} image{'s' if count > 1 else ''} of the {name} data set, first {self.turned[0]!r}, "
                f"{'were' if count > 1 else 'was'} turned {_TURNED}"
            )


_TURNED = (
    "by an EXIF orientation tag, which the mask does not have (or the other way round), and whose size does not tell "
    "whether the mask was drawn on the turned pixels or on those stored; expected apply_exif=True (turned) or "
    "apply_exif=False (as stored)"
)


@contextmanager
def observing() -> Iterator[Observations]:
    """Collect what is seen while items are read, in this thread."""
    observations = Observations()
    token = _current.set(observations)
    try:
        yield observations
    finally:
        _current.reset(token)


def observe_values(keys: tuple[Any, ...], met: set[Any], unmapped: set[str]) -> None:
    """Note the keys of a ``class_map`` that a mask holds, and the other values."""
    observations = _current.get()
    if observations is not None:
        observations.add(Observations({keys: met}, {keys: unmapped}))


def observe_palette(colors: dict[int, tuple[int, ...]]) -> None:
    """Note the colors of the indices that a mask with a palette holds."""
    observations = _current.get()
    if observations is not None:
        observations.add(Observations(palettes={index: {color} for index, color in colors.items()}))


def observing_values() -> bool:
    """Return whether :func:`observe_values` has an effect."""
    return _current.get() is not None


def observe_turned(name: str) -> None:
    """Note, or warn outside of a check, that an image was turned and its mask may not have been."""
    observations = _current.get()
    if observations is None:
        warn(f"the image {name!r} was turned {_TURNED}")
    else:
        observations.turned.append(name)


def warn(message: str) -> None:
    """Warn about data."""
    warnings.warn(message, DataWarning, stacklevel=3)


def _as_number(value: str) -> tuple[int, str]:
    return (int(value) if value.lstrip("-").isdecimal() else 0, value)


def _listed(values: list[Any], most: int = 8) -> str:
    shown = ", ".join(str(value) for value in values[:most])
    return shown if len(values) <= most else f"{shown}, ... ({len(values)} in all)"
