"""Checks that functions share: shapes, dtypes and class indices."""

from __future__ import annotations

from numbers import Integral

import torch
from torch import Tensor


def check_same_shape(name: str, value: Tensor, other_name: str, other: Tensor) -> None:
    if value.shape != other.shape:
        raise ValueError(
            f"{name} has shape {tuple(value.shape)} and {other_name} {tuple(other.shape)}; expected the same"
        )


def indices(name: str, values: Tensor) -> Tensor:
    if values.is_floating_point() or values.is_complex():
        raise ValueError(f"{name} is {values.dtype}; expected integer class indices")
    return values.long()


def check_range(name: str, values: Tensor, num_classes: int) -> None:
    if values.numel():
        low, high = (int(v) for v in torch.aminmax(values))
        if low < 0 or high >= num_classes:
            wrong = low if low < 0 else high
            raise ValueError(f"{name} holds the value {wrong}; expected 0..{num_classes - 1}")


def countable(counts: Tensor) -> Tensor:
    return counts.cpu() if counts.device.type == "mps" else counts  # Apple's GPUs have no float64


def check_classes(num_classes: int, ignore_index: int) -> None:
    """Raise an error unless both are integers and make sense together."""
    for name, value in (("num_classes", num_classes), ("ignore_index", ignore_index)):
        if not isinstance(value, Integral) or isinstance(value, bool):
            raise TypeError(f"{name} is {value!r}; expected an integer")
    if num_classes < 2:
        raise ValueError(
            f"num_classes is {num_classes}; expected 2 or more (foreground against background is 2 classes)"
        )
    if 0 <= ignore_index < num_classes:
        raise ValueError(f"ignore_index {ignore_index} is one of the {num_classes} classes; expected another value")


def index_dtype(num_classes: int, ignore_index: int) -> torch.dtype:
    """The dtype of predicted masks: uint8 where classes and ignore index fit in it, else int32."""
    return torch.uint8 if num_classes <= 256 and 0 <= ignore_index <= 255 else torch.int32
