"""Which part of a network's output the logits are: a place, a name, or a function."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from stseg.errors import NetworkError


def check_select(select: object) -> None:
    """Raise a ``TypeError`` unless it is None, a place, a name or a function.

    Example:
        >>> check_select(0.5)
        Traceback (most recent call last):
        TypeError: select is 0.5; expected a place in a tuple (0), a key or an attribute ('logits'), a function or None
    """
    if select is None or callable(select) or (isinstance(select, (int, str)) and not isinstance(select, bool)):
        return
    raise TypeError(
        f"select is {select!r}; expected a place in a tuple (0), a key or an attribute ('logits'), a function or None"
    )


def part_of(output: Any, select: int | str) -> Any:
    """Return the part of a network's output at a place or under a name; a single tensor as it is.

    Raises:
        NetworkError: if the output has no such part; names those that it has.

    Example:
        >>> part_of(("features", "logits"), -1), part_of({"depth": 1, "classes": 2}, "classes")
        ('logits', 2)
    """
    if isinstance(output, Tensor):
        return output
    kind, there = type(output).__name__, ""
    if isinstance(select, int):
        if isinstance(output, (tuple, list)):
            if -len(output) <= select < len(output):
                return output[select]
            there = f" of {len(output)}"
        raise NetworkError(f"the network returned a {kind}{there}, which has no place {select}, as select= says")
    if isinstance(output, Mapping):
        if select in output:
            return output[select]
        there = f" with the keys {list(output)}"
    elif hasattr(output, select):
        return getattr(output, select)
    raise NetworkError(f"the network returned a {kind}{there}; expected {select!r} in it, as select= says")


def refuse_local(select: object) -> None:
    """Raise a ``TypeError`` if it is a function that pickle cannot save; says what to write.

    Example:
        >>> refuse_local(lambda output: output[0])
        Traceback (most recent call last):
        TypeError: a stseg.Segmenter whose select= is a lambda, or a function inside another, cannot be pickled; ...
    """
    if "<" in getattr(select, "__qualname__", ""):  # <lambda> or <locals>
        raise TypeError(
            "a stseg.Segmenter whose select= is a lambda, or a function inside another, cannot be pickled; expected a "
            "place (select=0), a key or an attribute (select='logits') or a function of a module. To save the weights "
            "alone: stseg.save_weights(model, path), which stseg.load_weights reads"
        )
