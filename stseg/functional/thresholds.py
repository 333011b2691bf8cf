"""Confidence thresholds, common or per class, and their computation from a histogram."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

_UNIT = 2.0**-24  # all float32 from 0.5 to 1 are multiples of it
_BITS = 13
_ONE = 0x3F800000 >> _BITS  # leading bits of 1.0
STEPS = 24 * 2 ** (23 - _BITS) + 2
"""24,578 steps of confidence, finer the nearer they are to 1: within 0.1 % of ``1 - confidence``."""


def check_threshold(threshold: Any, num_classes: int) -> float | tuple[float, ...]:
    """Return a confidence threshold as a float, or one for each class as a tuple.

    Raises:
        ValueError: if ``threshold`` is neither a probability nor one for each class.

    Example:
        >>> check_threshold(torch.tensor([0.5, 0.25]), 2), check_threshold(1, 2)
        ((0.5, 0.25), 1.0)
    """
    try:
        values = torch.as_tensor(threshold, dtype=torch.float64, device="cpu").detach()
    except (TypeError, ValueError, RuntimeError):
        values = torch.zeros(0, 0)  # rejected below
    if values.shape not in ((), (num_classes,)):
        came = f"of shape {tuple(threshold.shape)}" if isinstance(threshold, Tensor) else repr(threshold)
        expected = f"a probability in [0, 1], or one for each of {num_classes} classes"
        raise ValueError(f"threshold is {came}; expected {expected}")
    for index, value in enumerate(values.flatten().tolist()):
        if not 0 <= value <= 1:
            where = "" if values.ndim == 0 else f" of class {index}"
            raise ValueError(f"threshold{where} is {value}; expected a probability in [0, 1]")
    return float(values) if values.ndim == 0 else tuple(values.tolist())


def leaves_out(threshold: float | tuple[float, ...]) -> bool:
    """Return whether pixels may fall below a threshold."""
    return (max(threshold) if isinstance(threshold, tuple) else threshold) > 0


def step_of(confidence: Tensor) -> Tensor:
    """Return the histogram step of each float32 confidence, counted from 1 down: int64. NaN counts as 0.

    The distance from 1, in whole units, is a float32 whose bits, read as an integer, have the order of the values. The
    step consists of the exponent and the first 10 bits of the fraction.
    """
    distance = 1 / _UNIT - (confidence.nan_to_num(0.0).clamp(0, 1) / _UNIT).floor()
    return ((distance.view(torch.int32) >> _BITS).long() - _ONE + 1).clamp(min=0)


def lower_end(step: int) -> float:
    """Return the lowest confidence of a step.

    Example:
        >>> [lower_end(step) for step in (0, 1, STEPS - 1)] == [1.0, 1.0 - _UNIT, 0.0]
        True
    """
    bits = torch.tensor([((step + _ONE) << _BITS) - 1], dtype=torch.int32)
    distance = math.floor(bits.view(torch.float32)) if step else 0
    return max(1 - distance * _UNIT, 0.0)


def least_confidence(counts: Sequence[int], keep: float) -> float:
    """Return the lowest confidence of the top steps that hold the share ``keep`` of pixels; 0 if they hold all."""
    total = sum(counts)
    for step, kept in enumerate(accumulate(counts)):
        if kept >= keep * total:
            return 0.0 if kept == total else lower_end(step)
    return 0.0
