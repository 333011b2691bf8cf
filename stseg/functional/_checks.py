"""Shared checks of shapes, dtypes and class indices."""

from __future__ import annotations

import torch
from torch import Tensor


def check_same_shape(name: str, value: Tensor, other_name: str, other: Tensor) -> None:
    if value.shape != other.shape:
        raise ValueError(
            f"{name} has shape {tuple(value.shape)} and {other_name} {tuple(other.shape)}; expected the same"
        )


def indices(name: str, values: Tensor) -> Tensor:
    if values.is_floating_point() or values.is_complex():
        raise TypeError(f"{name} is {values.dtype}; expected integer class indices")
    return values.long()


def check_range(name: str, values: Tensor, num_classes: int) -> None:
    if values.numel():
        low, high = (int(v) for v in torch.aminmax(values))
        if low < 0 or high >= num_classes:
            wrong = low if low < 0 else high
            raise ValueError(f"{name} holds the value {wrong}; expected 0..{num_classes - 1}")


def countable(counts: Tensor) -> Tensor:
    return counts.cpu() if counts.device.type == "mps" else counts  # Apple's GPUs have no float64
