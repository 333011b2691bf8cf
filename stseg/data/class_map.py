"""Mapping of mask values, or colors, to class indices."""

from __future__ import annotations

import operator
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from stseg.data.convert import as_mask
from stseg.data.observations import observe_values, observing_values
from stseg.errors import DataError

Value = int | tuple[int, int, int]
"""A mask value: a number, or a color ``(red, green, blue)``."""


class ClassMap:
    """Mapping of mask values to classes, for masks of any data set.

    :class:`SegmentationFolder` and :class:`ListedFiles` make one of their ``class_map``. In a data set of your own,
    call it on each mask; as ``target_transform`` it also fits torchvision's data sets.

    Args:
        classes: the class, or the ignore index, of each value; the values are all integers, or all colors
            ``(red, green, blue)`` of 0..255.
        unmapped: class of all other values; None raises an error for them.

    Raises:
        TypeError: if ``classes`` is not a mapping, or a value is neither an integer nor three of them.
        ValueError: if ``classes`` is empty or has a class below 0.

    Example:
        >>> ClassMap({7: 0, 8: 1})(torch.tensor([[7, 8, 9, 255]]))
        tensor([[  0,   1, 255, 255]], dtype=torch.uint8)
        >>> picture = Image.new("RGB", (3, 1), (128, 0, 0))
        >>> ClassMap({(0, 0, 0): 0, (128, 0, 0): 1})(picture)
        tensor([[1, 1, 1]], dtype=torch.uint8)
    """

    def __init__(self, classes: Mapping[Any, int], unmapped: int | None = 255) -> None:
        if not isinstance(classes, Mapping):
            raise TypeError(f"class_map is {type(classes).__name__}; expected a mapping such as {{7: 0, 8: 1}}")
        if not classes:
            raise ValueError("class_map is empty; expected the class of one value or more")
        colored = [isinstance(value, (tuple, list)) for value in classes]
        if any(colored) and not all(colored):
            raise TypeError("class_map has both numbers and colors; expected one kind")
        self.colors = all(colored)
        codes = {_code(value) if self.colors else _integer(value, "value"): value for value in classes}
        pairs = sorted((code, _integer(classes[value], "class")) for code, value in codes.items())
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

    def __call__(self, mask: Any, *, name: str = "mask") -> Tensor:
        """Return the classes, ``(H, W)`` uint8 (int32 if one is above 255), of a mask.

        Args:
            mask: ``(H, W)`` or ``(1, H, W)`` integer tensor or array, or a PIL image; for colors a PIL image, or a
                ``(H, W, 3)`` uint8 array.
            name: name for error messages.

        Raises:
            DataError: if a value has no class and ``unmapped`` is None; names the mask and the value.
        """
        if isinstance(mask, Image.Image) and mask.mode == "1":
            mask = mask.convert("L")  # 0 and 255, as in files
        values = _color_codes(mask, name) if self.colors else as_mask(mask, name=name)
        if observing_values():
            self._observe(values)
        if self.unmapped is None and not (known := torch.isin(values.int(), self._values)).all():
            raise DataError(
                f"mask of {name!r} holds the value {self._shown(int(values[~known][0]))}, which class_map does not "
                f"have; expected {_listed([self._shown(value) for value in self._values.tolist()])} "
                "(unmapped=255 ignores all others)"
            )
        return self._table[values.int()] if values.dtype == torch.uint8 else self._look_up(values)

    def __repr__(self) -> str:
        pairs = zip(self._values.tolist(), self._classes.tolist(), strict=True)
        classes = {(_color(value) if self.colors else value): to for value, to in pairs}
        return f"ClassMap({classes}, unmapped={self.unmapped})"

    def _look_up(self, values: Tensor) -> Tensor:
        place = torch.searchsorted(self._values, values.contiguous()).clamp(max=len(self._values) - 1)
        other = 0 if self.unmapped is None else self.unmapped
        return torch.where(self._values[place] == values, self._classes[place], other)

    def _observe(self, values: Tensor) -> None:
        keys = [_color(value) if self.colors else value for value in self._values.tolist()]
        held: list[int] = torch.unique(values.int()).tolist()
        known = dict(zip(self._values.tolist(), keys, strict=True))
        others = {self._shown(value) for value in held if value not in known}
        observe_values(tuple(keys), {known[value] for value in held if value in known}, others)

    def _shown(self, value: int) -> str:
        return str(_color(value) if self.colors else value)


def _code(color: Any) -> int:
    parts = [_integer(part, "color") for part in color]
    if len(parts) != 3 or not all(0 <= part <= 255 for part in parts):
        raise ValueError(f"class_map has the color {color!r}; expected (red, green, blue), each of 0..255")
    return parts[0] << 16 | parts[1] << 8 | parts[2]


def _color(code: int) -> tuple[int, int, int]:
    return code >> 16, code >> 8 & 255, code & 255


def _color_codes(mask: Any, name: str) -> Tensor:
    """Return ``(H, W)`` int32 codes of the colors of a mask."""
    if isinstance(mask, Image.Image) and not mask.mode.startswith(("I", "F")):
        alpha = mask.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in mask.info
        mask = np.array(mask.convert("RGBA" if alpha else "RGB"))
    pixels = np.asarray(mask)
    if pixels.ndim == 3 and pixels.shape[2] == 4 and (pixels[..., 3] == 255).all():
        pixels = pixels[..., :3]
    if pixels.ndim != 3 or pixels.shape[2] != 3 or pixels.dtype != np.uint8:
        transparent = pixels.ndim == 3 and pixels.shape[2] in (2, 4)
        what = (
            "has transparent pixels (PIL's image.convert('RGB') leaves the transparency out)"
            if transparent
            else f"is {pixels.dtype} of shape {pixels.shape}"
        )
        raise DataError(
            f"mask of {name!r} {what}; expected opaque colors, a PIL image or (H, W, 3) uint8, as class_map has colors"
        )
    codes = pixels.astype(np.int32) @ np.array([1 << 16, 1 << 8, 1], dtype=np.int32)
    return torch.from_numpy(codes.astype(np.int32))


def _integer(value: object, what: str) -> int:
    try:
        if isinstance(value, bool):
            raise TypeError
        return operator.index(value)  # type: ignore[arg-type]
    except TypeError:
        raise TypeError(f"class_map has the {what} {value!r}; expected an integer") from None


def _listed(values: list[str], most: int = 8) -> str:
    shown = ", ".join(values[:most])
    return shown if len(values) <= most else f"{shown}, ... or {values[-1]}"
