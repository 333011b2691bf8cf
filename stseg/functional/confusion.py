"""Confusion matrix, and intersection over union, Dice coefficient and pixel accuracy of it."""

from __future__ import annotations

import torch
from torch import Tensor

from stseg.functional._checks import check_range, check_same_shape, countable, indices


def confusion_matrix(
    prediction: Tensor, target: Tensor, num_classes: int, *, ignore_index: int | None = None
) -> Tensor:
    """Count how often each class was predicted where each class is true.

    Args:
        prediction: integer class maps of any shape; values in ``[0, num_classes)`` wherever the target is not ignored.
        target: integer class maps of the same shape.
        num_classes: number of classes.
        ignore_index: target value of ignored pixels.

    Returns:
        ``(num_classes, num_classes)`` int64: rows are the true class, columns the predicted one.

    Raises:
        ValueError: if shapes differ, or a value is not a valid class index.
        TypeError: if the dtype is not integral.

    Example:
        >>> confusion_matrix(torch.tensor([0, 1, 1]), torch.tensor([0, 1, 0]), 2)
        tensor([[1, 1],
                [0, 1]])
    """
    check_same_shape("prediction", prediction, "target", target)
    prediction, target = indices("prediction", prediction), indices("target", target)
    counted = torch.ones_like(target, dtype=torch.bool) if ignore_index is None else target != ignore_index
    check_range("prediction", prediction[counted], num_classes)
    check_range("target", target[counted], num_classes)
    return compute_confusion_matrix(prediction, target, num_classes, ignore_index)


def compute_confusion_matrix(prediction: Tensor, target: Tensor, num_classes: int, ignore_index: int | None) -> Tensor:
    """Compute :func:`confusion_matrix` of valid class maps, without checks."""
    cells = target.long().flatten() * num_classes + prediction.long().flatten()
    if ignore_index is not None:
        cells = torch.where(target.flatten() != ignore_index, cells, num_classes**2)
    counts = torch.bincount(cells, minlength=num_classes**2 + 1)[: num_classes**2]
    return counts.reshape(num_classes, num_classes)


def iou(matrix: Tensor) -> Tensor:
    """Compute the intersection over union of each class.

    Args:
        matrix: ``(..., K, K)`` confusion matrices.

    Returns:
        ``(..., K)`` float64; NaN for classes that are neither true nor predicted anywhere.

    Example:
        >>> iou(torch.tensor([[1, 1], [0, 1]]))
        tensor([0.5000, 0.5000], dtype=torch.float64)
    """
    matrix = countable(matrix).double()
    intersection = matrix.diagonal(dim1=-2, dim2=-1)
    return intersection / (matrix.sum(-1) + matrix.sum(-2) - intersection)


def dice(matrix: Tensor) -> Tensor:
    """Compute the Dice coefficient (F1 score) of each class.

    Args:
        matrix: ``(..., K, K)`` confusion matrices.

    Returns:
        ``(..., K)`` float64; NaN for classes that are neither true nor predicted anywhere.

    Example:
        >>> dice(torch.tensor([[1, 1], [0, 1]]))
        tensor([0.6667, 0.6667], dtype=torch.float64)
    """
    matrix = countable(matrix).double()
    return 2 * matrix.diagonal(dim1=-2, dim2=-1) / (matrix.sum(-1) + matrix.sum(-2))


def pixel_accuracy(matrix: Tensor) -> Tensor:
    """Compute the share of the pixels whose class is right.

    Args:
        matrix: ``(..., K, K)`` confusion matrices.

    Returns:
        ``(...)`` float64; NaN where no pixel is counted.

    Example:
        >>> pixel_accuracy(torch.tensor([[1, 1], [0, 1]]))
        tensor(0.6667, dtype=torch.float64)
    """
    matrix = countable(matrix).double()
    return matrix.diagonal(dim1=-2, dim2=-1).sum(-1) / matrix.sum((-2, -1))


def mean_iou(prediction: Tensor, target: Tensor, num_classes: int, *, ignore_index: int | None = None) -> Tensor:
    """Compute the mean intersection over union of the classes that are true or predicted somewhere.

    Args:
        prediction: integer class maps of any shape.
        target: integer class maps of the same shape.
        num_classes: number of classes.
        ignore_index: target value of ignored pixels.

    Returns:
        float64 scalar in [0, 1]; NaN if no pixel counts.

    Raises:
        ValueError: if shapes differ, or a value is not a valid class index.
        TypeError: if the dtype is not integral.

    Example:
        >>> mean_iou(torch.tensor([0, 1, 1]), torch.tensor([0, 1, 0]), 3)
        tensor(0.5000, dtype=torch.float64)
    """
    return iou(confusion_matrix(prediction, target, num_classes, ignore_index=ignore_index)).nanmean()
