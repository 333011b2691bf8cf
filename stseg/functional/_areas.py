"""Areas of classes, and means of IoU weighted by them."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from stseg.functional._checks import countable


def mean_over_classes(common: Tensor, union: Tensor, counts: Tensor, power: float) -> Tensor:
    """Average the IoU of the classes that count, weighted by a power of their area: ``(B, K)`` -> ``(B,)``."""
    # Areas as shares of the largest: their powers always fit into a float.
    area = torch.where(counts, union.double(), 0.0)
    weight = torch.where(counts, (area / area.amax(1, keepdim=True)) ** power, 0.0)
    return (torch.where(counts, common / union, 0.0) * weight).sum(1) / weight.sum(1)


def class_areas(mask: Tensor, num_classes: int) -> Tensor:
    """Count the pixels of each class in each image: ``(B, H, W)`` -> ``(B, K)`` int64."""
    offset = torch.arange(len(mask), device=mask.device)[:, None] * num_classes
    cells = torch.bincount((mask.flatten(1) + offset).flatten(), minlength=len(mask) * num_classes)
    return countable(cells).reshape(len(mask), num_classes)


def check_power(power: float) -> None:
    if not 0 <= power < math.inf:
        raise ValueError(f"power is {power}; expected a finite number, 0 or more")
