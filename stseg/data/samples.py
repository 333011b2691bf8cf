"""Conversion of deep samples, of more than 8 bits or of any number of bands, to float images."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from stseg.errors import DataError

_LUMA = (0.299, 0.587, 0.114)  # as PIL converts colors to gray


def check_value_range(value_range: tuple[float, float] | None) -> tuple[float, float] | None:
    """Return the range as floats.

    Raises:
        ValueError: if it is not two numbers, the lower one first.
    """
    if value_range is None:
        return None
    try:
        low, high = () if isinstance(value_range, str) else (float(value) for value in value_range)
    except (TypeError, ValueError):
        raise ValueError(f"value_range is {value_range!r}; expected two numbers such as (0, 4095)") from None
    if not -np.inf < low < high < np.inf:
        raise ValueError(f"value_range is {value_range!r}; expected the values of black and white, such as (0, 4095)")
    return low, high


def scale_samples(
    values: np.ndarray[Any, Any],
    *,
    name: str,
    value_range: tuple[float, float] | None = None,
    stated: tuple[float, float] | None = None,
    way_out: str = "value_range=({low}, {high})",
) -> np.ndarray[Any, Any]:
    """Scale samples to float32 in [0, 1].

    The range is ``value_range``, else the one that the file states, else that of 16-bit integers if their highest bit
    is used (12-bit data in a 16-bit file do not use it), else that of floats in [0, 1].

    Raises:
        DataError: if there is no such range, or a value lies outside of it.
    """
    if values.dtype.kind not in "biuf":
        raise DataError(f"image {name!r} holds {values.dtype}; expected integers or real numbers")
    values = values.astype(np.uint8) if values.dtype.kind == "b" else values
    low, high = (float(extreme) for extreme in (values.min(), values.max()))
    if not (np.isfinite(low) and np.isfinite(high)):
        raise DataError(
            f"image {name!r} holds NaN or infinite values; expected numbers (give pixels without data a value)"
        )
    bounds = value_range or stated or _implied_range(values.dtype, low, high)
    if bounds is None:
        kind = f"{8 * values.dtype.itemsize}-bit " + ("floats" if values.dtype.kind == "f" else "integers")
        usual = values.dtype.kind != "f" and low >= 0
        line = way_out.format(low="0" if low >= 0 else f"{low:g}", high=_next_range(high) if usual else f"{high:g}")
        sixteen = usual and values.dtype.itemsize == 2 and way_out.startswith("value_range")
        full = " or (0, 65535) for all 16 bits" if sixteen else ""
        raise DataError(
            f"image {name!r} holds {kind} from {low:g} to {high:g} and does not state which values are black and "
            f"white; expected {line}{full}, the range of all images"
        )
    if not (bounds[0] <= low and high <= bounds[1]):
        source = "value_range" if value_range else "the range that the file states"
        raise DataError(
            f"image {name!r} holds values from {low:g} to {high:g}; {source} is "
            f"({bounds[0]:g}, {bounds[1]:g}); expected a range that holds the values of all images"
        )
    scaled = (values.astype(np.float64) - bounds[0]) / (bounds[1] - bounds[0])
    return scaled.astype(np.float32)


def sixteen_bits(values: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Return 32-bit integers of PIL that hold 16-bit values as uint16, any others as they are."""
    fits = values.dtype.kind == "i" and values.size > 0 and values.min() >= 0 and values.max() <= 65535
    return values.astype(np.uint16) if fits else values


def convert_channels(values: Tensor, mode: str | None, *, has_alpha: bool, extra: int, name: str) -> Tensor:
    """Convert ``(C, H, W)`` floats to the channels of a mode: RGB, RGBA or L; None keeps all.

    Raises:
        DataError: if bands would be lost whose meaning is not stated.
    """
    channels = len(values)
    if mode is None or (mode == "L" and channels == 1):
        return values
    if extra or channels - has_alpha not in (1, 3):
        raise DataError(
            f"image {name!r} has {channels} bands, which mode={mode!r} would drop or mix; "
            f"expected mode=None, which keeps them (and a network of {channels} input channels)"
        )
    colors, alpha = (values[:-1], values[-1:]) if has_alpha else (values, torch.ones_like(values[:1]))
    if mode == "L":
        return colors if len(colors) == 1 else (colors * torch.tensor(_LUMA)[:, None, None]).sum(0, keepdim=True)
    colors = colors.expand(3, -1, -1)
    return (torch.cat([colors, alpha]) if mode == "RGBA" else colors).contiguous()


def _implied_range(dtype: np.dtype[Any], low: float, high: float) -> tuple[float, float] | None:
    if dtype.kind == "f":
        return (0.0, 1.0) if low >= 0 and high <= 1 else None
    if dtype.kind == "u" and dtype.itemsize == 1:
        return 0.0, 255.0
    if dtype.kind == "u" and dtype.itemsize == 2 and (high > 32767 or high == 0):
        return 0.0, 65535.0
    return None


def _next_range(high: float) -> str:
    """Return the highest value of the usual depths that holds a value, for messages."""
    return next((str(top) for top in (255, 1023, 4095, 16383, 32767, 65535) if high <= top), f"{high:g}")
