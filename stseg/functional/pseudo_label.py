"""Pseudo-labels of a batch: the most probable class of each pixel, and its probability."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from stseg.functional.classes import check_classes, index_dtype
from stseg.functional.thresholds import check_threshold


class PseudoLabels(NamedTuple):
    """Class and confidence of each pixel of a batch."""

    mask: Tensor
    """``(B, H, W)`` class indices, uint8 (int32 where classes or ignore index do not fit)."""
    confidence: Tensor
    """``(B, H, W)`` float32, the probability of the most probable class."""


def pseudo_label(
    logits: Tensor, *, threshold: float | Sequence[float] | Tensor = 0.0, ignore_index: int = 255
) -> PseudoLabels:
    """Return the most probable class of each pixel and its probability.

    Args:
        logits: ``(B, K, H, W)`` float logits or log-probabilities.
        threshold: pixels whose confidence is below it get ``ignore_index``; one value, or one for each of the K
            predicted classes. The paper (Yang et al., CVPR 2022) uses 0.
        ignore_index: value of pixels that are left out.

    Returns:
        mask ``(B, H, W)`` uint8 (int32 where classes or ignore index do not fit) and confidence ``(B, H, W)`` float32.

    Raises:
        ValueError: if logits are not 4-dimensional floats, a threshold is outside [0, 1], their number is not K, or
            the ignore index is a class.

    Example:
        >>> mask, confidence = pseudo_label(torch.tensor([0.0, 2.0, 0.0]).reshape(1, 3, 1, 1), threshold=0.5)
        >>> int(mask), round(float(confidence), 3)
        (1, 0.787)
    """
    if logits.ndim != 4 or not logits.is_floating_point():
        raise ValueError(f"logits are {logits.dtype} of shape {tuple(logits.shape)}; expected float (B, K, H, W)")
    num_classes = logits.shape[1]
    check_classes(num_classes, ignore_index)
    threshold = check_threshold(threshold, num_classes)
    # Not the arg max of the softmax: rounding creates ties. On a CPU, max is several times faster than argmax, and the
    # softmax along the memory faster than the other way.
    mask, confidence = logits.max(1).indices, logits.float().contiguous().softmax(1).amax(1)
    if isinstance(threshold, tuple):
        least = torch.tensor(threshold, dtype=torch.float32, device=mask.device)
        mask = mask.masked_fill(confidence < least[mask], ignore_index)
    elif threshold > 0:
        mask = mask.masked_fill(confidence < threshold, ignore_index)
    return PseudoLabels(mask.to(index_dtype(num_classes, ignore_index)), confidence)
