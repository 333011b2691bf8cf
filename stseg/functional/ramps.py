"""Schedules: decay of the learning rate, ramp-up of a weight."""

from __future__ import annotations

import math


def polynomial_decay(step: int, total: int, power: float) -> float:
    """Compute the factor of the learning rate after ``step`` of ``total`` steps: ``(1 - step / total) ** power``.

    Example:
        >>> polynomial_decay(0, 100, 0.9), round(polynomial_decay(50, 100, 0.9), 4)
        (1.0, 0.5359)
    """
    return float((1 - step / total) ** power)


def sigmoid_rampup(step: float, length: float) -> float:
    """Compute the ramp-up factor of a weight: ``exp(-5 * (1 - step / length) ** 2)``, then 1.

    The ramp of Laine and Aila (ICLR 2017, section 2.2), used by Mean Teacher for its consistency loss.

    Args:
        step: steps done; negative values count as 0.
        length: steps until the factor is 1; 0 or more. With 0 it is 1 from the start.

    Raises:
        ValueError: if ``length`` is negative.

    Example:
        >>> [round(sigmoid_rampup(step, 100), 4) for step in (0, 50, 100, 200)]
        [0.0067, 0.2865, 1.0, 1.0]
    """
    _check_length(length)
    if length == 0:
        return 1.0
    return math.exp(-5 * (1 - min(max(step, 0), length) / length) ** 2)


def linear_rampup(step: float, start: float, length: float) -> float:
    """Compute a factor that is 0 until ``start`` and rises evenly to 1 within ``length`` steps.

    Args:
        step: steps done.
        start: the last step at which it is 0.
        length: steps from 0 to 1; 0 or more. With 0 it is 0 before ``start`` and 1 from there on.

    Raises:
        ValueError: if ``length`` is negative.

    Example:
        >>> [linear_rampup(step, 10, 50) for step in (0, 10, 35, 60, 99)]
        [0.0, 0.0, 0.5, 1.0, 1.0]
    """
    _check_length(length)
    if length == 0:
        return float(step >= start)
    return float(min(max((step - start) / length, 0.0), 1.0))


def _check_length(length: float) -> None:
    if not length >= 0:  # also catches NaN
        raise ValueError(f"length is {length}; expected 0 or more steps")
