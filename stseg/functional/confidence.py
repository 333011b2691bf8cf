"""Image-level scores from the probabilities of one network."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from stseg.functional._areas import check_power, class_areas, mean_over_classes
from stseg.functional._checks import countable


def mean_confidence(logits: Tensor) -> Tensor:
    """Compute the mean confidence of the pixels of an image; not part of the paper.

    Args:
        logits: ``(B, K, H, W)`` float logits or log-probabilities.

    Returns:
        ``(B,)`` float64 scores in ``[1/K, 1]``; NaN for images with NaN logits.

    Raises:
        ValueError: if logits are not 4-dimensional floats of two or more classes and one or more pixels.

    Example:
        >>> mean_confidence(torch.zeros(1, 4, 2, 2))
        tensor([0.2500], dtype=torch.float64)
    """
    return _mean_over_pixels(_probabilities(logits).amax(1))


def mean_margin(logits: Tensor) -> Tensor:
    """Compute the mean margin between the two most probable classes of each pixel; not part of the paper.

    Args:
        logits: ``(B, K, H, W)`` float logits or log-probabilities.

    Returns:
        ``(B,)`` float64 scores in ``[0, 1]``: differences of probabilities; NaN for images with NaN logits.

    Raises:
        ValueError: if logits are not 4-dimensional floats of two or more classes and one or more pixels.

    Example:
        >>> float(mean_margin(torch.tensor([0.5, 0.3, 0.2]).log().reshape(1, 3, 1, 1)).round(decimals=6))
        0.2
    """
    first, second = _probabilities(logits).topk(2, dim=1).values.unbind(1)
    return _mean_over_pixels(first - second)


def mean_certainty(logits: Tensor) -> Tensor:
    """Compute the mean of 1 - H / log K, where H is the entropy of a pixel; not part of the paper.

    Args:
        logits: ``(B, K, H, W)`` float logits or log-probabilities.

    Returns:
        ``(B,)`` float64 scores in ``[0, 1]``: 1 where each pixel has a class of probability 1, 0 where all K
        classes are equally probable; NaN for images with NaN logits.

    Raises:
        ValueError: if logits are not 4-dimensional floats of two or more classes and one or more pixels.

    Example:
        >>> mean_certainty(torch.tensor([0.5, 0.5, 0.0, 0.0]).log().reshape(1, 4, 1, 1))
        tensor([0.5000], dtype=torch.float64)
    """
    entropy = torch.special.entr(_probabilities(logits)).sum(1)
    return 1 - (_mean_over_pixels(entropy) / math.log(logits.shape[1])).clamp(0, 1)


def expected_iou(logits: Tensor, *, power: float = 0.0) -> Tensor:
    """Compute the mean IoU of the predicted mask expected under its own probabilities; not part of the paper.

    Let *M* be the pixels predicted as class *c*, and *p* the probability of *c* at each pixel. The sum of *p* over *M*
    is the expected number of correct pixels in *M*, and its sum over all pixels the expected area of the class; both
    give an IoU of the class. The score is the mean over the predicted classes. It relates to
    :func:`stseg.functional.mean_confidence` as mean IoU relates to pixel accuracy.

    Args:
        logits: ``(B, K, H, W)`` float logits or log-probabilities.
        power: the IoU of each class is weighted by this power of its area, the expected union; 0 or more.

    Returns:
        ``(B,)`` float64 scores in ``[0, 1]``; NaN for images with NaN logits.

    Raises:
        ValueError: if logits are not 4-dimensional floats of two or more classes and one or more pixels, or ``power``
            is out of its range.

    Example:
        >>> expected_iou(torch.tensor([[0.9, 0.6], [0.1, 0.4]]).log().reshape(1, 2, 1, 2))
        tensor([0.7500], dtype=torch.float64)
    """
    check_power(power)
    probabilities = countable(_probabilities(logits)).flatten(2)
    mask = logits.argmax(1).to(probabilities.device)
    area = class_areas(mask, logits.shape[1])
    own = probabilities.gather(1, mask.flatten(1)[:, None])[:, 0].double()
    common = torch.zeros_like(area, dtype=torch.float64).scatter_add(1, mask.flatten(1), own)
    union = area + probabilities.sum(2, dtype=torch.float64) - common
    return mean_over_classes(common, union, area > 0, power)


def _probabilities(logits: Tensor) -> Tensor:
    if logits.ndim != 4 or not logits.is_floating_point() or logits.shape[1] < 2 or 0 in logits.shape[2:]:
        raise ValueError(
            f"logits are {logits.dtype} of shape {tuple(logits.shape)}; expected float (B, K, H, W) of two or more "
            "classes and one or more pixels"
        )
    return (logits.float() if logits.dtype.itemsize < 4 else logits).softmax(1)


def _mean_over_pixels(values: Tensor) -> Tensor:
    """Average over pixels: ``(B, H, W)`` -> ``(B,)`` float64."""
    return countable(values).flatten(1).mean(1, dtype=torch.float64)
