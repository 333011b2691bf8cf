"""Mean intersection over union of a whole data set."""

from __future__ import annotations

import torch
from torch import Tensor

from stseg.distributed import all_reduce_sum
from stseg.functional import confusion_matrix, iou
from stseg.functional.classes import check_classes
from stseg.functional.confusion import compute_confusion_matrix


class MeanIoU:
    """Mean IoU from one confusion matrix over all updates.

    Classes that are neither true nor predicted anywhere are left out of the mean. This is the evaluation of
    the paper (Yang et al., CVPR 2022): not a mean over images.

    Args:
        num_classes: number of classes.
        ignore_index: mask value of ignored pixels.

    Example:
        >>> metric = MeanIoU(2)
        >>> metric.update(torch.tensor([[0, 1, 1, 1]]), torch.tensor([[0, 1, 0, 255]]))
        >>> metric.compute()
        0.5
    """

    def __init__(self, num_classes: int, ignore_index: int = 255) -> None:
        check_classes(num_classes, ignore_index)
        self.num_classes = num_classes
        self.ignore_index = ignore_index
        self.matrix = torch.zeros(num_classes, num_classes, dtype=torch.int64)
        """``(K, K)`` int64 on the CPU: rows are the true class, columns the predicted one."""

    def update(self, prediction: Tensor, target: Tensor) -> None:
        """Add predictions.

        Args:
            prediction: integer class maps of any shape.
            target: true class maps of the same shape.

        Raises:
            ValueError: if shapes differ, or a value is neither a class nor the ignore index.
            TypeError: if the dtype is not integral.
        """
        self.matrix += confusion_matrix(prediction, target, self.num_classes, ignore_index=self.ignore_index).cpu()

    def add(self, prediction: Tensor, target: Tensor) -> None:
        """Add predictions of a network and valid masks, without checks."""
        self.matrix += compute_confusion_matrix(prediction, target, self.num_classes, self.ignore_index).cpu()

    def iou(self) -> Tensor:
        """Return the IoU of each class: ``(K,)`` float64, NaN for classes neither true nor predicted."""
        return iou(self.matrix)

    def compute(self) -> float:
        """Return the mean IoU in [0, 1]; NaN before the first update."""
        return float(self.iou().nanmean())

    def reset(self) -> None:
        """Reset the counts to zero."""
        self.matrix.zero_()

    def merge_processes(self) -> None:
        """Sum the counts over all processes of ``torch.distributed``."""
        self.matrix = all_reduce_sum(self.matrix)

    def __repr__(self) -> str:
        return f"MeanIoU(num_classes={self.num_classes}, pixels={int(self.matrix.sum())}, mIoU={self.compute():.3f})"
