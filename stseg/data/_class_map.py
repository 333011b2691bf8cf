"""Mapping of mask values to class indices."""

from __future__ import annotations

import operator
from collections.abc import Mapping

import torch
from torch import Tensor

from stseg.errors import DataError


class ClassMap:
    """Mapping of mask values to classes.

    Args:
        classes: the class, or the ignore index, of each value.
        unmapped: class of all other values; None raises an error for them.

    Raises:
        TypeError: if ``classes`` is not a mapping, or a value is not an integer.
        ValueError: if ``classes`` is empty or has a class below 0.

    Example:
        >>> ClassMap({7: 0, 8: 1})(torch.tensor([[7, 8, 9, 255]]), name="a")
        tensor([[  0,   1, 255, 255]], dtype=torch.uint8)
    """

    def __init__(self, classes: Mapping[int, int], unmapped: int | None = 255) -> None:
        if not isinstance(classes, Mapping):
            raise TypeError(f"class_map is {type(classes).__name__}; expected a mapping such as {{7: 0, 8: 1}}")
        pairs = sorted((_integer(value, "value"), _integer(to, "class")) for value, to in classes.items())
        if not pairs:
            raise ValueError("class_map is empty; expected the class of one value or more")
        if pairs[0][0] < -(2**31) or pairs[-1][0] >= 2**31:
            raise ValueError(f"class_map has values from {pairs[0][0]} to {pairs[-1][0]}; expected 32 bits")
        self.unmapped = None if unmapped is None else _integer(unmapped, "unmapped")
        if self.unmapped is not None and not 0 <= self.unmapped < 2**31:
            raise ValueError(f"unmapped is {self.unmapped}; expected 0 or more, or None")
        outcomes = [to for _, to in pairs] + ([] if self.unmapped is None else [self.unmapped])
        wrong = next((to for to in outcomes if not 0 <= to < 2**31), None)
        if wrong is not None:
            raise ValueError(f"class_map gives the class {wrong}; expected 0 or more")
        dtype = torch.uint8 if max(outcomes) < 256 else torch.int32
        self._values = torch.tensor([value for value, _ in pairs], dtype=torch.int32)
        self._classes = torch.tensor([to for _, to in pairs], dtype=dtype)
        # There are only 256 values of 8 bits: build a lookup table.
        self._table = self._look_up(torch.arange(256, dtype=torch.int32))

    def __call__(self, mask: Tensor, *, name: str) -> Tensor:
        """Return the classes, ``(H, W)`` uint8 (int32 if one is above 255), of a uint8 or int32 mask ``(H, W)``.

        Raises:
            DataError: if a value has no class and ``unmapped`` is None; names the mask and the value.
        """
        if self.unmapped is None and not (known := torch.isin(mask.int(), self._values)).all():
            raise DataError(
                f"mask of {name!r} holds the value {int(mask[~known][0])}, which class_map does not have; "
                f"expected {_listed(self._values.tolist())} (unmapped=255 ignores all others)"
            )
        return self._table[mask.int()] if mask.dtype == torch.uint8 else self._look_up(mask)

    def _look_up(self, values: Tensor) -> Tensor:
        place = torch.searchsorted(self._values, values.contiguous()).clamp(max=len(self._values) - 1)
        other = 0 if self.unmapped is None else self.unmapped
        return torch.where(self._values[place] == values, self._classes[place], other)


def _integer(value: object, what: str) -> int:
    try:
        if isinstance(value, bool):
            raise TypeError
        return operator.index(value)  # type: ignore[arg-type]
    except TypeError:
        raise TypeError(f"class_map has the {what} {value!r}; expected an integer") from None


def _listed(values: list[int], most: int = 8) -> str:
    shown = ", ".join(str(value) for value in values[:most])
    return shown if len(values) <= most else f"{shown}, ... or {values[-1]}"
