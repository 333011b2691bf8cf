"""Class indices: their number and dtype."""

from __future__ import annotations

from numbers import Integral

import torch
from torch import Tensor


def check_classes(num_classes: int, ignore_index: int) -> None:
    """Raise an error unless both are integers, there are two or more classes, and the ignore index is not one."""
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
    """Return the dtype of predicted masks: uint8 if classes and ignore index fit, else int32."""
    return torch.uint8 if num_classes <= 256 and 0 <= ignore_index <= 255 else torch.int32


def one_hot(masks: Tensor, num_classes: int) -> Tensor:
    """Turn class indices into channels.

    Args:
        masks: ``(B, H, W)`` integers.
        num_classes: number of classes K.

    Returns:
        ``(B, K, H, W)`` float32: 1 in the channel of the class; 0 everywhere for values that are not a class, such as
        the ignore index.

    Example:
        >>> one_hot(torch.tensor([[[1, 255]]]), 2)[0, :, 0].tolist()
        [[0.0, 0.0], [1.0, 0.0]]
    """
    classes = torch.arange(num_classes, device=masks.device)
    return (masks[:, None] == classes[:, None, None]).float()
